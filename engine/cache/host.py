"""Which page lies where in the host's memory: a page pool, names, and what has to give way. Pure.

    hit        pages that were asked for again; at most three quarters of all
    new        the rest: each page begins here           <── what gives way first, the least recently used

A page that nobody asks for a second time passes through the new ones, so a scan of long texts, however long, pushes out
nothing that was asked for twice. Of those the least recently used become new again where they are too many. That is a
segmented LRU (Karedla et al. 1994). Of one text the later pages give way before the earlier ones, which they are worth
nothing without.
"""

from collections import OrderedDict
from collections.abc import Iterable, KeysView, Sequence
from dataclasses import dataclass

from engine.cache.pool import PagePool

FREE, NEW, HIT = range(3)  # what a slot holds


@dataclass(slots=True, eq=False)
class Place:
    """A page's place in the host's memory. `pins` are the moves under way that read or write it."""

    name: bytes
    slot: int
    pins: int = 1
    there: bool = False  # its bytes are
    hit: bool = False
    stored: bool = False  # a store has it, or is given it now
    offers: int = 0  # to a store, which has refused it
    fetched: bool = False  # a store has given it
    known: bool = True  # under its name; one that is not is freed with its last pin


class HostPages:
    """The places of `size` pages."""

    def __init__(self, size: int) -> None:
        self.pool = PagePool(size)
        self._kinds = bytearray(size)  # of the slots: free, new or hit
        self._most_hit = size - -(-size // 4)
        self._places: dict[bytes, Place] = {}
        self._new: OrderedDict[bytes, Place] = OrderedDict()  # least recently used first
        self._hit: OrderedDict[bytes, Place] = OrderedDict()
        self._forgotten: set[Place] = set()  # of those that are pinned

    def __len__(self) -> int:
        return len(self._places)

    @property
    def names(self) -> KeysView[bytes]:
        """Those of all pages that have a place."""
        return self._places.keys()

    @property
    def kinds(self) -> bytes:
        """By slot: 0 free, 1 a new page, 2 one that was asked for again."""
        return bytes(self._kinds)

    def get(self, name: bytes) -> Place | None:
        """The place of a page, whether it is there yet or on its way."""
        return self._places.get(name)

    def run(self, names: Sequence[bytes], first: int, end: int) -> int:
        """How many of the pages names[first:end] are there, up to the first that is not."""
        places = self._places
        for index in range(first, end):
            place = places.get(names[index])
            if place is None or not place.there:
                return index - first
        return max(0, end - first)

    def add(self, names: Sequence[bytes], *, hit: bool = False) -> list[Place]:
        """Pinned places for as many of these pages as there is room for, the first of them first; `hit`: a store had
        them, and they are asked for again."""
        while self.pool.free_pages < len(names) and (victim := self._victim(hit)) is not None:
            self.forget(victim)
        slots = self.pool.take(min(len(names), self.pool.free_pages))
        assert slots is not None
        places = [Place(name, slot) for name, slot in zip(names, slots, strict=False)]
        named = {place.name: place for place in reversed(places)}
        assert self._places.keys().isdisjoint(named), "a page gets a second place"
        self._places.update(named)
        self._new.update(named)
        for place in places:
            self._kinds[place.slot] = NEW
        if hit:
            self.touch([place.name for place in reversed(places)], hit=True)
        return places

    def _victim(self, hit: bool) -> Place | None:
        """What gives way: for a new page another new one, for one that is asked for again also such a one."""
        for segment in (self._new, self._hit) if hit else (self._new,):
            for place in segment.values():
                if not place.pins:
                    return place
        return None

    def touch(self, names: Iterable[bytes], *, hit: bool) -> None:
        """These pages, given from the last to the first, were used just now; `hit`: asked for again."""
        for name in names:
            place = self._places.get(name)
            if place is None:
                continue
            if place.hit:
                self._hit.move_to_end(name)
            elif hit:
                del self._new[name]
                self._hit[name] = place
                place.hit = True
                self._kinds[place.slot] = HIT
            else:
                self._new.move_to_end(name)
        while len(self._hit) > self._most_hit:
            name, place = self._hit.popitem(last=False)
            self._new[name] = place
            place.hit = False
            self._kinds[place.slot] = NEW

    def forget(self, place: Place) -> None:
        """Its name leads here no more; its slot is free as soon as nothing moves there."""
        if not place.known:
            return
        place.known = False
        del self._places[place.name]
        del (self._hit if place.hit else self._new)[place.name]
        if place.pins:
            self._forgotten.add(place)
        else:
            self._free(place)

    def unpin(self, places: Iterable[Place]) -> None:
        """One move in these places is over."""
        for place in places:
            place.pins -= 1
            assert place.pins >= 0, "a place is unpinned more often than pinned"
            if not place.known and not place.pins:
                self._forgotten.remove(place)
                self._free(place)

    def _free(self, place: Place) -> None:
        self._kinds[place.slot] = FREE
        self.pool.give([place.slot])

    def clear(self) -> None:
        """Forget all pages."""
        for place in list(self._places.values()):
            self.forget(place)

    def places(self) -> list[Place]:
        """All that are not free."""
        return [*self._places.values(), *self._forgotten]

    def check_integrity(self) -> None:
        """Assert that each slot is free or one page's, and each page in one segment."""
        places = self.places()
        self.pool.check_integrity([[place.slot] for place in places])
        assert self._new.keys() | self._hit.keys() == self._places.keys()
        assert len(self._new) + len(self._hit) == len(self._places)
        assert all(place.hit == (name in self._hit) and place.known for name, place in self._places.items())
        held = {place.slot: HIT if place.hit else NEW for place in places}
        assert all(kind == held.get(slot, FREE) for slot, kind in enumerate(self._kinds)), "a slot is of another kind"
        assert all(place.pins and not place.known for place in self._forgotten), "a slot leaked"
        assert all(place.there or place.pins for place in self._places.values()), "nothing will ever come there"
