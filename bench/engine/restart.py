"""Seconds from the death of the device worker to a server that is ready, of one checkout or of two in turn.

    python -m bench.engine.restart [--against DIR] [--kills 7] [--rest 15] [--cost] [--flags "--model echo"]

Servers of the default model run side by side, idle: ours, ours without a spare worker, and that of the checkout DIR,
which has its own .venv. In each round the worker of each is killed in turn, so all meet the same load of the machine.
`--rest` are seconds before each round: after 15 a spare worker has imported all it needs. Medians, the range, and the
median of the ratios of a round. `--cost` shows what the spare takes beside the worker.
"""

import argparse
import shlex
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from bench.lib.served import Served

OURS = "ours"


def measured(servers: dict[str, Served], kills: int, rest: float) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(kills):
        time.sleep(rest)
        for name, server in servers.items():
            seconds[name].append(server.kill_worker())
    return seconds


def show(seconds: dict[str, list[float]]) -> None:
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        print(f"{name:14s} {len(taken):6d} {middle:9.2f}  ({min(taken):.2f} - {max(taken):.2f})", end="")
        if name != OURS:
            ratios = [ours / theirs for ours, theirs in zip(seconds[OURS], taken, strict=True)]
            print(
                f"   {OURS} / {name}: {statistics.median(ratios):.2f}  ({min(ratios):.2f} - {max(ratios):.2f})", end=""
            )
        print(flush=True)


def show_cost(server: Served) -> None:
    """Memory and processor time of worker and spare, by the kernel's count."""
    time.sleep(15)
    for name, pid in [("worker", server.workers[-1]), *(("spare", pid) for pid in server.spares())]:
        sizes = {line.split()[0]: int(line.split()[1]) >> 10 for line in _lines(pid, "smaps_rollup")[1:]}
        ticks = sum(map(int, " ".join(_lines(pid, "stat")).rpartition(")")[2].split()[11:13]))
        print(
            f"{name:8s} {sizes['Rss:']} MiB resident, {sizes['Pss:']} in proportion, "
            f"{sizes['Private_Dirty:']} its own; {ticks / 100:.1f} s of a core"
        )


def _lines(pid: int, file: str) -> list[str]:
    return Path(f"/proc/{pid}/{file}").read_text().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--kills", type=int, default=7)
    parser.add_argument("--rest", type=float, default=15.0)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--flags", default="", help="for both servers")
    options = parser.parse_args()
    flags = shlex.split(options.flags)
    with ExitStack() as stack:
        servers = {OURS: stack.enter_context(Served(*flags))}
        if options.cost:
            show_cost(servers[OURS])
        servers["without spare"] = stack.enter_context(Served(*flags, "--no-spare-worker"))
        if options.against:
            servers["theirs"] = stack.enter_context(Served(*flags, root=options.against.resolve()))
        print("server          kills  median s   (min - max)")
        show(measured(servers, options.kills, options.rest))


if __name__ == "__main__":
    main()
