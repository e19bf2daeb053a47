"""Lanes: rows that decode, divided over the stages of a pipeline so that each stage has a step to compute.

    lane 0   a c e     ── step n   ──> stage 0 ──> stage 1 ──> tokens of a c e
    lane 1   b d           step n+1 ──> stage 0 …                │
                           step n+2, of lane 0 again, reads them <┘

Each step is of one lane, and lanes take turns. A request joins the lane of the step that ends its prompt, whose turn
comes last of all, unless that lane has its share already; else the one with the fewest rows. It stays there, but where
lanes have become too uneven: then rows move, which costs one wait for the tokens that they have in flight. Without a
pipeline there is one lane. Left out: lanes of unlike contexts, which take unlike times.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

from engine.sched.grouped import GroupedRows
from engine.sched.request import Request, rank
from engine.sched.rows import DecodeRows

UNEVEN = 4  # a lane has too many rows if it has more than another by one and a share of its own, this part of it


class Lanes:
    """The requests that decode, in lanes. `rows[lane]` are those of one; whose turn it was `last` is for the caller to
    say."""

    def __init__(self, rows: Sequence[DecodeRows]) -> None:
        self.rows = rows
        self.last = 0

    @classmethod
    def empty(cls, count: int, drafts: int, fronts: int) -> "Lanes":
        """So many lanes, of rows of so many drafts, of requests of so many fronts."""
        return cls([GroupedRows(drafts, fronts) if fronts > 1 else DecodeRows(drafts) for _ in range(count)])

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows)

    @property
    def requests(self) -> Iterator[Request]:
        return chain.from_iterable(rows.requests for rows in self.rows)

    def turns(self) -> list[int]:
        """The lanes in the order of their turns."""
        return self._after(self.last)

    def _after(self, lane: int) -> list[int]:
        count = len(self.rows)
        return [(lane + after) % count for after in range(1, count + 1)]

    def of(self, request: Request) -> DecodeRows:
        return self.rows[request.lane]

    def computed(self, request: Request) -> int:
        """Positions of `request` that are sure to be computed once all plans sent have run."""
        return request.computed if request.row < 0 else self.of(request).computed(request)

    def cheapest(self, running: Sequence[Request]) -> Request:
        """Whom of these to retract: lowest priority, then least computed; never the one that must make progress."""
        kept = min(running, key=rank)
        return min(
            (request for request in running if request is not kept),
            key=lambda request: (request.priority, self.computed(request), -request.arrival),
            default=kept,  # alone beside moves under way, whose pages it may have soon
        )

    def join(self, request: Request, room: int, lane: int) -> None:
        """As DecodeRows.join, in the lane that suits; the prompt ends in a step of `lane`."""
        if len(self.rows) > 1:
            share = len(self) // len(self.rows) + 1
            if len(self.rows[lane]) >= share:
                lane = min(reversed(self._after(lane)), key=lambda each: len(self.rows[each]))
            request.lane = lane
        self.of(request).join(request, room)

    def even_out(self) -> None:
        """Moves rows from the largest lane to the smallest, where that has far fewer."""
        sizes = [len(rows) for rows in self.rows]
        most, least = sizes.index(max(sizes)), sizes.index(min(sizes))
        excess = sizes[most] - sizes[least]
        if excess <= 1 + sizes[most] // UNEVEN:
            return
        for request in self.rows[most].requests[-(excess // 2) :]:
            self.rows[most].leave(request)
            request.lane = least
            self.rows[least].join(request, request.room, request.computed + 1)

    def check_integrity(self, page_size: int, idle: bool) -> None:
        """Assert that each lane's columns fit together, and that requests know their lanes."""
        for lane, rows in enumerate(self.rows):
            rows.check_integrity(page_size, idle)
            assert all(request.lane == lane for request in rows.requests)
