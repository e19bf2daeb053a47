"""What is shown of the requests that run and wait: columns, of a bounded number of them.

It is made of what the scheduler keeps anyway, so a scheduler that nobody looks at has nothing to do for it.
"""

from array import array
from collections.abc import Sequence
from itertools import chain, islice

from engine.cache.looking import MOST_PAGES, look_at_pages, look_at_trees
from engine.messages.looking import PagesLook, RowsLook, TreeLook
from engine.sched.batcher import Scheduler
from engine.sched.copies import Copies
from engine.sched.request import Request

MOST_ROWS = 512
MOST_QUEUED = 64
PROMPT, DECODES, ENDS = range(3)


def parts_of(scheduler: Scheduler | Copies) -> Sequence[Scheduler]:
    """The schedulers that have pages: that of each copy of attention, or the one."""
    return scheduler.copies if isinstance(scheduler, Copies) else (scheduler,)


def look_at_rows(parts: Sequence[Scheduler]) -> RowsLook:
    requests = islice(chain.from_iterable(part.running_requests() for part in parts), MOST_ROWS)
    rows = sorted((_row(request) for request in requests), key=lambda row: row[0])
    columns = [array("i", column).tobytes() for column in zip(*rows, strict=True)]
    return RowsLook(*(columns or [b""] * 7))


def _row(request: Request) -> tuple[int, int, int, int, int, int, int]:
    length = len(request.ids)
    phase = DECODES if request.row >= 0 else PROMPT if request.computed < length else ENDS
    computed = length - 1 if phase == DECODES else request.computed
    counts = (request.prompt_len, max(0, request.cached), computed, length - request.prompt_len, len(request.pages))
    return (request.slot, phase, *counts)


def look_at_queue(parts: Sequence[Scheduler]) -> bytes:
    """The lengths of the prompts that wait, first to run first (int32)."""
    queued = chain.from_iterable(part.live.queue for part in parts[:1])  # copies share it
    return array("i", (len(request.ids) for request in islice(queued, MOST_QUEUED))).tobytes()


def look_at_cache(parts: Sequence[Scheduler]) -> tuple[PagesLook, TreeLook]:
    tree = look_at_trees(part.cache.tree for part in parts)
    if not parts or sum(part.cache.pool.size for part in parts) > MOST_PAGES:
        return PagesLook(0, ""), tree
    owners = [
        look_at_pages(part.cache.pool.taken, [(each.pages, each.shared) for each in part.running_requests()])
        for part in parts
    ]
    return PagesLook(owners[0].each, "".join(each.owners for each in owners)), tree
