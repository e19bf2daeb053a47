"""Shortest job first. Not fair: a long prompt waits for as long as shorter ones keep coming."""

from collections.abc import Sequence
from typing import Any


class ShortestFirst:
    """Orders by the tokens still to compute: the prompt's length less what the prefix cache holds."""

    needs_match = True

    def order(self, waiting: Sequence[Any], matched: Sequence[int]) -> list[int]:
        return sorted(range(len(waiting)), key=lambda index: len(waiting[index].ids) - matched[index])
