"""A distribution in a few figures."""

import statistics
from collections.abc import Sequence

from msgspec import Struct


class Spread(Struct, frozen=True):
    mean: float
    p50: float
    p90: float
    p99: float
    min: float
    max: float


def spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    p50, p90, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
    return Spread(statistics.fmean(ordered), p50, p90, p99, ordered[0], ordered[-1])


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of `ordered` does not exceed, between two neighbours in proportion."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
