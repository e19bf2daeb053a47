"""Whether pages, locks and requests fit together: for tests, and for an engine that is idle."""

from collections import Counter
from collections.abc import Sequence

from engine.cache.pool import PagePool
from engine.cache.radix import Node, RadixTree
from engine.sched.request import Request


def check_pages(tree: RadixTree, pool: PagePool, running: Sequence[Request]) -> None:
    """Assert that each page is free, in the tree or one of the `running` requests' own, and each lock one's of them."""
    tree.check_integrity()
    pool.check_integrity(
        [node.pages for node in tree.nodes()] + [request.pages[request.shared :] for request in running]
    )
    locks: Counter[Node] = Counter()
    for request in running:
        shared = [] if request.node is None else tree.path(request.node)
        assert shared == request.pages[: request.shared], f"{request.rid} strays from the tree"
        node = request.node
        while node is not None and node.parent is not None:
            locks[node] += 1
            node = node.parent
    assert all(node.locks == locks[node] for node in tree.nodes()), "a lock outlives its request"
