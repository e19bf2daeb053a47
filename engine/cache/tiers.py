"""Where pages lie below the device, and which of them move: decided in integers. Pure.

    device   the radix tree and its pool              what requests compute with
      │ down: as soon as it is computed (write-through), once it is asked for again (second-hit); and before it has
      │       to give way, where the host has it no more or not yet (write-back)
      │ up:   what the tree has no more of a waiting request's prompt
    host     HostPages: numbers here, memory in each rank's worker
      │ keep: what has come down, while the store keeps up (keeping.py)
      │ fetch: what a request lacks and the store says that it has (find), unless it is computed sooner (fetching.py)
    store    knows pages by name; may lose them

The tree says what lies on the device, names say what lies below: a node has no field for either, so a tree without
tiers costs nothing more. A move is under way from when it is due until all ranks have answered. Meanwhile its pages on
the device are locked in the tree, or its own, and its places in the pool are pinned, so that nothing else writes there.
Only what has to give way at once, and is to be written back, is free at once: that move is sent before the step that
takes the page, and holds it. To spare steps this, what gives way next goes down ahead of need: one such move is under
way at a time, so that what is ready is known. A move that fails leaves nothing behind: who waited for it computes.

Left out: which requests wait (sched/places.py), and copying (worker/transfers.py).
"""

import itertools
from array import array
from collections.abc import Iterable, Sequence

from engine.cache.ceiling import Ceiling
from engine.cache.clearing import Clearing
from engine.cache.device import DevicePages
from engine.cache.fetching import Fetching
from engine.cache.host import HostPages
from engine.cache.keeping import Keeping
from engine.cache.needs import Needs
from engine.cache.place import Place
from engine.cache.pool import PagePool
from engine.cache.radix import Node, RadixTree
from engine.cache.tickets import Ticket, TierCounts, TierOptions, WritePolicy
from engine.messages.tiers import NAME_BYTES, Move, Moved

SLACK = 64  # one in so many of the pages that are to be ready may lack before more go down: to look for them costs time


class Tiers:
    """What lies below the pages of `pool`, whose cached ones are in `tree`."""

    def __init__(self, options: TierOptions, tree: RadixTree, pool: PagePool, before: "Tiers | None" = None) -> None:
        """`before` are those of a life of the device before this one: counts and numbers go on."""
        self.options = options
        self.host = HostPages(options.host)
        self.counts: TierCounts = TierCounts() if before is None else before.counts
        self.ceiling: Ceiling = Ceiling() if before is None else before.ceiling
        self._numbers: itertools.count[int] = options.numbers() if before is None else before._numbers
        self.counts.store_before, self.counts.store = self.counts.stores, {}
        self._tree, self._pool = tree, pool
        self._tickets: dict[int, Ticket] = {}
        self._before: list[Move] = []
        self._after: list[Move] = []
        self._down = Ticket("down")  # not sent yet
        self._rising: dict[bytes, int] = {}  # names that go up, to the number of the move
        self._coming: dict[bytes, int] = {}  # the same, of names that are looked for or fetched
        self.device = DevicePages(self.host, options.policy)
        self._ahead = 0  # the number of the move that brings pages down which give way next
        self._most_cold = 0  # how many such pages there are to be; none before the device evicts any
        self._changed = False  # since it was looked for pages that give way next
        self.keeping = Keeping(options.host)
        self.fetching: Fetching = Fetching(options.always, None if before is None else before.fetching.pace)
        self.needs = Needs()
        self.patience: list[tuple[int, float]] = []  # seconds that needs may wait; 0: not known
        self.cause = ""  # why something failed, for people; not told yet
        self.clearing: Clearing = Clearing(None if before is None else before.clearing)
        if options.stores and not self.clearing.wanted:
            self._send(Ticket("find"), self._after)  # of no page: what a life before this one has left is told

    # ── what is due ──────────────────────────────────────────────────────────────────────────

    def before(self) -> list[Move]:
        """Moves to be sent before the next plan."""
        found, self._before = self._before, []
        return found

    def after(self) -> list[Move]:
        """Moves to be sent once all plans are."""
        if self._down.places:
            ticket, self._down = self._down, Ticket("down")
            self._send(ticket, self._after)
        self._go_ahead()
        if self.clearing.due:
            self.clearing.sent(self._send(Ticket("clear"), self._after))
        if self.options.stores and not self.clearing.wanted:
            for places in self.keeping.due(reading=self.fetching.busy):
                self.host.pin(places)
                self._send(Ticket("keep", places), self._after)
            self._fetch_more()
        found, self._after = self._after, []
        return found

    def under_way(self, number: int) -> bool:
        """Whether the move of this number is; 0 is none."""
        return number in self._tickets

    def chooses(self, number: int) -> bool:
        """Whether the end of this move says what to fetch, and what to compute."""
        return number in self._tickets and self._tickets[number].way in ("find", "fetch")

    @property
    def sweeping(self) -> bool:
        """Whether moves under way hold pages in the tree that have been cleared."""
        return any(ticket.stale and ticket.nodes for ticket in self._tickets.values())

    def _send(self, ticket: Ticket, due: list[Move], *, holds: bool = False, number: int = 0) -> int:
        number = number or next(self._numbers)
        self._tickets[number] = ticket
        slots = array("i", [place.slot for place in ticket.places]).tobytes()
        names = b""
        if ticket.way in ("find", "fetch", "keep"):
            names = b"".join(ticket.names or [place.name for place in ticket.places])
        pages = array("i", ticket.pages).tobytes()
        due.append(Move(number, ticket.way, pages, slots, names, self.options.copy, holds))
        return number

    # ── down ─────────────────────────────────────────────────────────────────────────────────

    def shared(self, node: Node, names: Sequence[bytes], first: int, pages: Sequence[int]) -> None:
        """The tree now has `pages`, the ones from index `first` on of those that end at `node`, which is locked."""
        self.device.remember(names, first, pages)
        if self.options.policy == "write-through":
            self._lower(node, names, first, pages)

    def hit(self, node: Node, names: Sequence[bytes], pages: Sequence[int]) -> None:
        """A request begins with `pages`, which end at `node`, locked; they are all that it finds in the cache."""
        self.device.used(names, pages)
        if self.options.policy != "write-back":
            self._lower(node, names, 0, pages)
        self.device.again(names, pages)
        if self.options.stores and self.options.policy == "second-hit":
            for name in names[: len(pages)]:
                self._want_kept(self.host.get(name))

    def _lower(self, node: Node, names: Sequence[bytes], first: int, pages: Sequence[int]) -> None:
        """Move those of `pages` down that are not there, and have not been; their names begin at index `first`."""
        own = names[first : first + len(pages)]
        new = self.host.unseen(own)
        if not new:
            return
        places = self.host.add([own[index] for index in new])
        self.counts.refused += len(new) - len(places)
        if places:
            self._tree.lock(node)
            self._down.nodes.append(node)
            self._down.places += places
            self._down.pages += [pages[index] for index in new[: len(places)]]

    def evicted(self, pages: Sequence[int]) -> None:
        """The tree has these pages no more, and the next step may write there."""
        self._changed = True
        if self.device and self.options.policy != "write-back":
            self._most_cold = min(self._pool.size, self.options.host) // self.options.cold
        places, refused = self.device.leave(pages)
        self.counts.refused += refused
        if places:
            self._send(Ticket("down", list(places.values()), list(places)), self._before, holds=True)
        self.device.forget(pages)

    def make_room(self, count: int) -> int:
        """So many pages of the device are about to be taken. The number of the move that has to be over before they can
        be without a step that waits; 0 where there is none."""
        return 0 if self.ready >= count else self._ahead or self._go_down(count - self.ready)

    @property
    def ready(self) -> int:
        """Pages of the device that can be had now, and need not go down for it."""
        going = self._tickets[self._ahead].pages if self._ahead else ()
        return self._pool.free_pages + len(self.device.cold) - len(going)

    def _go_ahead(self) -> None:
        """Some of what gives way next goes down before it does, as far as only doubles give way for that."""
        changed, self._changed = self._changed, False
        lacking = self._most_cold - self.ready
        if changed and not self._ahead and lacking > self._most_cold // SLACK and self.host.spare():
            self._go_down(lacking, spare=True)

    def _go_down(self, count: int, *, spare: bool = False) -> int:
        """So many more of the pages that give way next go down, where they are not there. The number of the move; 0
        where there is none."""
        if count <= 0:
            return 0
        ticket, device = Ticket("down", ahead=True), self.device
        for node, ends in self._tree.coldest(len(device.cold) + count):
            if device.cold.issuperset(ends):
                continue
            places, refused = device.leave(ends, spare=spare)
            if places:
                behind = next(index for index, page in enumerate(reversed(ends)) if page in places)
                node = self._tree.head(node, len(node.pages) - behind)  # so that what is behind can go at once
                self._tree.lock(node)
                ticket.nodes.append(node)
                ticket.places += places.values()
                ticket.pages += places
            if spare and refused:
                break
            self.counts.refused += refused
        if ticket.places:
            self._ahead = self._send(ticket, self._after)
        return self._ahead

    def _lowered(self, ticket: Ticket, done: Sequence[bool]) -> None:
        for node in ticket.nodes:
            self._tree.unlock(node, used=not ticket.ahead)
        if ticket.ahead:
            self._ahead = 0
        self._arrive(ticket, done)
        self.counts.down += sum(done)

    def _arrive(self, ticket: Ticket, done: Sequence[bool]) -> None:
        """What was to come into these places is there, or never comes."""
        always = self.options.policy != "second-hit"
        for place, is_done in zip(ticket.places, done, strict=True):
            if is_done and not ticket.stale:
                place.there = place.known
                if self.options.stores and (always or place.hit):
                    self._want_kept(place)
            else:
                self.host.forget(place)
        self.host.unpin(ticket.places)

    # ── up ───────────────────────────────────────────────────────────────────────────────────

    def rising(self, name: bytes) -> int:
        """The number of the move that brings the page of that name up; 0 where none does."""
        return self._rising.get(name, 0)

    def rise(self, node: Node, key: bytes, names: Sequence[bytes], first: int, pages: list[int]) -> int:
        """Move the pages of `names` from index `first` on, which are there, up to `pages`, taken from the pool; the
        last are a state, if there are any. They go on from `node` by `key`; it is locked, and both are the move's from
        now on. In parts, where the device evicts: others go down to places that these leave. The last one's number."""
        places = list(filter(None, map(self.host.get, names[first : first + len(pages)])))
        assert len(places) == len(pages) and all(place.there for place in places), "a page goes up that is not there"
        self.host.pin(places)
        most = self.options.part(self._most_cold) if self._most_cold else len(pages)
        for part in Ticket("up", places, pages, [node], names, first, key).parts(most, self.options.state):
            number = self._send(part, self._after)
            self._rising.update((place.name, number) for place in part.places)
        return number

    def _risen(self, ticket: Ticket, done: Sequence[bool]) -> None:
        nodes, pages, count = ticket.nodes, ticket.pages, 0
        while nodes and count < len(pages) and done[count] and not ticket.stale:
            count += 1
        self.host.unpin(ticket.places)
        for index, (place, is_done) in enumerate(zip(ticket.places, done, strict=True)):
            del self._rising[place.name]
            if not is_done:
                self.host.forget(place)
            self.counts.from_store += index < count and place.fetched
            self.counts.from_host += index < count and not place.fetched
            place.fetched = place.fetched and index >= count
        if count:
            key = ticket.key[: len(ticket.key) // len(pages) * count]
            nodes[0], held = self._tree.extend(nodes[0], key, pages[:count])
            self._pool.give(pages[: len(held)])
            self.device.remember(ticket.names, ticket.first + len(held), pages[len(held) : count])
        self._pool.give(pages[count:])
        if ticket.then is not None and count == len(pages):
            ticket.then.nodes, nodes = nodes, []
        for node in nodes:
            self._tree.unlock(node)

    # ── store ────────────────────────────────────────────────────────────────────────────────

    def _want_kept(self, place: Place | None) -> None:
        if self.options.stores and place is not None and place.there:
            self.keeping.want(place)

    def _kept(self, ticket: Ticket, done: Sequence[bool]) -> None:
        if ticket.stale:
            self.keeping.over(ticket.places)
        else:
            self.keeping.kept(ticket.places, done)
        self.host.unpin(ticket.places)
        self.counts.kept += sum(done)

    def want(self, number: int, names: Sequence[bytes], held: int) -> None:
        """A request needs the pages of `names`, of which the device has the first `held`. Once `needs.settled` names
        this `number`, what a store has of them is in the pool or comes there; or that is not known in time. More than
        the pool keeps beside each other are not asked for: the last would push out the first, before any goes up."""
        names = names[: held + self.host.most_hit]
        first, coming, there = held, set[int](), self.host.names
        while first < len(names) and (names[first] in self._coming or names[first] in there):
            coming.add(self._coming.get(names[first], 0))
            first += 1
        fetches = {piece for piece in coming if self.fetching.rest(piece)}
        waits = coming - fetches - {0}
        if len(names) - first >= self.options.least_fetched and not self.clearing.wanted:
            asked = self._send(Ticket.find(names[first:], self.options.state), self._after)
            self._coming.update(dict.fromkeys(names[first:], asked))
            waits.add(asked)
        self.needs.add(number, waits, fetches)

    def give_up(self, number: int) -> None:
        """That need has been waited for long enough, or who had it is gone."""
        self._abandon(self.needs.give_up(number))

    def _found(self, number: int, ticket: Ticket, done: Sequence[bool]) -> None:
        self._come_not(number, ticket.names)
        names = [name for name in ticket.found(done, self.options.state) if self.host.get(name) is None]
        pieces: dict[int, Sequence[bytes]] = {}
        if len(names) >= self.options.least_fetched and self.needs.sought(number):
            for first in range(0, len(names), self.options.piece):
                pieces[next(self._numbers)] = names[first : first + self.options.piece]
            self.fetching.wait(pieces)
            self._coming.update((name, piece) for piece, each in pieces.items() for name in each)
        needs = self.needs.found(number, pieces)
        if pieces:
            self.patience += [(need, self.fetching.patience(len(names))) for need in needs]
            self._fetch_more()  # at once, so that the pace is measured again also where they are computed sooner

    def _fetch_more(self) -> None:
        """Send the pieces that are due, as far as the pool has room for them."""
        while (found := self.fetching.next()) is not None:
            number, piece = found
            new = [name for name in piece.names if self.host.get(name) is None]
            places = self.host.add(new, hit=True)
            if len(places) < len(new):  # what comes behind it has no room either
                self._abandon(other for other in self.fetching.rest(number) if other != number)
            self._come_not(number, set(piece.names).difference(new[: len(places)]))
            piece.names = new[: len(places)]
            if places:
                self._send(Ticket("fetch", places), self._after, number=number)
            else:
                self._fetch_over(number, 0, 0.0)

    def _fetched(self, number: int, ticket: Ticket, done: Sequence[bool], seconds: float) -> None:
        if not all(done):
            self._abandon(self.fetching.rest(number))  # which is worth nothing without it
        for place, is_done in zip(ticket.places, done, strict=True):
            place.fetched = place.stored = is_done
        self._arrive(ticket, done)
        self.counts.fetched += sum(done)
        self._fetch_over(number, sum(done), seconds)

    def _fetch_over(self, number: int, done: int, seconds: float) -> None:
        self._come_not(number, self.fetching.over(number, done, seconds).names)
        self.needs.over(number)

    def awaits(self, name: bytes, running: int | None) -> bool:
        """Whether a store gives the page of that name, which a request goes on with that could begin beside so many
        `running` ones, and it waits for that. If not, nobody does any more, nor for what comes behind it. None: it
        could not begin now."""
        number = self._coming.get(name, 0)
        if not (rest := self.fetching.rest(number)):
            return False
        if running is None or self.fetching.worth(number, running):
            return True
        self._abandon(rest)
        return False

    def _abandon(self, pieces: Iterable[int]) -> None:
        """Nobody waits for these: they are computed. What is under way may be of use another time."""
        for number in list(pieces):
            if number in self.fetching.later:
                names = self.fetching.drop(number).names
                self.counts.computed += len(names)
                self._come_not(number, names)
            elif number in self._tickets:
                self._come_not(number, [place.name for place in self._tickets[number].places])
            self.needs.over(number)

    def _come_not(self, number: int, names: Iterable[bytes]) -> None:
        """Piece `number` does not bring these, or has done so."""
        for name in names:
            if self._coming.get(name) == number:
                del self._coming[name]

    # ── answers ──────────────────────────────────────────────────────────────────────────────

    def moved(self, message: Moved) -> None:
        """All ranks have answered. Moves of tiers before `reset` are not known."""
        ticket = self._tickets.pop(message.number, None)
        if ticket is None:
            return
        self._changed = True
        done = [bool(each) for each in message.done]
        counts = self.counts
        counts.tell(ticket.way, message)
        if ticket.way != "clear":
            self.cause = self.cause or message.cause
        if ticket.way not in ("find", "clear") and not ticket.stale:  # else nobody wants them any more
            counts.failed += len(done) - sum(done)
        match ticket.way:
            case "down":
                self._lowered(ticket, done)
            case "up":
                self._risen(ticket, done)
            case "keep":
                self._kept(ticket, done)
            case "find":
                self._found(message.number, ticket, done)
            case "fetch":
                self._fetched(message.number, ticket, done, message.seconds)
            case "clear":
                self.clearing.answered(message.number, done=all(done), cause=message.cause)

    def clear(self) -> None:
        """Forget all that lies below the device, and what is on its way."""
        self.device.clear()
        self.keeping.clear()
        self.fetching.clear()
        self._coming.clear()  # nobody waits for what was asked before
        self.needs.clear()
        if self._down.places:
            ticket, self._down = self._down, Ticket("down")
            self._send(ticket, self._after)
        for ticket in self._tickets.values():
            ticket.stale = True
        if self.options.stores:
            self.clearing.ask()
        self.host.clear()

    # ── looking ──────────────────────────────────────────────────────────────────────────────

    def tickets(self) -> list[Ticket]:
        """The moves under way, and what the next one takes down."""
        return [*self._tickets.values(), self._down]

    def nodes(self) -> Iterable[Node]:
        """The nodes that moves under way lock, each as often as it is."""
        return [node for ticket in self.tickets() for node in ticket.nodes]

    def own_pages(self) -> list[list[int]]:
        """Pages of the device that belong to moves under way."""
        return [ticket.pages for ticket in self._tickets.values() if ticket.way == "up"]

    def check_integrity(self, pages: Iterable[int]) -> None:
        """Assert that places, pins and moves fit together; `pages` are the tree's."""
        self.host.check_integrity()
        pins: dict[Place, int] = {}
        for ticket in self.tickets():
            for place in ticket.places:
                pins[place] = pins.get(place, 0) + 1
        assert all(place.pins == pins.get(place, 0) for place in self.host.places()), "a pin outlives its move"
        self.device.check_integrity(pages)
        assert not self._ahead or self._tickets[self._ahead].ahead, "room is made by no move"
        assert self._tickets.keys() >= set(self._rising.values())
        come = self._tickets.keys() | self.fetching.later.keys()
        assert come >= set(self._coming.values()), "a page is waited for that nothing brings"
        self.needs.check_integrity(self._tickets.keys(), come)


__all__ = ["NAME_BYTES", "Ticket", "TierCounts", "TierOptions", "Tiers", "WritePolicy"]
