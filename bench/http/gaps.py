"""Times between two tokens of a stream: how they are spread, which are long, and what else went on meanwhile.

    streams   ── wait ──┬── first tokens ──┬──────── steady ────────┬── ends ──|
    a gap is of   `prompts`: a stream of the load waits for its first token during it, so a step of it has a prompt
                  `ends`:    none waits, and one ends
                  `steady`:  neither

The same is said of streams over HTTP and of the offline engine's, so that a ratio compares like with like. A gap of
more than `limit` milliseconds is long. Left out: what the server itself knows of its steps.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from msgspec import Struct

from engine.client.bench.spread import percentile

PARTS = ("prompts", "ends", "steady")
PAGE = 16  # tokens; what happens once a page shows in the index of a token modulo that
KEPT = 40  # moments with long gaps that are told


class Stream(Protocol):
    """One request, in seconds on one clock."""

    sent: float
    pieces: list[float]  # when each token came
    ended: float


class Gap(NamedTuple):
    """Between `token` of a stream, counted from 0, and the one before, which came at `start` seconds."""

    start: float
    ms: float
    token: int
    part: str


class Part(Struct, frozen=True):
    """The gaps of one part: their share of all, the share of them that is long, and percentiles in milliseconds."""

    share: float
    long: float
    p50: float
    p99: float


class Moment(Struct, frozen=True):
    """Long gaps that began within a step: milliseconds since the first of all, how many, and the longest of them."""

    at: float
    gaps: int
    ms: float
    token: int
    part: str


class Gaps(Struct, frozen=True):
    """All gaps of a load, in milliseconds, and the share of long ones. `by_index` has that share by the index of the
    token modulo PAGE; `moments` are those with the most time in long gaps, in order of time."""

    p50: float
    p90: float
    p99: float
    p999: float
    long: float
    parts: dict[str, Part]
    by_index: list[float]
    moments: list[Moment]

    @property
    def steady(self) -> float:
        """The 99th percentile while nobody comes or goes; 0 if there was no such time."""
        return self.parts["steady"].p99 if "steady" in self.parts else 0.0


def gaps_of(streams: Sequence[Stream]) -> list[Gap]:
    """All gaps of a load, in order of time."""
    waits = _joined([(each.sent, each.pieces[0]) for each in streams])
    begins, ends = [begin for begin, _ in waits], sorted(each.ended for each in streams)

    def part(start: float, end: float) -> str:
        last = bisect_left(begins, end) - 1  # the last wait that begins before the gap is over
        if last >= 0 and waits[last][1] > start:
            return "prompts"
        return "ends" if bisect_right(ends, start) < bisect_left(ends, end) else "steady"

    found = []
    for each in streams:
        for token, (start, end) in enumerate(zip(each.pieces, each.pieces[1:], strict=False), start=1):
            found.append(Gap(start, (end - start) * 1e3, token, part(start, end)))
    return sorted(found)


def median_of(gaps: Sequence[Gap]) -> float:
    """Milliseconds; 0 where there are none."""
    return percentile(sorted(gap.ms for gap in gaps), 0.5) if gaps else 0.0


def figures_of(gaps: Sequence[Gap], limit: float) -> Gaps:
    """What is said of `gaps`, which are in order of time."""
    ordered = sorted(gap.ms for gap in gaps) or [0.0]
    by_index = [_long([gap for gap in gaps if gap.token % PAGE == place], limit) for place in range(PAGE)]
    parts = {}
    for name in PARTS:
        if own := [gap for gap in gaps if gap.part == name]:
            times = sorted(gap.ms for gap in own)
            parts[name] = Part(len(own) / len(gaps), _long(own, limit), percentile(times, 0.5), percentile(times, 0.99))
    p50, p90, p99, p999 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99, 0.999))
    return Gaps(p50, p90, p99, p999, _long(gaps, limit), parts, by_index, _moments(gaps, limit, p50 / 2e3))


def _long(gaps: Sequence[Gap], limit: float) -> float:
    return sum(gap.ms > limit for gap in gaps) / max(1, len(gaps))


def _joined(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The times that any of `spans` covers, apart from each other and in order."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def _moments(gaps: Sequence[Gap], limit: float, within: float) -> list[Moment]:
    """The long gaps, those together that began `within` so many seconds."""
    groups: list[list[Gap]] = []
    for gap in gaps:
        if gap.ms > limit:
            if groups and gap.start - groups[-1][0].start <= within:
                groups[-1].append(gap)
            else:
                groups.append([gap])
    began = gaps[0].start if gaps else 0.0
    groups = sorted(sorted(groups, key=lambda group: -sum(gap.ms for gap in group))[:KEPT])
    found = []
    for group in groups:
        longest = max(group, key=lambda gap: gap.ms)
        found.append(Moment((group[0].start - began) * 1e3, len(group), longest.ms, longest.token, longest.part))
    return found
