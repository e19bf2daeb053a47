"""What is shown of the cache: its pages by owner, and the top of its radix tree.

Both are bounded, whatever the cache holds: so many nodes, and so many children of each, the newest first; and of the
pages of running requests so many. Left out: which request has a page.
"""

from array import array
from collections.abc import Iterable, Sequence
from itertools import chain, islice

from engine.cache.radix import Node, RadixTree
from engine.messages.looking import HEAD, PagesLook, TreeLook

MOST_NODES = 256
MOST_CHILDREN = 48  # of a node
MOST_PAGES = 1 << 20  # that a map is made of
MOST_MARKED = 4096  # pages of running requests that are looked at, of either kind
CELLS = 512
FREE, CACHED, SHARED, OWN = b".csr"


def look_at_pages(taken: bytes, holders: Sequence[tuple[Sequence[int], int]]) -> PagesLook:
    """The map of pages. `taken` has a 1 for each that is not free; of each running request `holders` say its pages and
    how many of them, the first ones, are in the tree.

    Where these are many, only one of several is looked at, and stands for them."""
    owners = bytearray(taken.translate(bytes((FREE, CACHED)).ljust(256)))
    shares, owns = sum(shared for _, shared in holders), sum(len(pages) - shared for pages, shared in holders)
    share, own = -(-shares // MOST_MARKED) or 1, -(-owns // MOST_MARKED) or 1
    for number, (pages, shared) in enumerate(holders):
        first = number / len(holders)  # rows that share pages look at different ones of them
        for page in pages[int(first * share) : shared : share]:
            owners[page] = SHARED
        for page in pages[shared + int(first * own) :: own]:
            owners[page] = OWN
    each = -(-len(owners) // CELLS)
    if each <= 1:
        return PagesLook(1, owners.decode())
    cells = (owners[first : first + each] for first in range(0, len(owners), each))
    return PagesLook(each, bytes(_most(cell, share, own) for cell in cells).decode())


def _most(cell: bytearray, share: int, own: int) -> int:
    """The owner of most of its pages, where a shared one stands for so many, and one of a request's own for so many."""
    free = cell.count(FREE)
    taken = len(cell) - free
    if not taken:
        return FREE
    shared, owned = min(taken, share * cell.count(SHARED)), min(taken, own * cell.count(OWN))
    return max((free, FREE), (taken - shared - owned, CACHED), (shared, SHARED), (owned, OWN))[1]


def look_at_trees(trees: Iterable[RadixTree]) -> TreeLook:
    """The nodes nearest to the roots, level by level."""
    nodes: list[tuple[Node, int, bool]] = []  # the node, the place of its parent, and whether its root is salted
    columns = {name: array("i") for name in ("parents", "pages", "locks", "hidden", "heads")}
    for root in chain.from_iterable(tree.roots() for tree in trees):
        nodes += ((child, -1, bool(root.key)) for child in _newest(root, MOST_NODES - len(nodes)))
    for place, (node, parent, salted) in enumerate(nodes):
        below = _newest(node, min(MOST_CHILDREN, MOST_NODES - len(nodes)))
        nodes += ((child, place, salted) for child in below)
        keys = array("i", b"" if salted else node.key[: 4 * HEAD])
        columns["parents"].append(parent)
        columns["pages"].append(len(node.pages))
        columns["locks"].append(node.locks)
        columns["hidden"].append(len(node.children) - len(below))
        columns["heads"] += keys + array("i", [-1] * (HEAD - len(keys)))
    return TreeLook(**{name: column.tobytes() for name, column in columns.items()})


def _newest(node: Node, most: int) -> list[Node]:
    return list(islice(reversed(node.children.values()), max(0, most)))
