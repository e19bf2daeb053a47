"""Two orders of the waiting queue. The scheduler itself puts higher priority first, before either."""

from collections.abc import Sequence

from engine.plugin import Waiting


class FirstComeFirstServed:
    """As they came."""

    needs_match = False

    def order(self, waiting: Sequence[Waiting], matched: Sequence[int]) -> list[int]:
        return list(range(len(waiting)))


class LongestPrefixMatch:
    """The request with the most cached tokens first; equals as they came (SGLang, arXiv:2312.07104).

    A request with no cached prefix can wait for as long as others with one keep arriving."""

    needs_match = True

    def order(self, waiting: Sequence[Waiting], matched: Sequence[int]) -> list[int]:
        return sorted(range(len(waiting)), key=lambda index: -matched[index])
