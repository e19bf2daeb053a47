"""How kernels are timed on a GPU: in a captured graph, over more data than the second-level cache holds."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


def graph_time(call: Callable[[Item], Any], items: Sequence[Item], calls: int = 8, replays: int = 15) -> float:
    """Microseconds of one call, in a graph of calls with all of `items` in turn, `calls` of them or more: the median of
    many replays."""
    for item in items:
        call(item)
    torch.cuda.synchronize()
    count = max(1, calls // len(items)) * len(items)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            call(items[index % len(items)])
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / count)
    return statistics.median(times)
