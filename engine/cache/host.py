"""Which page lies where in the host's memory: a page pool, names, and what has to give way. Pure.

    doubles    pages that the device has too, and keeps a while   ── give way first, the one used last before others
    new        the rest                                           ── after them, the least recently used before others
    hit        of which those that were asked for again; at most three quarters of all

A page begins as a double, as it was just computed or is used at once. So where there is room for it, a page lies in
the host and on the device, and else in one of them: "exclusive" caching (Wong and Wilkes 2002). The double that was
used last stays on the device for longest. One that a store is still to be given gives way after all other doubles.

A page that nobody asks for a second time passes through the new ones, so a scan of long texts, however long, pushes out
nothing that was asked for twice. Of new pages the least recently used give way first. Of those asked for again the same
become new again where they are too many. That is a segmented LRU (Karedla et al. 1994). Of one text the later pages
give way before the earlier ones, which they are worth nothing without.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, KeysView, Sequence
from itertools import islice

from engine.cache.doubles import Doubles
from engine.cache.place import Place
from engine.cache.pool import PagePool

FREE, NEW, HIT = range(3)  # what a slot holds


class HostPages:
    """The places of `size` pages."""

    def __init__(self, size: int) -> None:
        self.pool = PagePool(size)
        self._kinds = bytearray(size)  # of the slots: free, new or hit
        self.most_hit = size - -(-size // 4)  # pages that are asked for again
        self._places: dict[bytes, Place] = {}
        self._new: OrderedDict[bytes, Place] = OrderedDict()  # least recently used first
        self._hit: OrderedDict[bytes, Place] = OrderedDict()
        self._doubles = Doubles()
        # What the device has and keeps a while, and the places in which it was a double, where that gave way.
        self._above: dict[bytes, Place | None] = {}
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
        for count, place in enumerate(map(self._places.get, names[first:end])):
            if place is None or not place.there:
                return count
        return max(0, end - first)

    # ── what the device has ──────────────────────────────────────────────────────────────────

    @property
    def above(self) -> KeysView[bytes]:
        """The names of the pages that the device has, too, and keeps a while."""
        return self._above.keys()

    def unseen(self, names: Iterable[bytes]) -> list[int]:
        """The indices of those that are not here and have not given way as doubles."""
        places, above = self._places, self._above
        return [index for index, name in enumerate(names) if name not in places and above.get(name) is None]

    def held(self, names: Iterable[bytes]) -> None:
        """The device has these, given from the last to the first, and keeps them a while."""
        above, places = self._above, self._places
        for name in names:
            if name not in above:
                above[name] = None
                if (place := places.get(name)) is not None:
                    del (self._hit if place.hit else self._new)[name]
                    place.double = True
                    self._doubles.add(place)

    def left(self, names: Iterable[bytes]) -> None:
        """The device keeps these no more, which are given from the last to the first."""
        above, places = self._above, self._places
        for name in names:
            if name in above:
                del above[name]
                if (place := places.get(name)) is not None:
                    self._doubles.remove(place)
                    place.double = False
                    (self._hit if place.hit else self._new)[name] = place
        self._bound()

    def spare(self) -> bool:
        """Whether there is room without any page leaving that the device has not."""
        return bool(self.pool.free_pages or self._doubles)

    # ── places ───────────────────────────────────────────────────────────────────────────────

    def add(self, names: Sequence[bytes], *, hit: bool = False, spare: bool = False) -> list[Place]:
        """Pinned places for as many of these pages as there is room for, the first of them first; `hit`: they are asked
        for again. With `spare` nothing leaves for them that the device has not, or a store is to be given."""
        lacking = len(names) - self.pool.free_pages
        if lacking > 0:
            victims = list(islice(self._victims(hit, spare), lacking))
            self._above.update((victim.name, victim) for victim in victims if victim.double)
            self._forget(victims)
        slots = self.pool.take(min(len(names), self.pool.free_pages))
        assert slots is not None
        places = [Place(name, slot, hit=hit) for name, slot in zip(names, slots, strict=False)]
        above, order, kind = self._above, self._hit if hit else self._new, HIT if hit else NEW
        for place in reversed(places):
            name = place.name
            assert name not in self._places, "a page gets a second place"
            self._places[name] = place
            self._kinds[place.slot] = kind
            if name not in above:
                order[name] = place
                continue
            place.double = True
            self._doubles.add(place)
            if (before := above[name]) is not None:
                place.stored, place.offers = before.stored, before.offers
                above[name] = None
        self._bound()
        return places

    def _leave(self, place: Place) -> None:
        """It stands in no order."""
        if place.double:
            self._doubles.remove(place)
        else:
            del (self._hit if place.hit else self._new)[place.name]

    def _victims(self, hit: bool, spare: bool) -> Iterator[Place]:
        """What gives way, in this order: for a page that is asked for again also such a one."""
        yield from self._doubles.victims(spare=spare)
        if spare:
            return
        for segment in (self._new, self._hit) if hit else (self._new,):
            yield from (place for place in segment.values() if not place.pins)

    def touch(self, names: Iterable[bytes]) -> None:
        """These pages, given from the last to the first, are asked for again."""
        doubles = []
        for place in map(self._places.get, names):
            if place is None:
                continue
            if place.double:
                doubles.append(place)
            elif place.hit:
                self._hit.move_to_end(place.name)
            else:
                self._hit[place.name] = self._new.pop(place.name)
            if not place.hit:
                place.hit = True
                self._kinds[place.slot] = HIT
        self._doubles.use(doubles)
        self._bound()

    def _bound(self) -> None:
        """Those that were asked for again leave room for new ones."""
        while len(self._hit) > self.most_hit:
            name, place = self._hit.popitem(last=False)
            self._new[name] = place
            place.hit = False
            self._kinds[place.slot] = NEW

    def forget(self, place: Place) -> None:
        """Its name leads here no more; its slot is free as soon as nothing moves there."""
        if place.known:
            self._forget([place])

    def _forget(self, places: Iterable[Place]) -> None:
        free = []
        for place in places:
            place.known = False
            del self._places[place.name]
            self._leave(place)
            if place.pins:
                self._forgotten.add(place)
            else:
                free.append(place.slot)
        self._free(free)

    def pin(self, places: Iterable[Place]) -> None:
        """A move in these places begins."""
        for place in places:
            place.pins += 1

    def unpin(self, places: Iterable[Place]) -> None:
        """One move in these places is over."""
        for place in places:
            place.pins -= 1
            assert place.pins >= 0, "a place is unpinned more often than pinned"
            if place.pins:
                continue
            if not place.known:
                self._forgotten.remove(place)
                self._free([place.slot])
            elif place.double:
                self._doubles.unpinned(place)

    def _free(self, slots: list[int]) -> None:
        for slot in slots:
            self._kinds[slot] = FREE
        self.pool.give(slots[::-1])  # texts give way from their ends, so what takes their place stands in order

    def clear(self) -> None:
        """Forget all pages, and what the device has."""
        self._forget(list(self._places.values()))
        self._above.clear()

    def places(self) -> list[Place]:
        """All that are not free."""
        return [*self._places.values(), *self._forgotten]

    def check_integrity(self) -> None:
        """Assert that each slot is free or one page's, and each page in one segment."""
        places = self.places()
        self.pool.check_integrity([[place.slot] for place in places])
        self._doubles.check_integrity()
        count = len(self._new) + len(self._hit) + len(self._doubles)
        assert count == len(self._places) and len(self._hit) <= self.most_hit
        for order, hit in ((self._new, False), (self._hit, True)):
            for name, place in order.items():
                assert self._places[name] is place and place.known and not place.double and place.hit == hit
        assert all(place.double == (name in self._above) for name, place in self._places.items()), "a double is not one"
        gave_way = {name for name, place in self._above.items() if place is not None}
        assert gave_way.isdisjoint(self._places), "a double came back"
        held = {place.slot: HIT if place.hit else NEW for place in places}
        assert all(kind == held.get(slot, FREE) for slot, kind in enumerate(self._kinds)), "a slot is of another kind"
        assert all(place.pins and not place.known for place in self._forgotten), "a slot leaked"
        assert all(place.there or place.pins for place in self._places.values()), "nothing will ever come there"
