"""What started this process, if it starts one on each host, and what its variables say of the hosts.

torchrun, Slurm's srun and a LeaderWorkerSet of Kubernetes each tell a process which host of how many it is on, and
where the first is. They are read only where `--launcher` names one: a job's variables are also there where each host
is to have a server of its own. Left out: launchers of one process a device, as the engine starts those itself.
"""

from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError

PORT = "29400"  # where a launcher names none


def said_by_launcher(launcher: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """`nnodes`, `node_rank` and `rendezvous`. Raises ConfigError where the launcher's variables are not there."""
    match launcher:
        case "torchrun":
            return _torchrun(environ)
        case "slurm":
            return _slurm(environ)
        case "lws":
            address = _text(environ, "LWS_LEADER_ADDRESS", launcher)
            return _said(
                _number(environ, "LWS_GROUP_SIZE", launcher),
                _number(environ, "LWS_WORKER_INDEX", launcher),
                f"{address}:{PORT}",
            )
    return {}


def _torchrun(environ: Mapping[str, str]) -> dict[str, Any]:
    """torchrun's own store has MASTER_PORT, so we take the next."""
    processes = _number(environ, "LOCAL_WORLD_SIZE", "torchrun")
    _one_a_host(processes, "torchrun", "--nproc-per-node 1")
    world = _number(environ, "WORLD_SIZE", "torchrun")
    port = _number(environ, "MASTER_PORT", "torchrun") + 1
    address = _text(environ, "MASTER_ADDR", "torchrun")
    return _said(world, _number(environ, "GROUP_RANK", "torchrun"), f"{address}:{port}")


def _slurm(environ: Mapping[str, str]) -> dict[str, Any]:
    nodes = _number(environ, "SLURM_NNODES", "slurm")
    if "SLURM_NTASKS" in environ:
        tasks = _number(environ, "SLURM_NTASKS", "slurm")
        _one_a_host(-(-tasks // nodes), "slurm", "--ntasks-per-node 1")
    listed = environ.get("SLURM_STEP_NODELIST") or _text(environ, "SLURM_JOB_NODELIST", "slurm")
    address, port = environ.get("MASTER_ADDR") or first_host(listed), environ.get("MASTER_PORT", PORT)
    return _said(nodes, _number(environ, "SLURM_NODEID", "slurm"), f"{address}:{port}")


def first_host(listed: str) -> str:
    """The first of Slurm's list of hosts: of "gpu[003-005,9],other" gpu003."""
    before, bracket, rest = listed.partition("[")
    if "," in before or not bracket:
        return before.split(",")[0]
    numbers, _, after = rest.partition("]")
    return before + numbers.split(",")[0].split("-")[0] + after.split(",")[0]


def _said(nodes: int, node: int, rendezvous: str) -> dict[str, Any]:
    return {"nnodes": nodes, "node_rank": node, "rendezvous": rendezvous}


def _one_a_host(processes: int, launcher: str, remedy: str) -> None:
    if processes > 1:
        raise ConfigError(
            f"--launcher {launcher}: it has started {processes} processes on a host, and the engine starts its own "
            f"workers: say {remedy}"
        )


def _text(environ: Mapping[str, str], name: str, launcher: str) -> str:
    if not (value := environ.get(name, "")):
        raise ConfigError(f"--launcher {launcher}, but the environment has no {name}: is it started by that?")
    return value


def _number(environ: Mapping[str, str], name: str, launcher: str) -> int:
    value = _text(environ, name, launcher)
    if not value.isdecimal():
        raise ConfigError(f"--launcher {launcher}: {name} is {value!r}, and should be a number")
    return int(value)
