"""Maps of pages by owner: of the device, of the host's memory below it, and of a store, as far as it is known here.

    device   . free   c cached alone   k kept for a session or a program   s in the tree, of requests   r of one request
    host     . free   c cached         a cached, and asked for again
    store    . free   c cached                                       on all: i on their way there, o on their way out

A map has CELLS letters at most: that of each page, or of most of several; where no request and no move has any of
those, of the first. What it costs is bounded, too: of each kind so many pages are looked at, and where there are more,
one of several stands for them. Left out: which request has a page.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from engine.cache.host import HostPages
from engine.cache.pages import CachePages
from engine.cache.radix import Node
from engine.cache.tiers import Tiers
from engine.messages.looking import PagesLook

MOST_PAGES = 1 << 20  # that a map is made of
MOST_MARKED = 512  # pages of a kind that are looked at
CELLS = 512
FREE, CACHED, KEPT, SHARED, OWN, AGAIN, INTO, OUT = b".cksraio"

Held = tuple[Sequence[int], int]  # pages, from an index on


@dataclass(slots=True)
class Moving:
    """Pages of the device on their way `down`, and those that come `up`; places of the host that are written (`into`),
    and that are read (`out`); how many pages are being kept in a store, and fetched from it."""

    down: list[list[int]] = field(default_factory=list)
    up: list[list[int]] = field(default_factory=list)
    into: list[list[int]] = field(default_factory=list)
    out: list[list[int]] = field(default_factory=list)
    kept: int = 0
    fetched: int = 0


def moving_of(tiers: Tiers) -> Moving:
    """What the moves under way touch."""
    found = Moving()
    for ticket in tiers.tickets():
        slots = [place.slot for place in ticket.places]
        match ticket.way:
            case "down":
                found.down.append(ticket.pages)
                found.into.append(slots)
            case "up":
                found.up.append(ticket.pages)
                found.out.append(slots)
            case "keep":
                found.out.append(slots)
                found.kept += len(slots)
            case "fetch":
                found.into.append(slots)
                found.fetched += len(slots)
    return found


def map_of_device(
    pages: CachePages, ends: Iterable[Node | None], owned: Sequence[Held], moving: Moving | None = None
) -> PagesLook:
    """Running requests hold the prefixes that end at `ends`, and pages of their own."""
    if pages.pool.size > MOST_PAGES:
        return PagesLook(0, "")
    seen: set[Node] = set()
    shared = _above(ends, seen)
    kept = _above(islice(pages.pins.nodes(), MOST_MARKED), seen)
    marks: dict[int, Sequence[Held]] = {KEPT: kept, SHARED: shared, OWN: owned}
    if moving is not None:
        marks |= {INTO: [(each, 0) for each in moving.up], OUT: [(each, 0) for each in moving.down]}
    return map_of(pages.pool.taken, bytes((FREE, CACHED)), marks)


def map_of_host(host: HostPages, moving: Moving) -> PagesLook:
    """The places of its memory."""
    if host.pool.size > MOST_PAGES:
        return PagesLook(0, "")
    marks = {INTO: [(each, 0) for each in moving.into], OUT: [(each, 0) for each in moving.out]}
    return map_of(host.kinds, bytes((FREE, CACHED, AGAIN)), marks)


def map_of_store(room: int, held: int, into: int, out: int) -> PagesLook:
    """A store has room for so many pages, 0 if that is not known. It tells no places, so they stand in order."""
    each = -(-max(room, held + into) // CELLS) or 1
    counts = ((INTO, into), (OUT, min(out, held)), (CACHED, max(0, held - out)), (FREE, max(0, room - held - into)))
    letters = b"".join(bytes((letter,)) * -(-count // each) for letter, count in counts)
    return PagesLook(each, letters[:CELLS].decode())


def _above(ends: Iterable[Node | None], seen: set[Node]) -> list[Held]:
    """The pages of the nodes from these ends up to their roots, but for those that are `seen`, which then are."""
    found: list[Held] = []
    for end in ends:
        while end is not None and end.parent is not None and end not in seen and len(found) < MOST_MARKED:
            seen.add(end)
            found.append((end.pages, 0))
            end = end.parent
    return found


def map_of(kinds: bytes, letters: bytes, marks: Mapping[int, Sequence[Held]]) -> PagesLook:
    """`kinds` has an index into `letters` for each page; `marks` says otherwise of some of those that are not free."""
    chosen = {letter: _some(held) for letter, held in marks.items()}
    each = -(-len(kinds) // CELLS)
    if each <= 1:
        owners = bytearray(kinds.translate(letters.ljust(256)))
        for letter, (pages, _) in chosen.items():
            for page in pages:
                owners[page] = letter
        return PagesLook(1, owners.decode())
    cells = bytearray(kinds[::each].translate(letters.ljust(256)))  # of which nobody else says anything
    found = [
        (letter, Counter([page // each for page in pages]), one) for letter, (pages, one) in chosen.items() if pages
    ]
    for cell in set(chain.from_iterable(counted for _, counted, _ in found)):
        first = cell * each
        most = kinds.count(0, first, first + each)
        taken = left = min(each, len(kinds) - first) - most
        best = FREE
        for letter, counted, one in found:
            count = min(taken, one * counted.get(cell, 0))
            left -= count
            if count > most:
                best, most = letter, count
        cells[cell] = best if left <= most else letters[kinds[first] or 1]
    return PagesLook(each, cells.decode())


def _some(held: Sequence[Held]) -> tuple[list[int], int]:
    """MOST_MARKED of the pages at most, and for how many each of them stands."""
    total = sum(len(pages) - first for pages, first in held)
    each, skip = -(-total // MOST_MARKED) or 1, 0
    found: list[int] = []
    for pages, first in held:
        found += pages[first + skip :: each]
        skip = (first + skip - len(pages)) % each
    return found, each
