"""What is shown of the requests that run and wait: columns, of a bounded number of them; and of the pages they have.

It is made of what the scheduler keeps anyway, so a scheduler that nobody looks at has nothing to do for it.
"""

from array import array
from collections.abc import Sequence
from itertools import chain, islice
from operator import attrgetter

from engine.cache.looking import look_at_trees
from engine.cache.maps import MOST_PAGES, Moving, map_of_device, map_of_host, map_of_store, moving_of
from engine.cache.tiers import Tiers
from engine.messages.looking import PagesLook, RowsLook, TierLook, TreeLook
from engine.sched.batcher import Scheduler
from engine.sched.copies import Copies

MOST_ROWS = 512
MOST_QUEUED = 64
PROMPT, DECODES, ENDS = range(3)


def parts_of(scheduler: Scheduler | Copies) -> Sequence[Scheduler]:
    """The schedulers that have pages: that of each copy of attention, or the one."""
    return scheduler.copies if isinstance(scheduler, Copies) else (scheduler,)


def look_at_rows(parts: Sequence[Scheduler]) -> RowsLook:
    """The requests that have a slot, by slot."""
    found = islice(chain.from_iterable(part.running_requests() for part in parts), MOST_ROWS)
    rows = sorted(found, key=attrgetter("slot"))
    lengths = [len(row.ids) for row in rows]
    prompts = [row.prompt_len for row in rows]
    columns = (
        [row.slot for row in rows],
        [DECODES if row.row >= 0 else PROMPT if row.computed < len(row.ids) else ENDS for row in rows],
        prompts,
        [row.cached if row.cached > 0 else 0 for row in rows],
        [length - 1 if row.row >= 0 else row.computed for row, length in zip(rows, lengths, strict=True)],
        [length - prompt for length, prompt in zip(lengths, prompts, strict=True)],
        [len(row.pages) for row in rows],
    )
    return RowsLook(*(array("i", column).tobytes() for column in columns))


def look_at_queue(parts: Sequence[Scheduler]) -> bytes:
    """The lengths of the prompts that wait, first to run first (int32)."""
    queued = chain.from_iterable(part.live.queue for part in parts[:1])  # copies share it
    return array("i", (len(request.ids) for request in islice(queued, MOST_QUEUED))).tobytes()


def look_at_cache(parts: Sequence[Scheduler], store_bytes: int = 0) -> tuple[PagesLook, TreeLook, tuple[TierLook, ...]]:
    """The pages of the device, the tree that holds some of them, and the tiers below; a store may take so many bytes,
    if that is known."""
    tree = look_at_trees(part.cache.tree for part in parts)
    below = [part.tiers for part in parts if part.tiers is not None]
    moving = [moving_of(tiers) for tiers in below]
    if not parts or sum(part.cache.pool.size for part in parts) > MOST_PAGES:
        device = PagesLook(0, "")
    else:
        device = _joined([_map_of(part, *moving[at : at + 1]) for at, part in enumerate(parts)])
    return device, tree, _look_at_tiers(below, moving, store_bytes) if below else ()


def _map_of(part: Scheduler, moving: Moving | None = None) -> PagesLook:
    running = list(part.running_requests())
    ends, owned = [each.node for each in running], [(each.pages, each.shared) for each in running]
    return map_of_device(part.cache, ends, owned, moving)


def _joined(maps: Sequence[PagesLook]) -> PagesLook:
    """Those of copies of attention, which are of one size."""
    return PagesLook(maps[0].each, "".join(each.owners for each in maps))


def _look_at_tiers(below: Sequence[Tiers], moving: Sequence[Moving], store_bytes: int) -> tuple[TierLook, ...]:
    map = _joined([map_of_host(tiers.host, each) for tiers, each in zip(below, moving, strict=True)])
    host = TierLook("host", sum(each.options.host for each in below), sum(len(each.host) for each in below), map)
    if not below[0].options.stores:
        return (host,)
    held, taken = (max(getattr(each.counts, name) for each in below) for name in ("store_pages", "store_bytes"))
    room = store_bytes * held // taken if taken else 0
    map = map_of_store(room, held, sum(each.kept for each in moving), sum(each.fetched for each in moving))
    return host, TierLook("store", room, held, map)
