"""Which pages a store is to be given, and when. Pure: the caller says what time it is `now`.

    there ──want──> pending ──due──> under way ──kept──> stored
                       ^                 │
                       └── after a pause ┴── refused

What a store refuses is offered again after a pause, so a page that came down while a disk was full or slow is kept once
the disk is writable. A store that takes nothing of a move is offered nothing for that long, and the pause doubles each
time: a disk that stays full costs two moves a pause. Other stores never take some pages: so a page is offered
MOST_OFFERS times. A page that waits for its offer is awaited, and gives way in the host after others that the device
has too (host.py): if it does, it is offered when it comes down again.

A store that is read from is offered little meanwhile: requests wait for what is read, and for what is kept nobody does.
Left out: other pages that leave the host before the store has them.
"""

from collections import OrderedDict
from collections.abc import Sequence

from engine.cache.place import Place

AT_ONCE = 32  # pages in one move
MOVES = 2  # under way
LEAST_PAUSE, MOST_PAUSE = 15.0, 300.0  # seconds
MOST_OFFERS = 8
# Beside reading, pages are kept once so many wait as are this part of the host, or the last ones were so long ago.
LATE_SHARE, LATE_SECONDS = 8, 5.0


class Keeping:
    """For a host that has room for `most` pages."""

    def __init__(self, most: int) -> None:
        self.now = 0.0
        self._most = most
        self._pending: OrderedDict[bytes, Place] = OrderedDict()
        self._refused: dict[bytes, Place] = {}
        self._moves = self._going = 0  # under way, and their pages
        self._began = 0.0  # the last of them
        self._shut = False  # the last move was refused as a whole
        self._pause = LEAST_PAUSE
        self._until = 0.0

    def want(self, place: Place) -> None:
        """A page that is there is to be kept, unless it is already."""
        if not place.stored and place.offers < MOST_OFFERS:
            self._pending[place.name] = place
            place.awaited = True
            if len(self._pending) > 2 * self._most:  # half of them at least have left the host
                self._pending = OrderedDict((name, place) for name, place in self._pending.items() if place.known)

    @property
    def paused(self) -> bool:
        """Whether what was refused waits."""
        return self.now < self._until

    @property
    def waits(self) -> bool:
        """Whether `due` has something to give."""
        return bool(self._refused or self._pending) and not self.paused

    @property
    def lag(self) -> int:
        """Pages that the store has not taken yet; some of those that wait may have left the host."""
        return len(self._pending) + len(self._refused) + self._going

    def due(self, *, reading: bool = False) -> list[list[Place]]:
        """Moves to begin now, and the pages of each, which count as stored from now on. `reading`: the store is."""
        if not self.paused:
            for place in self._refused.values():
                if place.known:  # else another may have its name by now
                    self.want(place)
            self._refused.clear()
        elif self._shut:
            return []
        few = LATE_SHARE * len(self._pending) < self._most
        if reading and few and self.now - self._began < LATE_SECONDS:
            return []
        moves = []
        while self._pending and self._moves < MOVES:
            places: list[Place] = []
            while self._pending and len(places) < AT_ONCE:
                _, place = self._pending.popitem(last=False)
                place.awaited = False
                if place.known and place.there and not place.stored:
                    place.stored = True
                    places.append(place)
            if places:
                self._moves, self._going, self._began = self._moves + 1, self._going + len(places), self.now
                moves.append(places)
        return moves

    def kept(self, places: Sequence[Place], done: Sequence[bool]) -> None:
        """A move is over, of these pages; those are kept that are `done`."""
        self.over(places)
        for place, is_kept in zip(places, done, strict=True):
            if not is_kept:
                place.stored = False
                place.offers += 1
                self._refused[place.name] = place
        self._shut = not any(done)
        if not self._shut:
            self._pause = LEAST_PAUSE
        if not all(done) and not self.paused:
            self._until = self.now + self._pause
            self._pause = min(2 * self._pause, MOST_PAUSE)

    def over(self, places: Sequence[Place]) -> None:
        """A move is over, of these pages. Of one of before `clear` that is all: what the store took says nothing."""
        self._moves, self._going = self._moves - 1, self._going - len(places)

    def clear(self) -> None:
        """Nothing is to be kept of what is there now."""
        for place in self._pending.values():
            place.awaited = False
        self._pending.clear()
        self._refused.clear()
