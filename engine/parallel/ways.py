"""By which way tokens reach the experts of other ranks, for steps of how many: plain integers, no torch.

    gather   every rank gets all tokens, and adds what its experts make of them      all-gather, reduce-scatter
    places   each token goes where its experts are, to a place that it has anyway    all-to-all of fixed size
    counts   the same without padding, after ranks have told each other how many     all-to-all, the host waits

Every rank knows from the plan how many tokens the others have at most, and has the same table. So all take one way, and
nobody asks. A captured step cannot go by counts, as its host is not there. Left out: how the table comes about
(engine/worker/ways.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Way = Literal["gather", "places", "counts"]
WAYS: tuple[Way, ...] = ("gather", "places", "counts")
CAPTURED: tuple[Way, ...] = ("gather", "places")


@dataclass(frozen=True, slots=True)
class Ways:
    """Steps of up to `sizes[i]` tokens of a rank go by `captured[i]` if they are captured, by `others[i]` if not;
    larger ones as the last."""

    sizes: tuple[int, ...]
    captured: tuple[Way, ...]
    others: tuple[Way, ...]

    @classmethod
    def always(cls, way: Way) -> "Ways":
        """That one; in captured steps by fixed places where it is by counts."""
        return cls((1,), ("places" if way == "counts" else way,), (way,))

    @classmethod
    def fastest(cls, sizes: Sequence[int], times: Sequence[Sequence[float]]) -> "Ways":
        """By what steps of each size took, in the order of `WAYS`."""

        def best(ways: tuple[Way, ...]) -> tuple[Way, ...]:
            return tuple(min(ways, key=lambda way: line[WAYS.index(way)]) for line in times)

        return cls(tuple(sizes), best(CAPTURED), best(WAYS))

    def choose(self, tokens: int, *, captured: bool) -> Way:
        """The way of a step in which no rank has more than `tokens`."""
        index = next((place for place, size in enumerate(self.sizes) if tokens <= size), len(self.sizes) - 1)
        return (self.captured if captured else self.others)[index]

    def __str__(self) -> str:
        """As people read it: gather up to 64 tokens a rank, places beyond; not captured: …"""
        captured, others = (_told(self.sizes, ways) for ways in (self.captured, self.others))
        return captured if captured == others else f"{captured}; steps that are not captured: {others}"


def _told(sizes: tuple[int, ...], ways: tuple[Way, ...]) -> str:
    """Neighbours that are alike are told once."""
    parts: list[str] = []
    for place, way in enumerate(ways):
        if place + 1 == len(ways):
            parts.append(way if not parts else f"{way} beyond")
        elif ways[place + 1] != way:
            parts.append(f"{way} up to {sizes[place]} tokens a rank")
    return ", ".join(parts)
