"""Shortest job first. Not fair: a long prompt waits for as long as shorter ones keep coming."""

from collections.abc import Sequence

from engine.plugin import Waiting


class ShortestFirst:
    """Orders by the tokens still to compute: the prompt's length less what the prefix cache holds."""

    needs_match = True

    def order(self, waiting: Sequence[Waiting], matched: Sequence[int]) -> list[int]:
        return sorted(range(len(waiting)), key=lambda index: waiting[index].length - matched[index])
