"""Whether pages, locks, slots and requests fit together: for tests, and for an engine that is idle."""

from collections import Counter
from collections.abc import Sequence

from engine.cache.pool import PagePool
from engine.cache.radix import Node, RadixTree
from engine.sched.request import Request


def check_pages(tree: RadixTree, pool: PagePool, running: Sequence[Request], pinned: Sequence[Node]) -> None:
    """Assert that each page is free, in the tree or one of the `running` requests' own, and each lock one's of them, or
    of something `pinned`."""
    tree.check_integrity()
    pool.check_integrity(
        [node.pages for node in tree.nodes()] + [request.pages[request.shared :] for request in running]
    )
    locks: Counter[Node] = Counter()
    for request in running:
        shared = [] if request.node is None else tree.path(request.node)
        assert shared == request.pages[: request.shared], f"{request.rid} strays from the tree"
    for node in (*(request.node for request in running), *pinned):
        while node is not None and node.parent is not None:
            locks[node] += 1
            node = node.parent
    assert all(node.locks == locks[node] for node in tree.nodes()), "a lock outlives its request"


def check_slots(slots: range, free: Sequence[int], stop_ids: Counter[int], running: Sequence[Request]) -> None:
    """Assert that each of `slots` is free or one of the `running` requests', and that their stop ids are counted."""
    assert sorted([*free, *(request.slot for request in running)]) == list(slots), "slots are lost or taken twice"
    assert stop_ids == sum((Counter(request.stop_ids) for request in running), Counter())
