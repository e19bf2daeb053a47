"""Whether pages, locks, slots and requests fit together: for tests, and for an engine that is idle."""

from collections import Counter
from collections.abc import Sequence

from engine.cache.pages import CachePages
from engine.cache.radix import Node
from engine.sched.request import Request


def check_pages(pages: CachePages, running: Sequence[Request]) -> None:
    """Assert that each of `pages` is free, in the tree or one of the `running` requests' own, and each lock one's of
    them. Moves between tiers may have pages and locks as well."""
    tree, pool, tiers = pages.tree, pages.pool, pages.tiers
    tree.check_integrity()
    moving = [] if tiers is None else tiers.own_pages()
    pool.check_integrity(
        [node.pages for node in tree.nodes()]
        + [request.pages[request.shared :] for request in running]
        + [request.keeps[1] for request in running if request.keeps is not None]
        + moving
    )
    locks: Counter[Node] = Counter()
    ends = [] if tiers is None else list(tiers.nodes())
    for request in running:
        shared = [] if request.node is None else tree.path(request.node)
        assert shared == request.pages[: request.shared], f"{request.rid} strays from the tree"
        if request.node is not None:
            ends.append(request.node)
    for end in ends:
        node: Node | None = end
        while node is not None and node.parent is not None:
            locks[node] += 1
            node = node.parent
    assert all(node.locks == locks[node] for node in tree.nodes()), "a lock outlives its request"
    pins = Counter(pages.pins.nodes())
    assert all(node.pins == pins.pop(node, 0) for node in tree.nodes()) and not pins, "a pin outlives its holder"


def check_slots(slots: range, free: Sequence[int], stop_ids: Counter[int], running: Sequence[Request]) -> None:
    """Assert that each of `slots` is free or one of the `running` requests', and that their stop ids are counted."""
    assert sorted([*free, *(request.slot for request in running)]) == list(slots), "slots are lost or taken twice"
    assert stop_ids == sum((Counter(request.stop_ids) for request in running), Counter())
