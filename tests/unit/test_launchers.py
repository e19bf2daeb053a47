"""What torchrun, Slurm and a LeaderWorkerSet say of the hosts, and what overrules them."""

import pytest

from engine.config import resolve
from engine.errors import ConfigError
from engine.options.launchers import first_host

TORCHRUN = {
    "GROUP_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "29500",
}
SLURM = {"SLURM_NODEID": "3", "SLURM_NNODES": "4", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "gpu[07-10]"}
LWS = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "engine-0.engine.default"}


@pytest.mark.parametrize(
    ("launcher", "environ", "said"),
    [
        ("torchrun", TORCHRUN, (2, 1, "gpu1:29501")),
        ("slurm", SLURM, (4, 3, "gpu07:29400")),
        ("slurm", {**SLURM, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "5000"}, (4, 3, "10.0.0.7:5000")),
        ("lws", LWS, (2, 1, "engine-0.engine.default:29400")),
    ],
)
def test_a_launcher_says_which_host_of_how_many(
    launcher: str, environ: dict[str, str], said: tuple[int, int, str]
) -> None:
    parallel = resolve({"launcher": launcher, "tp": 4}, environ).parallel
    assert (parallel.nnodes, parallel.node_rank, parallel.rendezvous) == said
    assert resolve({"tp": 4}, environ).parallel.nnodes == 1  # nobody has asked for it


def test_flags_and_the_environment_overrule_a_launcher() -> None:
    environ = {**SLURM, "ENGINE_LAUNCHER": "slurm", "ENGINE_NODE_RANK": "1"}
    parallel = resolve({"rendezvous": "other:1"}, environ).parallel
    assert (parallel.nnodes, parallel.node_rank, parallel.rendezvous) == (4, 1, "other:1")


@pytest.mark.parametrize(
    ("launcher", "environ", "cause"),
    [
        ("lws", {}, "the environment has no LWS_LEADER_ADDRESS"),
        ("torchrun", {**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, "8 processes on a host.*--nproc-per-node 1"),
        ("slurm", {**SLURM, "SLURM_NTASKS": "32"}, "8 processes on a host.*--ntasks-per-node 1"),
        ("slurm", {**SLURM, "SLURM_NODEID": "x"}, "SLURM_NODEID is 'x', and should be a number"),
    ],
)
def test_what_a_launcher_does_not_say_is_named(launcher: str, environ: dict[str, str], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        resolve({"launcher": launcher}, environ)


@pytest.mark.parametrize(
    ("listed", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-005,9],other", "gpu003"),
        ("a,gpu[1-2]", "a"),
        ("rack[2]-gpu,x", "rack2-gpu"),
    ],
)
def test_the_first_of_slurms_hosts(listed: str, first: str) -> None:
    assert first_host(listed) == first
