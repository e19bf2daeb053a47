"""What a trace of steps (docs/profiling.md) says of the device: how long it waited between steps, and inside them."""

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


class Waits(Struct, frozen=True):
    """Shares of the time from the first of `steps` decode steps' first kernel to the last one's last."""

    steps: int
    between: float  # from a step's last kernel to the next one's first
    inside: float  # no kernel ran, though some of the step's had and some had not


def waits(path: Path, rows: int) -> Waits:
    """Of decode steps of `rows` rows, which follow each other in the trace `path`. Raises ValueError for too few."""
    with gzip.open(path) as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    steps = sorted((event["ts"], event["name"]) for event in events if event.get("cat") == "user_annotation")
    steps = [(began, match.groups()) for began, name in steps if (match := STEP.match(name))]
    asked = {  # what the CPU asked for, and when; all kernels of a graph have the number of its launch
        event["args"]["correlation"]: event["ts"] for event in events if str(event.get("cat")).startswith("cuda_")
    }
    begins = [began for began, _ in steps]
    ran = defaultdict(list)  # of each step: when its kernels did
    for event in events:
        if event.get("cat") in ON_DEVICE and event["args"]["correlation"] in asked:
            ran[bisect(begins, asked[event["args"]["correlation"]]) - 1].append(
                (event["ts"], event["ts"] + event["dur"])
            )
    decodes = [sorted(ran[number]) for number, (_, name) in enumerate(steps) if name == (str(rows), str(rows))][:-LATE]
    if len(decodes) < 2:
        raise ValueError(f"{path} has {len(decodes)} decode steps of {rows} rows: trace more steps")
    begin, end = [spans[0][0] for spans in decodes], [max(last for _, last in spans) for spans in decodes]
    between = sum(max(0.0, first - last) for first, last in zip(begin[1:], end, strict=False))
    inside = sum(_holes(spans) for spans in decodes)
    whole = end[-1] - begin[0]
    return Waits(len(decodes), between / whole, inside / whole)


def _holes(spans: list[tuple[float, float]]) -> float:
    """Time that lies in none of `spans`, which are in order of their beginnings, but between them."""
    ends = [spans[0][1]]
    for _, last in spans[1:]:
        ends.append(max(ends[-1], last))
    return sum(max(0.0, first - end) for (_, (first, _)), end in zip(pairwise(spans), ends, strict=False))
