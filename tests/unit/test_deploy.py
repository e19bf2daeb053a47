"""examples/deploy, held against the engine: every flag, option and route that the files name exists."""

import re
import shlex
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.cli import _parser
from engine.config import read_file, resolve
from engine.http.app import ROUTES
from engine.runtime.meeting import check_hosts, meeting

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"
PATHS = {route.path for route in ROUTES if route.method == "GET"}


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", (DEPLOY / name).read_text(), flags=re.MULTILINE))
    pairs = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(word, rest) for word, rest in pairs]


def parsed(words: list[str]) -> Any:
    """The command line `engine WORDS`; raises ConfigError where that has an unknown flag."""
    return _parser().parse_args(words)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_an_image_starts_a_server_that_is_reached_from_outside(name: str) -> None:
    found = dict(instructions(name))
    assert yaml.safe_load(found["ENTRYPOINT"]) == ["engine"]
    arguments = parsed(yaml.safe_load(found["CMD"]))
    assert (arguments.host, arguments.allowed_hosts) == ("0.0.0.0", "localhost")
    assert found["EXPOSE"] == "8000"
    for path in re.findall(r"127\.0\.0\.1:8000(/\w+)", found["HEALTHCHECK"]):
        assert path in PATHS
    copied = [source for word, rest in instructions(name) if word == "COPY" for source in rest.split()[:-1]]
    for source in copied:
        assert source.startswith(("--", "/")) or (ROOT / source).exists()


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda", "README.md"])
def test_the_commands_in_comments_name_what_exists(name: str) -> None:
    for path in re.findall(r"-f (\S+)", (DEPLOY / name).read_text()):
        assert (ROOT / path).is_file()


def test_the_options_file_is_one() -> None:
    assert read_file(str(DEPLOY / "serve.toml"))["max_running"] == 64


def test_the_unit_gives_a_drain_its_time() -> None:
    unit = RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "engine.service")
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert program.endswith("/bin/engine")
    assert parsed(words).config == "/etc/engine/serve.toml"
    assert int(unit["Service"]["TimeoutStopSec"]) > read_file(str(DEPLOY / "serve.toml"))["drain_seconds"]


def test_the_pod_has_probes_that_exist_and_time_to_drain() -> None:
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments = parsed(container["args"])
    assert pod["terminationGracePeriodSeconds"] > float(arguments.drain_seconds)
    probes = {kind: container[kind]["httpGet"]["path"] for kind in container if kind.endswith("Probe")}
    assert probes == {"startupProbe": "/readyz", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    assert set(probes.values()) <= PATHS
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert arguments.api_key_file.startswith(f"{mounts['keys']}/")
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


SIZES = ("tp", "model", "launcher", "token_file")


def test_the_pods_of_a_set_are_hosts_of_one_engine() -> None:
    made, service = yaml.safe_load_all((DEPLOY / "leaderworkerset.yaml").read_text())
    template = made["spec"]["leaderWorkerTemplate"]
    pods = [template[kind]["spec"] for kind in ("leaderTemplate", "workerTemplate")]
    leader, worker = (parsed(pod["containers"][0]["args"]) for pod in pods)
    assert [getattr(leader, name) for name in SIZES] == [getattr(worker, name) for name in SIZES]
    environ = {"LWS_GROUP_SIZE": str(template["size"]), "LWS_LEADER_ADDRESS": "engine-0.engine"}
    for index, (pod, arguments) in enumerate(zip(pods, (leader, worker), strict=True)):
        given = {name: value for name, value in vars(arguments).items() if name != "run"}
        parallel = resolve(given, {**environ, "LWS_WORKER_INDEX": str(index)}).parallel
        check_hosts(parallel)
        container = pod["containers"][0]
        assert (parallel.nnodes, parallel.node_rank) == (template["size"], index)
        assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == parallel.node_ranks
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert arguments.token_file.startswith(f"{mounts['token']}/")
    container = pods[0]["containers"][0]
    assert meeting(parallel)[1] in {port["containerPort"] for port in container["ports"]}
    assert {container[kind]["httpGet"]["path"] for kind in container if kind.endswith("Probe")} <= PATHS
    assert pods[0]["terminationGracePeriodSeconds"] > float(leader.drain_seconds)
    labels = template["leaderTemplate"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


def test_the_job_starts_one_process_on_each_host() -> None:
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "slurm.sbatch").read_text())
    said = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, flags=re.MULTILINE))
    (command,) = re.findall(r"^srun (.+)$", text, flags=re.MULTILINE)
    program, *words = shlex.split(command)
    assert program.endswith("/bin/engine")
    arguments = parsed(words)
    environ = {
        "SLURM_NNODES": said["nodes"],
        "SLURM_NTASKS": str(int(said["nodes"]) * int(said["ntasks-per-node"])),
        "SLURM_NODEID": "1",
        "SLURM_STEP_NODELIST": "gpu[1-2]",
    }
    parallel = resolve({name: value for name, value in vars(arguments).items() if name != "run"}, environ).parallel
    check_hosts(parallel)
    assert parallel.rendezvous == "gpu1:29400"
    assert parallel.node_ranks == int(said["gpus-per-node"])
    assert float(arguments.drain_seconds) < int(said["signal"].split("@")[1])
