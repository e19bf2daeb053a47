"""A radix tree from token prefixes to the pages that hold their keys and values.

Everything is whole pages. A key is the int32 bytes of whole pages of keys, one a token (keys.py: for text, its id), so
that finding a prefix is one dictionary look-up and one memcmp a node; nodes split at page borders only.

    root ── A: 3 pages ──┬── B: 1 page        A request that uses B holds a lock on B and on A. What nobody
                         └── C: 2 pages       locks may be evicted, leaves first, least recently used first,
                                              but for leaves that are pinned, until nobody pins them.

Each salt has a root of its own, so that requests of different salts never share a page. The key of a state is no
token's, so a state is a leaf at the end of its prefix (sched/states.py).
The idea of caching prefixes in a radix tree is SGLang's (Zheng et al. 2024, arXiv:2312.07104).
Left out: what lies below device memory (tiers.py); sharing of parts of pages.
"""

from heapq import heapify, heappop, heappush

from engine.cache.keys import STATE

STATE_KEY = STATE.to_bytes(4, "little", signed=True)


class Node:
    """An edge and its end: `key` leads here from `parent`, and `pages` hold its keys and values.

    A root has no parent and no pages; its key is its salt."""

    __slots__ = ("children", "key", "locks", "pages", "parent", "pins", "queued", "tick")

    def __init__(self, key: bytes, pages: list[int], parent: "Node | None", locks: int = 0, tick: int = 0) -> None:
        self.key = key
        self.pages = pages
        self.parent = parent
        self.children: dict[bytes, Node] = {}  # by the bytes of their first page
        self.locks = locks  # requests that use this node or one below it
        self.pins = 0  # that end here (pins.py)
        self.tick = tick  # when it was used last: when a lock went
        self.queued = False  # has an entry in the tree's eviction queue


def _alike(one: bytes, other: bytes) -> bool:
    """Whether both are tokens, or both a state, which is a leaf of its own."""
    return (one[:4] == STATE_KEY) == (other[:4] == STATE_KEY)


class RadixTree:
    """The pages of prefixes computed before, or planned to be. `size` pages, `evictable` of them not locked."""

    def __init__(self, page_size: int) -> None:
        self._stride = 4 * page_size  # bytes of key to a page
        self._roots: dict[bytes, Node] = {}  # by salt; those that have children
        self.size = 0
        self.evictable = 0
        self._tick = 0
        # Unlocked leaves as (tick, node). Lazy: an entry may be out of date, and then says too early a tick or
        # a node that is no unlocked leaf now; but each unlocked leaf has exactly one. Two unlocked leaves never
        # share a tick, as one unlock walks one path.
        self._queue: list[tuple[int, Node]] = []

    # ── finding ──────────────────────────────────────────────────────────────────────────────

    def match(self, key: bytes, salt: bytes = b"") -> tuple[Node, list[int]]:
        """The longest cached prefix of `key` in whole pages: the node where it ends, and its pages.

        To use the pages, lock the node before any other call of the tree."""
        root = self._root(salt)
        path, _, part = self._descend(root, key)
        if not path:
            return root, []
        path[-1] = self._cut(path[-1], part)
        return path[-1], [page for node in path for page in node.pages]

    def pages(self, key: bytes, salt: bytes = b"") -> list[int]:
        """The pages that `match` would give; changes nothing."""
        path, at, _ = self._descend(self._root(salt), key)
        return [page for node in path for page in node.pages][: at // self._stride]

    def match_length(self, key: bytes, salt: bytes = b"") -> int:
        """How many pages `match` would give; changes nothing."""
        return self._descend(self._root(salt), key)[1] // self._stride

    def ends(self, key: bytes, salt: bytes = b"") -> list[tuple[Node, int]]:
        """The nodes that end on the way along `key`, the first one first, and how many of its bytes lead there."""
        path, at, part = self._descend(self._root(salt), key)
        if path and part < len(path[-1].key):
            at -= part
            path.pop()
        found: list[tuple[Node, int]] = []
        for node in reversed(path):
            found.append((node, at))
            at -= len(node.key)
        return found[::-1]

    def _root(self, salt: bytes) -> Node:
        """The root of `salt`; a new one counts only once `extend` has given it a child."""
        return self._roots.get(salt) or Node(salt, [], None)

    def _descend(self, node: Node, key: bytes) -> tuple[list[Node], int, int]:
        """Follow `key` below `node`: the nodes matched, the bytes matched in all, and in the last node."""
        path: list[Node] = []
        at = part = 0
        while child := node.children.get(key[at : at + self._stride]):
            path.append(child)
            part = self._common(child.key, key, at)
            at += part
            if part < len(child.key):
                break
            node = child
        return path, at, part

    def _common(self, edge: bytes, key: bytes, at: int) -> int:
        """Bytes of whole pages that `edge` and `key[at:]` share; their first page is known to be equal."""
        if key.startswith(edge, at):
            return len(edge)
        stride = self._stride
        low, high = 1, min(len(edge), len(key) - at) // stride  # pages known to be shared, and at most shared
        while low < high:
            middle = (low + high + 1) // 2
            if edge[low * stride : middle * stride] == key[at + low * stride : at + middle * stride]:
                low = middle
            else:
                high = middle - 1
        return low * stride

    def head(self, node: Node, count: int) -> Node:
        """The node that ends with the first `count` pages of `node`, at least one of them."""
        return self._cut(node, count * self._stride)

    def _cut(self, node: Node, length: int) -> Node:
        """The node that ends `length` bytes into `node`'s key. `node` stays the lower half, so that the
        requests that point at it still point at the end of their prefix."""
        if length == len(node.key):
            return node
        assert node.parent is not None and 0 < length < len(node.key)
        count = length // self._stride
        upper = Node(node.key[:length], node.pages[:count], node.parent, node.locks, node.tick)
        node.parent.children[upper.key[: self._stride]] = upper
        node.key, node.pages, node.parent = node.key[length:], node.pages[count:], upper
        upper.children[node.key[: self._stride]] = node
        return upper

    # ── using ────────────────────────────────────────────────────────────────────────────────

    def lock(self, node: Node) -> None:
        """Keep `node` and all above it from being evicted."""
        while node.parent is not None:
            if not node.locks:
                self.evictable -= len(node.pages)
            node.locks += 1
            node = node.parent

    def unlock(self, node: Node, *, used: bool = True) -> None:
        """Undo one `lock`. The prefix counts as `used` just now, or when it was used before."""
        self._tick += used
        while node.parent is not None:
            node.locks -= 1
            assert node.locks >= 0, "a node is unlocked more often than locked"
            if used:
                node.tick = self._tick
            if not node.locks:
                self.evictable += len(node.pages)
                if not node.children and not node.queued:
                    self._enqueue(node)
            node = node.parent

    def pin(self, node: Node) -> None:
        """Evict neither `node` nor what is above it before it is unpinned; it counts as evictable none the less."""
        node.pins += 1

    def unpin(self, node: Node) -> None:
        """Undo one `pin`."""
        node.pins -= 1
        assert node.pins >= 0, "a node is unpinned more often than pinned"
        if not (node.pins or node.locks or node.children or node.queued):
            self._enqueue(node)

    def extend(self, node: Node, key: bytes, pages: list[int]) -> tuple[Node, list[int]]:
        """Add the prefix that goes on from `node` with `key`, held in `pages`. The caller has locked `node`;
        its lock moves to the node returned, where the longer prefix ends.

        The list returned is the tree's own pages for the leading part of `key` that it holds already: the
        caller keeps as many of its `pages`, and the tree owns the rest from now on."""
        assert len(key) == len(pages) * self._stride
        if node.parent is None:
            node = self._roots.get(node.key, node)  # somebody else of this salt may have been first
        path, at, part = self._descend(node, key)
        if path:
            path[-1] = self._cut(path[-1], part)
        for passed in path:
            if not passed.locks:
                self.evictable -= len(passed.pages)
            passed.locks += 1
        held = [page for passed in path for page in passed.pages]
        end = path[-1] if path else node
        key, pages = key[at:], pages[len(held) :]
        self.size += len(pages)
        if not pages:
            return end, held
        if end.parent is None:
            self._roots[end.key] = end
        elif end is node and node.locks == 1 and not node.pins and not node.children and _alike(node.key, key):
            node.key += key  # nobody but the caller stands here: a prompt that comes in chunks is one node
            node.pages += pages
            return node, held
        leaf = end.children[key[: self._stride]] = Node(key, pages, end, locks=1)
        return leaf, held

    # ── giving back ──────────────────────────────────────────────────────────────────────────

    def evict(self, count: int) -> list[int]:
        """Forget up to `count` pages that nobody locks or pins: the ends of the least recently used leaves."""
        freed: list[int] = []
        while self._queue and len(freed) < count:
            tick, node = heappop(self._queue)
            node.queued = False
            if node.locks or node.pins or node.children:
                continue  # is queued again when it becomes a leaf that nobody locks or pins
            if tick < node.tick:
                self._enqueue(node)
                continue
            keep = max(0, len(node.pages) - (count - len(freed)))
            freed += node.pages[keep:]
            if keep:
                node.key, node.pages = node.key[: keep * self._stride], node.pages[:keep]
                self._enqueue(node)
            else:
                self._drop(node)
        self.size -= len(freed)
        self.evictable -= len(freed)
        return freed

    def clear(self) -> list[int]:
        """Forget all pages that nobody locks; nobody may pin any. `evict` would look for the oldest leaf each time."""
        gone: list[Node] = []
        for salt, root in list(self._roots.items()):
            stay = [root]
            for node in stay:
                stay += (children := [child for child in node.children.values() if child.locks])
                gone += [child for child in node.children.values() if not child.locks]
                node.children = {child.key[: self._stride]: child for child in children}
            if not root.children:
                del self._roots[salt]
        for node in gone:
            assert not node.pins, "what is pinned is cleared"
            gone += node.children.values()
        self._queue = [entry for entry in self._queue if entry[1].locks]
        heapify(self._queue)
        freed = [page for node in gone for page in node.pages]
        self.size -= len(freed)
        self.evictable -= len(freed)
        return freed

    def coldest(self, count: int) -> list[tuple[Node, list[int]]]:
        """The `count` pages that `evict` would forget, by the nodes that they are the ends of; changes nothing."""
        queue, skipped = self._queue.copy(), set[Node]()
        left: dict[Node, int] = {}  # children that do not give way, of nodes of which some do
        found: list[tuple[Node, list[int]]] = []
        while queue and count > 0:
            tick, node = heappop(queue)
            if node.locks or node.pins or left.get(node, len(node.children)):
                skipped.add(node)
                continue
            if tick < node.tick:
                heappush(queue, (node.tick, node))
                continue
            found.append((node, node.pages[-count:]))
            count -= len(found[-1][1])
            above = node.parent
            assert above is not None
            left[above] = left.get(above, len(above.children)) - 1
            if above.parent is not None and not left[above] and (not above.queued or above in skipped):
                heappush(queue, (above.tick, above))
        return found

    def below(self, key: bytes, salt: bytes = b"") -> list[Node]:
        """The nodes of all that begins with `key`, a token at least, and of no more: parents first. `key` need not be
        whole pages; a page that begins within it is of these, one that ends within it is not."""
        whole = (len(key) - 4) // self._stride * self._stride
        root = self._root(salt)
        path, at, part = self._descend(root, key[:whole])
        if at < whole:
            return []
        end = self._cut(path[-1], part) if path else root
        found = [child for child in end.children.values() if child.key.startswith(key[whole:])]
        for node in found:
            found += node.children.values()
        return found

    def remove(self, nodes: list[Node]) -> list[int]:
        """Forget `nodes`, which nobody locks or pins, with all that go on from them; their pages."""
        gone = set(nodes)
        self._queue = [entry for entry in self._queue if entry[1] not in gone]
        heapify(self._queue)
        for node in nodes:
            assert node.parent is not None and not (node.locks or node.pins), "what is used is removed"
            if node.parent not in gone:
                self._drop(node)
        freed = [page for node in nodes for page in node.pages]
        self.size -= len(freed)
        self.evictable -= len(freed)
        return freed

    def _drop(self, node: Node) -> None:
        """Take a node from its parent, which may be a leaf then."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.key[: self._stride]]
        if parent.parent is None:
            if not parent.children:
                del self._roots[parent.key]
        elif not (parent.locks or parent.children or parent.queued):
            self._enqueue(parent)

    def _enqueue(self, node: Node) -> None:
        node.queued = True
        heappush(self._queue, (node.tick, node))

    # ── looking ──────────────────────────────────────────────────────────────────────────────

    def nodes(self) -> list[Node]:
        """Every node but the roots, parents first."""
        found = list(self._roots.values())
        for node in found:
            found += node.children.values()
        return found[len(self._roots) :]

    def roots(self) -> list[Node]:
        """The roots that have children."""
        return list(self._roots.values())

    def path(self, node: Node) -> list[int]:
        """The pages from the root to the end of `node`."""
        parts = []
        while node.parent is not None:
            parts.append(node.pages)
            node = node.parent
        return [page for pages in reversed(parts) for page in pages]

    def check_integrity(self) -> None:
        """Assert what always holds: keys, locks, counts and the eviction queue fit together."""
        nodes = self.nodes()
        assert all(root.children and root.key == salt for salt, root in self._roots.items()), "an empty root is kept"
        assert self.size == sum(len(node.pages) for node in nodes), "size is not the number of pages"
        assert self.evictable == sum(len(node.pages) for node in nodes if not node.locks), "evictable is wrong"
        queue = {node for _, node in self._queue}
        assert len(queue) == len(self._queue), "a node is queued twice"
        for node in nodes:
            assert node.pages and len(node.key) == len(node.pages) * self._stride, "key and pages differ in length"
            assert node.parent is not None and node.parent.children[node.key[: self._stride]] is node
            assert node.locks >= sum(child.locks for child in node.children.values()), "a locked node is unprotected"
            assert node.queued == (node in queue)
            assert node.locks or node.pins or node.children or node.queued, "an unlocked leaf would never be evicted"
