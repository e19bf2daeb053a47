"""States of recurrent layers at the ends of cached prefixes: who begins with one, and when one is kept. Pure.

    prompt     ▓▓▓▓▓▓▓▓ cached ▓▓▓▓▓▓▓▓|░░░░░░░ computed ░░░░░░░|░ tail      a chunk ends at each mark: where another
                                       |                        |            text branches off, and of a long prompt
                                     mark                     mark           at the end of its last whole page
    tree       ── 20 pages ──┬── 7 pages ──┬── 2 pages             ◆         a copy of a state, in pages of its own,
                             ◆             ◆                                 is a leaf, whose key is no token's

A page holds keys and values of its tokens, and so serves whoever has the same prefix. A recurrent layer has one state
of a request, which stands for all tokens so far: to begin behind a prefix, its state there is needed as well. So copies
are kept, where steps begin and the end of a page is reached: of a prompt at marks, of a reply at its first page and at
intervals, of which the last one stays. A copy takes as many pages as its bytes need, of the same pool. It is a leaf of
the tree at the end of its prefix. So it gives way by itself, by when it was used, and moves between tiers as any pages
do.

SGLang keeps such states in a pool of its own, and vLLM with blocks that are as large. Left out: drafts, which a state
cannot take back; marks of a prompt that is shorter than LEAST.
"""

from array import array
from collections.abc import Iterable

from engine.cache.host import HostPages
from engine.cache.keys import STATE
from engine.cache.names import first_of_state, state_names
from engine.cache.pages import CachePages
from engine.cache.radix import Node
from engine.messages.step import KeptState
from engine.sched.columns import StepColumns
from engine.sched.request import Request

LEAST = 64  # tokens that a state spares, or it is not kept
CUT = 1024  # the same, for the end of a prompt to be a mark: that costs its request a step, and a page later nothing
INTERVAL = 256  # tokens of a reply


class States:
    """Copies of states in `pages`, of `each` pages; 0 where the model has no states."""

    def __init__(self, pages: CachePages, page_size: int, each: int) -> None:
        self._pages, self._tree = pages, pages.tree
        self._page_size, self.each = page_size, each
        self.least, self.cut, self.interval = LEAST, CUT, INTERVAL
        self._page = array("i", [STATE] * page_size).tobytes()
        self.key = self._page * each  # which leads from the end of a prefix to its state
        self._due: set[Node] = set()  # ends of prefixes whose states the next step keeps

    def __bool__(self) -> bool:
        """Whether the model has states."""
        return bool(self.each)

    # ── where a request begins ───────────────────────────────────────────────────────────────

    def known(self, key: bytes, salt: bytes) -> bytes:
        """What leads along `key` to the last state that there is: a prefix of it and the key of states; nothing where
        there is none."""
        for node, length in reversed(self._tree.ends(key, salt)):
            if self.leaf(node) is not None:
                return key[:length] + self.key
        return b""

    def leaf(self, node: Node) -> Node | None:
        """The leaf that has the state at the end of `node`, if all of that is there."""
        count, child = 0, node.children.get(self._page)
        while child is not None:
            count += len(child.pages)
            if count == self.each:
                return child
            child = child.children.get(self._page)
        return None

    def alive(self, leaf: Node) -> bool:
        """Whether `leaf`, of a prefix that somebody has, is still there: it may have given way."""
        return leaf.parent is not None and self.leaf(leaf.parent) is leaf

    def last(self, node: Node | None) -> Node | None:
        """The leaf of the last state on the way to `node`."""
        while self and node is not None and node.parent is not None:
            if (leaf := self.leaf(node)) is not None:
                return leaf
            node = node.parent
        return None

    def names(self, prefix: list[bytes]) -> list[bytes]:
        """What tiers know the pages of the state by at the end of the pages of these names."""
        return state_names(prefix[-1], self.each) if prefix else []

    def below(self, key: bytes, names: list[bytes], held: int, known: bytes, host: HostPages) -> bytes:
        """What leads along `key`, whose pages have these `names`, to the last state that there is with what lies in the
        `host`, where the device has the first `held` pages and the `known` state."""
        if not key:
            return known
        last = held + host.run(names, held, len(names))
        for count in range(last, max(0, self.tokens(known)), -1):
            begins = first_of_state(names[count - 1]) in host.names
            if begins and host.run(self.names(names[:count]), 0, self.each) == self.each:
                return key[: count * len(self._page)] + self.key
        return known

    def tokens(self, key: bytes) -> int:
        """The pages of tokens in what leads to a state, or in any key where the model has none."""
        return len(key) // len(self._page) - (self.each if key else 0)

    def lacks(self, key: bytes, pages: list[int], needed: int) -> int:
        """How many pages a request takes that has matched `pages` by `key` and is to have `needed` for its tokens."""
        tokens, whole = self.tokens(key), len(key) // len(self._page)
        return needed - min(len(pages), tokens) + min(whole - tokens, whole - len(pages))

    def begin(self, request: Request) -> None:
        """`request` has matched what `known` gave: its lock is on the leaf, and moves to the end of the prefix. It is
        known where it will keep its state."""
        held = max(0, len(request.pages) - self.each)
        if request.pages:
            request.pages, request.state = request.pages[:held], request.pages[held:]
            leaf, request.node = request.node, self._above(request.node)
            assert leaf is not None and request.node is not None
            self._tree.lock(request.node)
            # If others go on from there it is used, and else a later one will take its place.
            self._tree.unlock(leaf, used=len(request.node.children) > 2)
        request.kept = held * self._page_size
        request.marks = self._marks(request)

    def _above(self, node: Node | None) -> Node | None:
        while node is not None and node.key.startswith(self._page):
            node = node.parent
        return node

    def _marks(self, request: Request) -> list[int]:
        """Positions at which `request`, whose prompt is about to be computed, keeps its state."""
        key = request.key(0, (len(request.ids) - 1) // self._page_size * self._page_size)
        found: list[int] = []
        for position, least in ((self._branch(key, request.salt), self.least), (len(key) // 4, self.cut)):
            spared = position - (found[-1] if found else request.kept)
            whole = any(each.whole and 0 < position - each.begin < each.count for each in request.shown)
            if spared >= least and not whole:
                found.append(position)
        return found

    def _branch(self, key: bytes, salt: bytes) -> int:
        """The tokens of `key` that are cached, if that is all of it or another text goes on from there."""
        ends = self._tree.ends(key, salt)
        held = self._tree.match_length(key, salt) * self._page_size
        within = held * 4 > (ends[-1][1] if ends else 0)
        goes_on = bool(ends) and any(child != self._page for child in ends[-1][0].children)
        return held if within or goes_on or held * 4 == len(key) else 0

    # ── what is kept ─────────────────────────────────────────────────────────────────────────

    def comes(self, request: Request) -> bool:
        """Whether the next step keeps a state that a waiting request would begin with."""
        if not self._due:
            return False
        ends = self._tree.ends(request.reusable(self._page_size), request.salt)
        last = next((at for at, (node, _) in enumerate(reversed(ends)) if self.leaf(node) is not None), len(ends))
        return any(node in self._due for node, _ in ends[len(ends) - last :])

    def due(self, request: Request) -> bool:
        """Whether a chunk of `request` that is planned ends at a mark: its state is kept before the next step."""
        if not request.marks or request.computed != request.marks[0]:
            return False
        if request.node is not None and request.shared * self._page_size == request.computed:
            self._due.add(request.node)
        return True

    def keep(self, step: StepColumns, request: Request, running: int) -> list[int]:
        """Have the state of `request` copied before `step`, if so many `running` rows find a page each then; the pages
        of the copy."""
        if self._pages.available - self.each < running:
            return []
        pages = self._pages.take(self.each)
        step.keeps += (KeptState(request.slot, array("i", pages).tobytes()),)
        return pages

    def mark(self, step: StepColumns, request: Request, running: int) -> Node | None:
        """If `request`, whose prompt is computed, stands at a mark, its state is kept before `step`: the leaf."""
        if not request.marks or request.marks[0] != request.computed:
            return None
        request.marks.pop(0)
        request.kept = request.computed
        if request.node is None or request.shared * self._page_size != request.computed:
            return None  # the prefix is not in the tree
        self._due.discard(request.node)
        if self.leaf(request.node) is not None or not (pages := self.keep(step, request, running)):
            return None
        return self.add(request.node, pages)

    def grow(self, step: StepColumns, request: Request, position: int, running: int) -> None:
        """`request` decodes, and its page ends before `position`, which `step` computes: its state is kept where the
        last one is an interval behind, or that of its prompt is not kept."""
        end = (request.prompt_len - 1) // self._page_size * self._page_size
        least = self.least if request.kept < end else self.interval
        if request.keeps is not None or position - request.kept < least:
            return
        if pages := self.keep(step, request, running):
            request.kept, request.keeps = position, (position, pages)

    def settle(self, request: Request, end: int) -> None:
        """The tree has the tokens of `request` before position `end`, all that will be known if it is nearer than what
        it has kept: that goes to the tree, in place of the one before, or is of no use."""
        assert request.keeps is not None
        (position, pages), request.keeps = request.keeps, None
        if position != end or request.node is None or request.shared * self._page_size != end:
            self._pages.pool.give(pages)
            return
        before, request.leaf = request.leaf, self.add(request.node, pages)
        # It may have given way. What it is behind is locked.
        if before is not None and self.alive(before) and not (before.locks or before.pins):
            self._pages.remove([before])

    def add(self, node: Node, pages: list[int]) -> Node:
        """The leaf of a state at the end of `node`, which is locked; `pages` are the tree's from now on, or free."""
        self._tree.lock(node)
        leaf, held = self._tree.extend(node, self.key, pages)
        self._pages.pool.give(pages[: len(held)])
        self._tree.unlock(leaf)
        return leaf

    def forget(self, request: Request) -> None:
        """`request` runs no more: nobody waits for its state."""
        if request.node is not None:
            self._due.discard(request.node)

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Assert that a state is waited for that some request keeps."""
        ends = {request.node for request in running if request.marks and request.computed == request.marks[0]}
        assert self._due <= ends, "a state is waited for that nobody keeps"
