"""What a trace of steps (docs/profiling.md) says of the device: how long it waited between steps, and inside them.

python -m bench.lib.traces FILE ROWS
"""

import argparse
import gzip
import json
import re
from bisect import bisect
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from msgspec import Struct

STEP = re.compile(r"step \d+: (\d+) rows, (\d+) tokens")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LATE = 4  # steps at the end that may not have run when the trace was closed


class Span(Struct, frozen=True):
    """What the device did at a time, in microseconds; `asked` is the same for all that one graph does."""

    begin: float
    end: float
    asked: int


class Waits(Struct, frozen=True):
    """Shares of the time from the first of `steps` decode steps' first kernel to the last one's last."""

    steps: int
    between: float  # from a step's last kernel to the next one's first
    launches: float  # inside a step, between what the host asked for separately: copies, graphs, single kernels
    graphs: float  # inside a graph

    def __str__(self) -> str:
        return (
            f"in {self.steps} steps the device waited for {self.between:.2%} of the time between steps, "
            f"{self.launches:.2%} between launches of a step, {self.graphs:.2%} between kernels of a graph"
        )


def waits(path: Path, rows: int) -> Waits:
    """Of decode steps of `rows` rows, which follow each other in the trace `path`. Raises ValueError for too few."""
    with gzip.open(path) as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    named = sorted((event["ts"], event["name"]) for event in events if event.get("cat") == "user_annotation")
    steps = [(began, match.groups()) for began, name in named if (match := STEP.match(name))]
    asked = {event["args"]["correlation"]: event["ts"] for event in events if str(event.get("cat")).startswith("cuda_")}
    begins = [began for began, _ in steps]
    ran = defaultdict(list)  # of each step, by when the host asked for it
    for event in events:
        if event.get("cat") in ON_DEVICE and (number := event["args"]["correlation"]) in asked:
            span = Span(event["ts"], event["ts"] + event["dur"], number)
            ran[bisect(begins, asked[number]) - 1].append(span)
    wanted = [number for number, (_, sizes) in enumerate(steps) if sizes == (str(rows), str(rows))][:-LATE]
    decodes = [sorted(ran[number], key=lambda span: span.begin) for number in wanted if ran[number]]
    if len(decodes) < 2:
        raise ValueError(f"{path} has {len(decodes)} whole decode steps of {rows} rows; trace more of them")
    ends = [max(span.end for span in spans) for spans in decodes]
    whole = ends[-1] - decodes[0][0].begin
    between = sum(max(0.0, spans[0].begin - end) for spans, end in zip(decodes[1:], ends, strict=False))
    launches, graphs = (sum(part) for part in zip(*map(_holes, decodes), strict=True))
    return Waits(len(decodes), between / whole, launches / whole, graphs / whole)


def _holes(spans: list[Span]) -> tuple[float, float]:
    """Time between `spans`, in order of their beginnings, that lies in none: beside launches, and inside of one."""
    holes, end = [0.0, 0.0], spans[0].end
    for before, span in pairwise(spans):
        holes[before.asked == span.asked] += max(0.0, span.begin - end)
        end = max(end, span.end)
    return holes[0], holes[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="….trace.json.gz")
    parser.add_argument("rows", type=int, metavar="ROWS", help="of the decode steps that are looked at")
    given = parser.parse_args()
    print(waits(given.file, given.rows))
