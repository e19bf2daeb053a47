"""Fetches from a store, piece by piece, while requests wait for the device; and when to wait for them no longer. Pure.

    found ──wait──> pieces that wait ──next──> under way ──over──> there
    computed <───────────┴────────────────────────┘ once the device could begin, and is sooner

The pieces of a request follow each other, as the requests do. Few are under way at a time, so that little is fetched in
vain. A piece says how long it took, from which the pace of the store is known. Left out: the decision itself
(sooner.py).
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf

from engine.cache.sooner import Pace, most_ahead

MOVES = 3  # under way
STUCK_SECONDS = 10.0  # after which a piece that is under way is waited for no longer


@dataclass(slots=True)
class Piece:
    """Pages of the request whose first piece is `span`. `ahead` pages were under way when it was sent."""

    span: int
    names: Sequence[bytes]
    ahead: int = 0
    since: float = inf  # the first time that was told then
    stuck: bool = False


class Fetching:
    """`always`: whatever a store has is waited for. `compute` are the seconds that the device takes for a page, as far
    as the caller knows."""

    def __init__(self, always: bool, pace: Pace | None = None) -> None:
        self.pace = pace or Pace()  # of a page from the store
        self.compute = 0.0
        self.later: OrderedDict[int, Piece] = OrderedDict()  # by the numbers of their moves
        self._always = always
        self._sent: dict[int, Piece] = {}
        self._spans: dict[int, list[int]] = {}  # the pieces of each that are not over

    @property
    def busy(self) -> bool:
        """Whether a piece is under way."""
        return bool(self._sent)

    def wait(self, pieces: dict[int, Sequence[bytes]]) -> None:
        """Pages of a request, by the numbers of their moves, wait for their turn."""
        span = min(pieces)
        self._spans[span] = list(pieces)
        self.later.update((number, Piece(span, names)) for number, names in pieces.items())

    def next(self) -> tuple[int, Piece] | None:
        """A piece to be sent now."""
        if not self.later or len(self._sent) >= MOVES:
            return None
        number, piece = self.later.popitem(last=False)
        piece.ahead = sum(len(each.names) for each in self._sent.values())
        self._sent[number] = piece
        return number, piece

    def tick(self, now: float) -> None:
        """It is so late, in seconds of the caller's clock."""
        for piece in self._sent.values():
            piece.since = min(piece.since, now)
            piece.stuck = now - piece.since >= STUCK_SECONDS

    def over(self, number: int, done: int, seconds: float) -> Piece:
        """A piece is over, in so many seconds: `done` of its pages are there."""
        piece = self._sent.pop(number)
        if seconds and done == len(piece.names):
            self.pace.measure(piece.ahead + done, seconds)
        self._end(number, piece)
        return piece

    def drop(self, number: int) -> Piece:
        """A piece that waits is not sent."""
        piece = self.later.pop(number)
        self._end(number, piece)
        return piece

    def clear(self) -> None:
        """Nothing that waits is sent."""
        for number in list(self.later):
            self.drop(number)

    def _end(self, number: int, piece: Piece) -> None:
        self._spans[piece.span].remove(number)
        if not self._spans[piece.span]:
            del self._spans[piece.span]

    def rest(self, number: int) -> list[int]:
        """Piece `number` and those behind it of the same request, as far as they are not over; nothing if it is."""
        piece = self._sent.get(number) or self.later.get(number)
        return [] if piece is None else [other for other in self._spans[piece.span] if other >= number]

    def worth(self, number: int, running: int) -> bool:
        """Whether a request that could begin beside so many `running` ones waits for piece `number` and what is behind
        it. Never for one that is stuck: as long as others come that share it, nobody would give up on it."""
        if self._is_stuck(number):
            return False
        if self._always:
            return True
        rest = [self._sent.get(other) or self.later[other] for other in self.rest(number)]
        most = most_ahead(sum(len(piece.names) for piece in rest), self.pace.each, self.compute, running)
        for other, piece in chain(self._sent.items(), self.later.items()):
            if other == number or most < 0:
                break
            most -= len(piece.names)
        return most >= 0

    def _is_stuck(self, number: int) -> bool:
        """Whether a piece has been under way for long, or is not sent because all that are have been."""
        if number in self._sent:
            return self._sent[number].stuck
        return len(self._sent) >= MOVES and all(piece.stuck for piece in self._sent.values())

    def patience(self, wanted: int) -> float:
        """Seconds after which the last `wanted` pages that are to come are given up on: twice what is expected, and
        what it takes to compute them. 0 where nothing can be expected."""
        if self._always or not self.pace.each or not self.compute:
            return 0.0
        queued = sum(len(piece.names) for piece in chain(self._sent.values(), self.later.values()))
        return 2 * queued * self.pace.each + wanted * self.compute
