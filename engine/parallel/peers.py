"""Sums over the GPUs of one host by a kernel of our own where that is faster than NCCL, and by NCCL where it is not.

    bytes of a sum     ─> by words   a few rows: one trip over the link (kernels/collectives/exchange.py)
                       ─> by rows    larger
                       ─> NCCL       what is larger than the inboxes, and where it is faster

Which of them sums how many bytes is measured when the ranks start, in CUDA graphs as steps are, and agreed on: all
ranks take the slowest rank's times, so that all choose alike. The memory is torch's symmetric memory, over which peers
write to each other without multicast. Left out: ranks of several hosts, which NCCL alone joins.
"""

import logging
import os
import socket
import statistics
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.kernels import has_triton
from engine.kernels.dense.reference import Ops
from engine.parallel.collectives import Group

if TYPE_CHECKING:
    from engine.kernels.collectives.exchange import Inboxes

logger = logging.getLogger("engine.worker")

SMALL_BYTES = 4 << 20  # of a part, at most, that is sent by words
LARGE_BYTES = 256 << 20  # of a rank's inboxes for what is sent by rows
ROWS = (1, 16, 64, 256, 1024, 4096, 8192)  # that are measured, and as many as the largest step has
STARTING = 1 << 28  # looks that a rank takes while others may still compile: minutes
SERVING_SECONDS = 8.0  # that it looks after that
TRIAL = 20_000  # looks, to see how long one takes


@dataclass(frozen=True, slots=True)
class Border:
    """A sum of up to so many bytes a rank goes this `way`, by its place among the ways; None is NCCL."""

    most: int
    way: int | None


class PeerMemory:
    """The inboxes of the ranks of one group, and when they are used: the Peers of it."""

    def __init__(self, ways: Sequence["Inboxes"], held: object) -> None:
        """`held` are what the addresses of the inboxes lie in: unmapped when they are dropped."""
        self._held = held
        self.ways = tuple(ways)
        self._control, self._failed = ways[0].control, ways[0].failed
        self.borders: tuple[Border, ...] = ()
        self._look = 1e-6  # seconds, until it is measured

    def _way(self, part: Tensor) -> "Inboxes | None":
        size = part.numel() * part.element_size()
        for border in self.borders:
            if size <= border.most:
                way = None if border.way is None else self.ways[border.way]
                return way if way is not None and way.takes(part) else None
        return None

    def sum(self, part: Tensor) -> bool:
        if (way := self._way(part)) is None:
            return False
        way.exchange(part)
        return True

    def sum_add_norm(self, part: Tensor, stream: Tensor, weight: Tensor, epsilon: float) -> bool:
        way = self._way(part)
        if way is None or not stream.is_contiguous() or stream.dtype != part.dtype:
            return False
        way.exchange(part, stream, weight, epsilon)
        return True

    def choose(
        self, found: tuple[Tensor, Tensor], slots: Tensor, lasts: Tensor, tokens: Tensor, lengths: Tensor
    ) -> Tensor | None:
        from engine.kernels.collectives.draw import choose_over_ranks

        by_words = self.ways[0]
        if len(found[0]) > by_words.boxes[0].shape[2]:
            return None
        return choose_over_ranks(by_words, found, slots, lasts, tokens, lengths)

    def started(self, seconds: float = SERVING_SECONDS) -> None:
        self._control.fill_(min(STARTING, int(seconds / self._look)))

    def check(self, ranks: Sequence[int]) -> None:
        if found := int(self._failed):
            own, other = ranks[self.ways[0].place], ranks[found - 1]
            raise EngineError(
                f"rank {own} waited in vain for rank {other} in a sum over the ranks; rank {other} has stopped, or "
                "runs other steps"
            )

    def measure(self, group: Group, width: int, rows: int, dtype: torch.dtype, ops: Ops) -> str:
        """Sets `borders` by what sums of `width` columns take on this machine; what was found, for the log."""
        device = self._control.device
        sizes = sorted({min(each, rows) for each in ROWS})
        kind = {"dtype": dtype, "device": device}
        part, stream = torch.zeros(rows, width, **kind), torch.zeros(rows, width, **kind)  # type: ignore[call-overload]
        weight = torch.ones(width, **kind)  # type: ignore[call-overload]
        times = torch.full((len(sizes), 1 + len(self.ways)), float("inf"), device=device)
        for line, count in enumerate(sizes):
            own = part[:count], stream[:count], weight, 1e-6
            calls: list[Callable[[], object] | None] = [partial(sum_by_nccl, group, ops, *own)]
            calls += [partial(way.exchange, *own) if way.takes(own[0]) else None for way in self.ways]
            for column, call in enumerate(calls):
                if call is not None:
                    times[line, column] = graph_time(call)
        agreed = _slowest(times, group).tolist()
        best = [min(range(len(line)), key=line.__getitem__) for line in agreed]
        row_bytes = part[:1].nbytes
        self.borders = tuple(
            Border(count * row_bytes, None if way == 0 else way - 1) for count, way in zip(sizes, best, strict=True)
        )
        self.check(group.ranks)
        self._look = self._time_a_look(part[:1])
        names = ("NCCL", "words", "rows")
        return ", ".join(f"{count} rows {names[way]} {line[way]:.1f} us (NCCL {line[0]:.1f})"
                         for count, way, line in zip(sizes, best, agreed, strict=True))  # fmt: skip

    def _time_a_look(self, part: Tensor) -> float:
        """Seconds of a look for what has not come. All ranks wait in vain here, so that all count as many exchanges."""
        for _ in range(2):  # the first one compiles
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._control.fill_(TRIAL)
            began.record()
            self.ways[0].exchange(part, sends=False)
            ended.record()
            ended.synchronize()
            self._failed.zero_()
        self._control.fill_(STARTING)
        return began.elapsed_time(ended) / 1e3 / TRIAL


def join_peers(group: Group, device: torch.device, *, width: int, rows: int, dtype: torch.dtype) -> PeerMemory | None:
    """Memory for sums of up to `rows` rows of `width` numbers over the ranks of `group`, all of which call this. None
    where they cannot write to each other's memory. It sums nothing before it has been measured."""
    from engine.kernels.collectives.exchange import KINDS

    if dtype not in KINDS or not has_triton() or not _on_one_host(group, device):
        return None
    return _opened(group, device, words=width * dtype.itemsize // 4, rows=rows)


def _opened(group: Group, device: torch.device, *, words: int, rows: int) -> PeerMemory:
    """The inboxes by words, then those by rows, in one piece of memory that is zero."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    import torch.distributed as distributed
    import torch.distributed._symmetric_memory as symmetric

    from engine.kernels.collectives.exchange import Inboxes

    ranks, others = group.size, group.size - 1
    few = max(1, min(rows, SMALL_BYTES // (4 * words)))
    many = max(1, min(rows, LARGE_BYTES // (2 * others * 4 * words)))
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((2, others, few, words), torch.int64)]
    shapes += [((2, others, many, words), torch.int32), ((2, others, many), torch.int32)]
    places, total = [], 0
    for shape, kind in shapes:
        places.append(total)
        total += -(-torch.Size(shape).numel() * kind.itemsize // 256) * 256
    memory = symmetric.empty(total, dtype=torch.uint8, device=device)
    memory.zero_()
    handle = symmetric.rendezvous(memory, group.joined())
    distributed.all_reduce(torch.zeros(1, device=device), group=group.joined())  # all are zero before any is written
    torch.cuda.synchronize(device)

    def of_all(index: int) -> tuple[Tensor, ...]:
        (shape, kind), place = shapes[index], places[index]
        return tuple(handle.get_buffer(rank, shape, kind, place // kind.itemsize) for rank in range(ranks))

    control = torch.full((1,), STARTING, dtype=torch.int32, device=device)
    failed = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    made = []
    for boxes, count in ((of_all(0), few), (of_all(1), many)):
        epochs = torch.zeros(count, dtype=torch.int32, device=device)
        made.append(
            Inboxes(place=group.place, boxes=boxes, flags=of_all(2), epochs=epochs, control=control, failed=failed)
        )
    return PeerMemory(made, (memory, handle))


def _on_one_host(group: Group, device: torch.device) -> bool:
    """Whether the ranks are of one host, and each GPU can reach the others. All ranks say the same."""
    import torch.distributed as distributed

    own = device.index or 0
    near = all(
        torch.cuda.can_device_access_peer(own, other) for other in range(torch.cuda.device_count()) if other != own
    )
    mine = torch.tensor([zlib.crc32(socket.gethostname().encode()), int(near)], device=device)
    all_of_them = [torch.empty_like(mine) for _ in range(group.size)]
    distributed.all_gather(all_of_them, mine, group=group.joined())
    hosts, reaches = torch.stack(all_of_them).T.tolist()
    return len(set(hosts)) == 1 and all(reaches)


def sum_by_nccl(group: Group, ops: Ops, part: Tensor, stream: Tensor, weight: Tensor, epsilon: float) -> None:
    """As an exchange, by NCCL and the norm's own kernel."""
    import torch.distributed as distributed

    distributed.all_reduce(part, group=group.joined())
    ops.add_rms_norm(part, stream, weight, epsilon)


def _slowest(times: Tensor, group: Group) -> Tensor:
    import torch.distributed as distributed

    distributed.all_reduce(times, op=distributed.ReduceOp.MAX, group=group.joined())
    return times


def graph_time(call: Callable[[], object], calls: int = 8, replays: int = 5) -> float:
    """Microseconds of one call in a CUDA graph of `calls`, the median of `replays`. A capture does not mind what NCCL's
    own threads ask the device meanwhile."""
    call()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(calls):
            call()
        graph.capture_end()
    times = []
    for _ in range(2 + replays):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(1e3 * began.elapsed_time(ended) / calls)
    return statistics.median(times[2:])
