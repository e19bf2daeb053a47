"""What fronts count, in memory that they share: each adds to a row of its own, and a scrape reads all rows.

    row = statuses [200] | endpoints [32 × (name, a count by reason)] | totals | histograms [counts by bucket …, sum] …

A row is never zeroed: the front that takes the place of a dead one counts on in its row. So what a dead front has
counted stays, but for the times of its last step's tokens (`TokenTimes`), and no counter goes backwards. One cell has
one writer and is 8 bytes, so it is read whole; two cells of one histogram may be an observation apart while their front
observes.
Every front is told the scheduler's totals by heartbeats and keeps them in its row too: a scrape tells the greatest, so
they do not go backwards where a front is behind another, or has heard no heartbeat yet.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from prometheus_client.utils import floatToGoString

from engine.messages.control import Stats

CELL = 8
STATUSES = range(400, 600)
REASONS = ("stop", "length", "abort", "disconnect", "refused", "error")
ENDPOINTS = 32  # names, of which plugins may add some
OTHER = "other"  # where the endpoints beyond those are counted
NAME_CELLS = 5
ENDPOINT_CELLS = NAME_CELLS + len(REASONS)
# Seconds. A step on a fast GPU takes 5 ms, one on a small CPU 100 ms.
TOKEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
MEDIA_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
BUCKETS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "first_token": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120),
        "inter_token": TOKEN_BUCKETS,
        "request": (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600),
        "step": TOKEN_BUCKETS,
        "compile": (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60),
        **{f"media_{stage}": MEDIA_BUCKETS for stage in ("read", "decode", "prepare")},
    }
)
TOTALS = (
    "prompt_tokens_total", "cached_tokens_total", "generated_tokens_total", "retractions_total", "steps",
    "restarts_total", "idle_seconds_total", "pins_released_total", "slices_shown_total", "slices_made_total",
)  # fmt: skip
MEDIA = ("hit", "made", "refused", "bytes", "pixels")
NAMES_AT = len(STATUSES)
TOTALS_AT = NAMES_AT + ENDPOINTS * ENDPOINT_CELLS
CHANGES_AT = TOTALS_AT + len(TOTALS)  # of the counting of experts
MEDIA_AT = CHANGES_AT + 1
HISTOGRAMS_AT = MEDIA_AT + len(MEDIA)
PLACES: Mapping[str, int] = MappingProxyType(
    dict(
        zip(
            BUCKETS,
            accumulate([len(bounds) + 2 for bounds in BUCKETS.values()], initial=HISTOGRAMS_AT),
            strict=False,
        )
    )
)
ROW_BYTES = CELL * (HISTOGRAMS_AT + sum(len(bounds) + 2 for bounds in BUCKETS.values()))


class Histogram:
    """One histogram of a row. An observation costs less than half of the library's, which has locks."""

    __slots__ = ("_bounds", "_counts", "_place", "_sum", "_sums")

    def __init__(self, row: "Row", name: str) -> None:
        self._bounds, self._place = BUCKETS[name], PLACES[name]
        self._counts, self._sums = row.counts, row.sums
        self._sum = self._place + len(self._bounds) + 1

    def observe(self, seconds: float, count: int = 1) -> None:
        """`count` things took `seconds` each."""
        self._counts[self._place + bisect_left(self._bounds, seconds)] += count
        self._sums[self._sum] += seconds * count


class TokenTimes(Histogram):
    """The times between tokens. Those of a step are mostly alike: they are counted once another time comes, or with
    `settle`, which heartbeats do."""

    __slots__ = ("alike", "seconds")

    def __init__(self, row: "Row") -> None:
        super().__init__(row, "inter_token")
        self.seconds = 0.0  # the last time
        self.alike = 0  # tokens of that time, not counted yet

    def observe(self, seconds: float, count: int = 1) -> None:
        """`count` tokens came `seconds` after the one before, each."""
        self.settle()
        self.seconds, self.alike = seconds, count

    def settle(self) -> None:
        """Count what is not counted yet."""
        if self.alike:
            super().observe(self.seconds, self.alike)
            self.alike = 0


class MediaCounts:
    """What a front's store of media says (engine/media/store.py), in its row."""

    def __init__(self, row: "Row") -> None:
        self._row = row
        self._seconds = {stage: Histogram(row, f"media_{stage}") for stage in ("read", "decode", "prepare")}

    def ended(self, result: str) -> None:
        self._row.count_media(result)

    def took(self, stage: str, seconds: float) -> None:
        self._seconds[stage].observe(seconds)

    def read(self, size: int) -> None:
        self._row.count_media("bytes", size)

    def decoded(self, pixels: int) -> None:
        self._row.count_media("pixels", pixels)


class Row:
    """What one front has counted, in `memory` of ROW_BYTES."""

    def __init__(self, memory: memoryview) -> None:
        memory = memory[:ROW_BYTES]
        self.counts, self.sums = memory.cast("q"), memory.cast("d")
        self._memory = memory
        self._endpoints: dict[str, int] = {}

    def count_error(self, status: int) -> None:
        """An error answer with HTTP `status`."""
        self.counts[status - STATUSES.start] += 1

    def count_request(self, endpoint: str, reason: str) -> None:
        """A request to `endpoint` has ended."""
        if (place := self._endpoints.get(endpoint)) is None:
            place = self._endpoints[endpoint] = self._place_of(endpoint)
        self.counts[place + NAME_CELLS + REASONS.index(reason)] += 1

    def keep(self, stats: Stats) -> None:
        """The totals of a heartbeat; as float64, of which integers are whole up to 2^53."""
        for place, name in enumerate(TOTALS, start=TOTALS_AT):
            self.sums[place] = max(self.sums[place], getattr(stats, name))

    def total(self, name: str) -> float:
        """One of TOTALS, as it was kept last."""
        return self.sums[TOTALS_AT + TOTALS.index(name)]

    def note_experts(self) -> None:
        """The counting of experts has begun anew, or ended."""
        self.counts[CHANGES_AT] += 1

    def count_media(self, name: str, by: int = 1) -> None:
        """One of MEDIA has grown."""
        self.counts[MEDIA_AT + MEDIA.index(name)] += by

    def _place_of(self, endpoint: str) -> int:
        """Where the counts of `endpoint` begin, which has a place from now on."""
        name = endpoint.encode()[: NAME_CELLS * CELL]
        for number, (place, taken) in enumerate(self._names(), start=1):
            if taken == name:
                return place
            if not taken:
                name = name if number < ENDPOINTS else OTHER.encode()
                self._memory[place * CELL : place * CELL + len(name)] = name
                return place
        return place  # the last is everybody's

    def _names(self) -> Iterator[tuple[int, bytes]]:
        for number in range(ENDPOINTS):
            place = NAMES_AT + number * ENDPOINT_CELLS
            yield place, bytes(self._memory[place * CELL : (place + NAME_CELLS) * CELL]).rstrip(b"\0")

    def errors(self) -> dict[int, int]:
        """How many error answers there were, by status; of those that there were."""
        counts = self.counts[: len(STATUSES)].tolist()
        return {status: count for status, count in zip(STATUSES, counts, strict=True) if count}

    def requests(self) -> dict[tuple[str, str], int]:
        """How many requests have ended, by endpoint and reason; of those that have."""
        found: dict[tuple[str, str], int] = {}
        for place, name in self._names():
            if not name:
                break
            counts = self.counts[place + NAME_CELLS : place + ENDPOINT_CELLS].tolist()
            named = name.decode(errors="replace")
            found |= {(named, reason): count for reason, count in zip(REASONS, counts, strict=True) if count}
        return found

    def histogram(self, name: str) -> tuple[list[int], float]:
        """The counts by bucket, the last without a bound, and the sum."""
        place, size = PLACES[name], len(BUCKETS[name]) + 1
        return self.counts[place : place + size].tolist(), self.sums[place + size]


class Rows:
    """The rows of all fronts."""

    def __init__(self, memories: Sequence[memoryview]) -> None:
        self._rows = [Row(memory) for memory in memories]

    def errors(self) -> dict[int, int]:
        """As a row's, over all."""
        return _added([row.errors() for row in self._rows])

    def requests(self) -> dict[tuple[str, str], int]:
        """As a row's, over all."""
        return _added([row.requests() for row in self._rows])

    def total(self, name: str, heard: float) -> float:
        """One of TOTALS: what some front was told, or `heard`."""
        greatest = max(heard, *[row.total(name) for row in self._rows])
        return greatest if isinstance(heard, float) else int(greatest)

    def expert_changes(self) -> int:
        """How often the counting of experts has begun anew or ended."""
        return sum(row.counts[CHANGES_AT] for row in self._rows)

    def media(self, name: str) -> int:
        """One of MEDIA, over all."""
        return sum(row.counts[MEDIA_AT + MEDIA.index(name)] for row in self._rows)

    def histogram(self, name: str, combine: Callable[..., Any] = sum) -> tuple[list[tuple[str, float]], float]:
        """The buckets as the text format has them, and the sum. What every front observes is combined by `max`: each
        has seen all but what passed while it was starting, so the greatest of each bucket never goes backwards."""
        read = [row.histogram(name) for row in self._rows]
        counts = [combine(column) for column in zip(*[counts for counts, _ in read], strict=True)]
        bounds = [*map(floatToGoString, BUCKETS[name]), "+Inf"]
        return list(zip(bounds, accumulate(counts), strict=True)), combine([total for _, total in read])


def _added(counts: Sequence[dict[Any, int]]) -> dict[Any, int]:
    """The sum of `counts` for each key."""
    total: dict[Any, int] = {}
    for one in counts:
        for key, count in one.items():
            total[key] = total.get(key, 0) + count
    return dict(sorted(total.items()))
