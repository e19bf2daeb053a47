"""What tiers know of the pages that the device's tree has: their names, and which of them give way next. Pure.

    remember ──> in use, or idle ──leave──> cold, and what lacks a place in the host goes down ──forget──> gone
                        ^──────used──────────┘

The host thinks of a page as its double until it is cold: then nothing is to be done when the device needs its room.
Left out: the tree's own order, and the moves (tiers.py).
"""

from collections.abc import Iterable, Sequence
from itertools import takewhile

from engine.cache.host import HostPages
from engine.cache.place import Place
from engine.cache.tickets import WritePolicy


class DevicePages:
    """Those above `host`."""

    def __init__(self, host: HostPages, policy: WritePolicy) -> None:
        self.cold: set[int] = set()
        self._host = host
        self._policy = policy
        self._known: dict[int, tuple[int, bytes]] = {}  # the indices of pages in their texts, and their names
        self._again: set[int] = set()  # those that were asked for again

    def __len__(self) -> int:
        """Those that have a name."""
        return len(self._known)

    def remember(self, names: Sequence[bytes], first: int, pages: Sequence[int]) -> None:
        """The tree now has `pages`, the ones from index `first` on of a text whose pages have these names."""
        end = first + len(pages)
        self._known.update(zip(pages, enumerate(names[first:end], first), strict=True))
        self.cold.difference_update(pages)
        self._host.held(reversed(names[first:end]))

    def forget(self, pages: Sequence[int]) -> None:
        """The tree has these no more."""
        gone = [(page, known[1]) for page in pages if (known := self._known.pop(page, None)) is not None]
        self._host.left([name for page, name in gone if page not in self.cold])
        self._again.difference_update(pages)
        self.cold.difference_update(pages)

    def clear(self) -> None:
        """Nothing is known of any page. The host is cleared, too."""
        self._known.clear()
        self._again.clear()
        self.cold.clear()

    def named(self, pages: Iterable[int]) -> list[bytes]:
        """The names of pages that begin a text, up to the first whose name is not known."""
        known = self._known
        return [known[page][1] for page in takewhile(known.__contains__, pages)]

    def used(self, names: Sequence[bytes], pages: Sequence[int]) -> None:
        """These, which begin a text, are about to be used: they do not give way next."""
        if not self.cold:
            return
        cold = [(name, page) for name, page in zip(names, pages, strict=False) if page in self.cold]
        self.cold.difference_update(page for _, page in cold)
        self._host.held(name for name, page in reversed(cold) if page in self._known)

    def again(self, names: Sequence[bytes], pages: Sequence[int]) -> None:
        """These, which begin a text, are asked for again, or somebody may come back to them."""
        self._host.touch(reversed(names[: len(pages)]))
        self._again.update(pages)

    def leave(self, pages: Sequence[int], *, spare: bool = False) -> tuple[dict[int, Place], int]:
        """These give way now, or next, and are cold from now on: the new places of those that go down for that, and for
        how many there is none. A page goes down that has no place, and is worth one by the policy.

        The first pages of a text are worth most, so they get places first. Where these are to be `spare`, pages without
        one stay as they are, and the last come first, as the tree gives these away first."""
        host, known, cold = self._host, self._known, self.cold
        found = sorted([page for page in pages if page in known and page not in cold], key=known.__getitem__)
        named, held = [(known[page][1], page) for page in found], host.names
        lacking = {name: page for name, page in named if name not in held}
        if self._policy == "second-hit":
            lacking = {name: page for name, page in lacking.items() if page in self._again}
        host.left([name for name, _ in reversed(named) if name not in lacking])  # else they give way for others
        placed: dict[int, Place] = {}
        for hit in (not spare, spare) if lacking else ():
            names = [name for name, page in lacking.items() if (page in self._again) == hit]
            places = host.add(names[::-1] if spare else names, hit=hit, spare=spare)
            placed.update((lacking[place.name], place) for place in places)
            if len(places) < len(names):
                break  # there is no room for the others either
        refused = len(lacking) - len(placed)
        stay = set(lacking.values()).difference(placed) if spare else set[int]()
        host.left([name for name, page in reversed(lacking.items()) if page not in stay])
        cold.update(pages)
        cold -= stay
        return placed, refused

    def check_integrity(self, pages: Iterable[int]) -> None:
        """Assert that these `pages`, which are the tree's, are what the host takes for its doubles."""
        held = set(pages)
        assert self._known.keys() <= held, "a page has a name that is not in the tree"
        assert self._again <= held, "a page was asked for again that is not in the tree"
        assert self.cold <= held, "a page gives way next that is not in the tree"
        warm = [name for page, (_, name) in self._known.items() if page not in self.cold]
        assert len(set(warm)) == len(warm), "two pages have one name"
        assert self._host.above == set(warm), "the host takes other pages for doubles than the device has"
