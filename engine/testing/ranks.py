"""Ranks as processes of this machine, which have joined and wait for what a test or a benchmark has them do: over gloo
on CPUs, over NCCL on GPUs, one each."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from engine.parallel.mesh import Mesh

SECONDS = 100.0


class Ranks:
    """`run(function, ...)` calls a function of a module with each rank's Groups first, on all ranks at once."""

    def __init__(self, ends: list[Connection]) -> None:
        self._ends = ends

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the ranks return, in their order. Raises AssertionError with what went wrong on one."""
        for end in self._ends:
            end.send((function, arguments))
        answers = []
        for rank, end in enumerate(self._ends):
            assert end.poll(SECONDS), f"rank {rank} has not answered within {SECONDS:.0f} s"
            answers.append(end.recv())
        for rank, (_, failure) in enumerate(answers):
            assert not failure, f"rank {rank} failed:\n{failure}"
        return [result for result, _ in answers]


@contextmanager
def open_ranks(folder: Path, tp: int, pp: int = 1, dp: int = 1, *, ep: int = 1, gpus: bool = False) -> Iterator[Ranks]:
    """Starts tp * pp ranks that meet in `folder`, and ends them. Attention runs in `dp` copies, and experts are divided
    over `ep` groups."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(tp * pp)]
    rendezvous = f"file://{folder / 'rendezvous'}"
    started = [
        context.Process(
            target=_rank, args=(theirs, rendezvous, Mesh(rank, tp=tp, pp=pp, ep=ep, dp=dp), gpus), daemon=True
        )
        for rank, (_, theirs) in enumerate(pairs)
    ]
    for process in started:
        process.start()
    for _, theirs in pairs:
        theirs.close()
    try:
        yield Ranks([ours for ours, _ in pairs])
    finally:
        for ours, _ in pairs:
            ours.close()
        for process in started:
            process.join(SECONDS)
            if process.is_alive():
                process.kill()


def _rank(end: Connection, rendezvous: str, mesh: Mesh, gpus: bool) -> None:
    import torch

    from engine.parallel.groups import join

    torch.set_num_threads(1)
    device = torch.device("cuda", mesh.rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    groups = join(mesh, rendezvous, device, seconds=SECONDS)
    while True:
        try:
            function, arguments = end.recv()
        except (EOFError, ConnectionResetError):
            break
        try:
            end.send((function(groups, *arguments), ""))
        except Exception:
            end.send((None, traceback.format_exc()))
    if not gpus:  # where graphs that hold collectives are left, to take leave may hang
        groups.leave()
    end.close()
    os._exit(0)  # the interpreter would take a second to end
