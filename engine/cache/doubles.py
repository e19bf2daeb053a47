"""Pages of the host that the device has, too, in the order in which they give way. Pure.

    fresh ──a look takes the one used last──> it gives way
      ^                 │ it is pinned ──unpinned──> back ──> taken like fresh ones, by when it was used
      │ used            │ it is awaited by a store
      └── any           └──────────────────────> awaited ──> gives way after all others, the one used last first

A look steps over a pinned page, or one that a store is still to be given, once for each time that it is so, and not
again at the next look, however far a disk lags. A page stops being awaited only when it is pinned, for the store, or
forgotten: so it comes back. Left out: pages that the device has no more (host.py).
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from itertools import count

from engine.cache.place import Place

SPENT = 64  # entries beside two for each page aside: beyond that, entries of pages that have left are dropped


class Doubles:
    """Places whose `double` is set."""

    def __init__(self) -> None:
        self._times = count(1)
        self._fresh: OrderedDict[bytes, Place] = OrderedDict()  # by name, the one used last is last
        self._aside: dict[int, Place] = {}  # the rest, by `used`
        self._back: list[int] = []  # heaps of -used, of these
        self._awaited: list[int] = []

    def __len__(self) -> int:
        return len(self._fresh) + len(self._aside)

    def add(self, place: Place) -> None:
        """It is used now."""
        place.used = next(self._times)
        self._fresh[place.name] = place

    def use(self, places: Iterable[Place]) -> None:
        """They are used once more, one after the other."""
        fresh, times = self._fresh, self._times
        for place in places:
            if place.name in fresh:
                place.used = next(times)
                fresh.move_to_end(place.name)
            else:
                del self._aside[place.used]
                self.add(place)

    def remove(self, place: Place) -> None:
        """It is no double any more. One that has given way is not here already."""
        if self._fresh.pop(place.name, None) is None:
            self._aside.pop(place.used, None)

    def unpinned(self, place: Place) -> None:
        """It may give way from now on."""
        if place.used not in self._aside:
            return  # no look has stepped over it
        heappush(self._back, -place.used)
        if len(self._back) + len(self._awaited) > 2 * len(self._aside) + SPENT:
            self._back = sorted(-used for used, each in self._aside.items() if not each.pins)
            self._awaited = []

    def victims(self, *, spare: bool) -> Iterator[Place]:
        """What gives way, without those that are awaited if `spare`. They are doubles no more, and to be forgotten."""
        while self._fresh or self._back:
            if (place := self._take()) is None:
                continue
            if not (place.pins or place.awaited):
                yield place
                continue
            self._aside[place.used] = place
            if not place.pins:
                heappush(self._awaited, -place.used)
        while self._awaited and not spare:
            place = self._aside.get(-heappop(self._awaited))
            if place is not None and place.awaited and not place.pins:
                del self._aside[place.used]
                yield place

    def _take(self) -> Place | None:
        """Take the page out that was used last of fresh ones and those that are back; None for one that has left."""
        fresh, back = self._fresh, self._back
        if back and (not fresh or -back[0] > fresh[next(reversed(fresh))].used):
            return self._aside.pop(-heappop(back), None)
        return fresh.popitem()[1]

    def check_integrity(self) -> None:
        """Assert that each page that may give way would be found."""
        back, awaited = set(self._back), set(self._awaited)
        for name, place in self._fresh.items():
            assert place.double and place.name == name and place.used not in self._aside
        for used, place in self._aside.items():
            found = place.pins or -used in back or (place.awaited and -used in awaited)
            assert place.double and place.used == used and found, "a double would never give way"
