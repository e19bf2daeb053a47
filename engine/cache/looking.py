"""The top of a radix tree, to look at: so many nodes, and so many children of each, the newest first.

What it costs is bounded, whatever the cache holds. Left out: who has which pages (maps.py).
"""

from array import array
from collections.abc import Iterable
from itertools import chain, islice

from engine.cache.radix import Node, RadixTree
from engine.messages.looking import HEAD, TreeLook

MOST_NODES = 256
MOST_CHILDREN = 48  # of a node
NONE = array("i", [-1] * HEAD).tobytes()


def look_at_trees(trees: Iterable[RadixTree]) -> TreeLook:
    """The nodes nearest to the roots, level by level."""
    nodes: list[Node] = []
    parents: list[int] = []
    salted: list[bool] = []  # whether its root is
    hidden: list[int] = []
    for root in chain.from_iterable(tree.roots() for tree in trees):
        found = _newest(root, MOST_NODES - len(nodes))
        nodes += found
        parents += [-1] * len(found)
        salted += [bool(root.key)] * len(found)
    for place, node in enumerate(nodes):
        found = _newest(node, min(MOST_CHILDREN, MOST_NODES - len(nodes))) if node.children else []
        hidden.append(len(node.children) - len(found))
        if found:
            nodes += found
            parents += [place] * len(found)
            salted += [salted[place]] * len(found)
    heads = [b"" if is_salted else node.key[: len(NONE)] for node, is_salted in zip(nodes, salted, strict=True)]
    return TreeLook(
        array("i", parents).tobytes(),
        array("i", [len(node.pages) for node in nodes]).tobytes(),
        array("i", [node.locks for node in nodes]).tobytes(),
        array("i", hidden).tobytes(),
        b"".join([head + NONE[len(head) :] for head in heads]),
    )


def _newest(node: Node, most: int) -> list[Node]:
    return list(islice(reversed(node.children.values()), max(0, most)))
