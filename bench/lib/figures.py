"""How the figures of several turns are told."""

import statistics
from collections.abc import Sequence


def shown(values: Sequence[float], digits: int = 1) -> str:
    """Median (min - max)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"
