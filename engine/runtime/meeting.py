"""Where the hosts of one engine meet, and whether their numbers go together.

Left out: what else hosts must have alike (alike.py).
"""

from engine.errors import ConfigError
from engine.options.parallel import ParallelOptions


def check_hosts(parallel: ParallelOptions) -> None:
    """Raises ConfigError for numbers of ranks and hosts that do not go together."""
    parallel.mesh()
    nodes, node = parallel.nnodes, parallel.node_rank
    if node >= nodes:
        raise ConfigError(f"--node-rank {node} is none of --nnodes {nodes}: they are 0 to {nodes - 1}")
    if parallel.ranks % nodes:
        raise ConfigError(
            f"{parallel.ranks} ranks do not divide over {nodes} hosts; choose a --tp that --nnodes {nodes} divides"
        )
    if nodes > 1:
        meeting(parallel)


def meeting(parallel: ParallelOptions) -> tuple[str, int]:
    """Host and port of --rendezvous. Raises ConfigError where it has none."""
    if parallel.rendezvous is None:
        raise ConfigError(f"--nnodes {parallel.nnodes} needs --rendezvous host:port, the same on all hosts")
    host, colon, port = parallel.rendezvous.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"--rendezvous is {parallel.rendezvous!r}, but takes host:port with a port from 1 to 65535")
    return host, int(port)
