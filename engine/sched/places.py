"""Which pages a request has: those of its prefix that the cache holds, and pages of its own; and what it waits for.

    waiting ──place──> running ──share, as it is computed──> in the tree ──free──> cached, or free

Where there are tiers below the device, a waiting request whose next pages lie there does not run yet: they come up
first, beside the steps of all that run, and it keeps its place in the queue. It waits only where the device has room
for all of its prompt, so what comes up for it is not pushed out again. If they do not come, it computes them. Where
pages have to go down before it can have their room, it waits for that, too, so that no step does. A request that asks
for a vector has no pages.

Tiers are told of a page once it is sure to be right: of one that shows a medium, once the step that makes the medium is
over, whoever has it made. So what a medium spoils that cannot be made lies in the tree alone. Where a move holds pages
there, of before the medium was made anew, all are forgotten once it is over, and until then no request begins.
"""

from collections.abc import Iterable, Sequence

from engine.cache.names import PageNames
from engine.cache.pages import CachePages
from engine.messages.request import Admit
from engine.sched.columns import StepColumns
from engine.sched.encoder import Encoder
from engine.sched.limits import pages_for
from engine.sched.request import Request
from engine.sched.sessions import Below
from engine.sched.states import States

MOST_RISES = 3  # of one request's pages: where they have given way again and again, it computes them
MOST_ROOMS = 16  # moves down that one of them waits for, to have room
LOOKED_AT = 8  # requests of the queue whose pages may come up before their turn


class Places:
    """Gives requests pages of `page_size` tokens out of `pages`; with `reuse`, those of the tree too. What they show
    is made by `encoder`. A copy of a request's states takes `state_pages`."""

    def __init__(self, pages: CachePages, page_size: int, reuse: bool, encoder: Encoder, state_pages: int = 0) -> None:
        self.pages, self.pool, self.tree, self.tiers = pages, pages.pool, pages.tree, pages.tiers
        self._page_size = page_size
        self._reuse = reuse
        self._encoder = encoder
        self.states = States(pages, page_size, state_pages if reuse else 0)
        self._spoiled: list[tuple[bytes, bytes]] = []  # salts and beginnings of texts that are to be forgotten

    def know(self, request: Request, admit: Admit) -> None:
        """What is to be remembered of a request that comes: the blocks of its text, and the names of its pages."""
        request.named = self.pages.named(admit.blocks)
        if self.tiers is not None and self._reuse and not request.pools:
            whole = request.prompt_len // self._page_size
            held = self.tree.pages(request.key(0, whole * self._page_size), request.salt)
            names = admit.names or self.tiers.device.named(held)
            request.names = PageNames(request.salt, self._page_size, request.key, names)
            request.names.upto(whole)  # now, and not while a step is planned

    # ── before it runs ───────────────────────────────────────────────────────────────────────

    def place(self, request: Request, running: int) -> bool:
        """Give a waiting request pages for all its tokens, if as many are left as there are `running` rows: each of
        those soon needs its next page, and none should be retracted for a newcomer."""
        alone = bool(self.states) and not running  # nobody makes room, so there may be some without a state alone
        if not (self._match(request, running, self._known(request)) or (alone and self._match(request, running, b""))):
            return False
        if self.states:
            self.states.begin(request)
        request.rooms = 0
        request.shared = len(request.pages)
        request.computed = request.shared * self._page_size
        request.pages += self.pages.take(pages_for(len(request.ids), self._page_size) - request.shared)
        if request.named is not None:
            self.pages.name(request.named, request.pages, request.shared)
        self._count(request)
        if self._told(request):
            assert self.tiers is not None and request.names is not None and request.node is not None
            self._hit(request)
            request.told = request.shared
        return True

    def _hit(self, request: Request) -> None:
        """Tell the tiers of the pages that a request begins with, and of its state."""
        assert self.tiers is not None and request.names is not None and request.node is not None
        names, pages, end = request.names.upto(request.shared), request.pages[: request.shared], request.node
        if request.state and (leaf := self.states.leaf(end)) is not None:
            names, pages, end = names[: request.shared], [*pages, *request.state], leaf
            names += self.states.names(names)
        self.tiers.hit(end, names, pages)

    def _count(self, request: Request) -> None:
        """Of a prompt that runs for the first time: what it asks for, and what it found."""
        if self.tiers is not None and request.names is not None and request.cached < 0:
            whole = request.prompt_len // self._page_size
            self.tiers.ceiling.ask(request.names.upto(whole)[:whole], known=request.shared)
            self.tiers.counts.from_device += max(0, request.shared - request.risen)

    def _known(self, request: Request) -> bytes:
        """The key of what a waiting request may find in the tree: with recurrent layers, up to the last state there."""
        key = request.reusable(self._page_size)
        return self.states.known(key, request.salt) if self.states else key

    def _wanted(self, request: Request) -> bytes:
        """As `_known`, of what it may find in the tree and below."""
        key = request.reusable(self._page_size)
        if not self.states:
            return key
        assert self.tiers is not None and request.names is not None
        pages, known = len(key) // (4 * self._page_size), self.states.known(key, request.salt)
        names, held = request.names.upto(pages)[:pages], self.tree.match_length(key, request.salt)
        return self.states.below(key, names, held, known, self.tiers.host)

    def _lacking(self, request: Request) -> list[bytes]:
        """The names of the pages that a waiting request lacks first: of its tokens, and of the state before these."""
        assert self.tiers is not None and request.names is not None
        key = request.reusable(self._page_size)
        held, pages = self.tree.match_length(key, request.salt), len(key) // (4 * self._page_size)
        names = request.names.upto(pages)[:pages]
        reach = held + self.tiers.host.run(names, held, pages)
        state = self.states.names(names[:reach])
        return [*names[reach : reach + 1], *state[self.tiers.host.run(state, 0, len(state)) :][:1]]

    def _names(self, request: Request, key: bytes) -> list[bytes]:
        """Of the pages that `key` leads to, which `_known` or `_wanted` has given."""
        assert request.names is not None
        count = self.states.tokens(key)
        names = request.names.upto(count)
        return [*names[:count], *self.states.names(names[:count])] if self.states else names

    def _match(self, request: Request, running: int, key: bytes) -> bool:
        """Lock what the tree holds of `key`, a waiting request's, unless that does not fit."""
        if self._reuse:
            request.node, request.pages = self.tree.match(key, request.salt)
            self.tree.lock(request.node)  # before looking at what is available: these pages no longer are
        missing = self.states.lacks(key, request.pages, pages_for(len(request.ids), self._page_size))
        if missing + running > self.pages.available:
            if request.node is not None:
                self.tree.unlock(request.node)
            request.leave()
            return False
        return True

    def waits(self, request: Request, running: int, *, turn: bool = True) -> bool:
        """Whether pages of a waiting request come up, or begin to now: then it does not run yet. Nor does it where it
        could find pages that are forgotten, and stay only until they are copied. At its `turn` it waits for a store
        only if that is worth it; before, it waits for the device anyway."""
        if self.states and self.states.comes(request):
            return True
        if self.tiers is None or request.names is None:
            return False
        if self._spoiled or self.tiers.sweeping or self.tiers.under_way(request.rise):
            return True
        if request.rises == MOST_RISES:
            return False
        key = self._wanted(request)
        stride = 4 * self._page_size
        last, held = len(key) // stride, self.tree.match_length(key, request.salt)
        names = self._names(request, key)
        if held < last and (number := self.tiers.rising(names[held])):
            request.rise = number
            return True
        count = self.tiers.host.run(names, held, last)
        lacking = self._lacking(request) if self.states else names[held + count : last][:1]
        if any(self.tiers.awaits(name, running if turn else None) for name in lacking):
            return True
        # A part of a state is none.
        rises = 0 < count == last - held if self.states else count >= self.tiers.options.least_risen
        if (rises or turn) and self._makes_room(request, names[: held + count], running):
            return True
        if not rises:
            return False
        if not self._match(request, running, key):  # pages of a state take room that computing it would not
            request.rooms += bool(self.states)
            return bool(self.states) and request.rooms <= MOST_ROOMS and any(self.tiers.nodes())
        assert request.node is not None and len(request.pages) == held
        self.tiers.device.used(names, request.pages)
        pages = self.pages.take(count)
        # What gave way for them may have gone down, and pushed out some of what was to come up.
        count = self.tiers.host.run(names, held, held + count)
        count = 0 if self.states and held + count < last else count
        self.pool.give(pages[count:])
        if not count:
            self.tree.unlock(request.node)
            request.leave()
            return False
        key = key[held * stride : (held + count) * stride]
        request.rise = self.tiers.rise(request.node, key, names, held, pages[:count])
        request.rises += 1
        request.risen += count
        request.leave()  # the lock is the move's now
        return True

    def _makes_room(self, request: Request, names: Sequence[bytes], running: int) -> bool:
        """Whether pages go down before a waiting request takes theirs, as else the next step would wait for that. It
        has `names`, on the device and below. They are used by now, so they do not give way for that."""
        assert self.tiers is not None
        needed, key = pages_for(len(request.ids), self._page_size) + self.states.each, self._known(request)
        if self.tiers.ready >= needed or request.rooms == MOST_ROOMS or not self._match(request, running, key):
            return False
        assert request.node is not None
        self.tiers.device.used(self._names(request, key), request.pages)
        if not request.rooms:
            self.tiers.host.touch(reversed(names))
        request.rise = self.tiers.make_room(needed - len(request.pages))
        request.rooms += request.rise > 0
        self.tree.unlock(request.node)
        request.leave()
        return request.rise > 0

    def look_ahead(self, queue: Iterable[Request], running: int) -> None:
        """Let pages come up for those that wait, as far as there is room for all of these beside each other. Else what
        has come up for one would give way for the next before it runs, and come up again."""
        assert self.tiers is not None
        room = self.pages.available + sum(map(len, self.tiers.own_pages())) - running
        for request, _ in zip(queue, range(LOOKED_AT), strict=False):
            if not request.pools:
                room -= pages_for(len(request.ids), self._page_size)
            if room < 0:
                return
            self.waits(request, running, turn=False)

    def cached(self, request: Request) -> int:
        """How many tokens of a waiting request need not be computed."""
        if not self._reuse:
            return 0
        key = self._known(request)
        if self.states:
            return max(0, len(key) - len(self.states.key)) // 4
        held = self.tree.match_length(key, request.salt)
        if self.tiers is not None and request.names is not None:
            last = len(key) // (4 * self._page_size)
            held += self.tiers.host.run(request.names.upto(last), held, last)
        return held * self._page_size

    # ── while it runs ────────────────────────────────────────────────────────────────────────

    def share(self, request: Request, end: int) -> range:
        """Hand the tree the whole pages before position `end`. Where it has the same already, `request` takes
        the tree's and frees its own: the indices of pages so changed."""
        first, last = request.shared, end // self._page_size
        if request.node is None or last <= first or self._writes_over(request, last):
            return range(0)
        key = request.key(first * self._page_size, last * self._page_size)
        request.node, held = self.tree.extend(request.node, key, request.pages[first:last])
        changed = slice(first, first + len(held))
        self.pool.give(request.pages[changed])
        request.pages[changed] = held
        request.shared = last
        if request.named is not None:
            self.pages.name(request.named, request.pages, last)
        if request.told == first:
            request.told = changed.stop  # the tree had them
        self._lower(request)
        return range(changed.start, changed.stop)

    def _writes_over(self, request: Request, last: int) -> bool:
        """Whether to take the tree's pages, of `last` in all, would have a step write there what may be spoiled. They
        may be right, of before the medium was made anew, and on their way down."""
        if not self._encoder.makes(request):
            return False
        return self.tree.match_length(request.key(0, last * self._page_size), request.salt) > request.shared

    def mark(self, step: StepColumns, request: Request, running: int) -> None:
        """A chunk of the prompt of `request` is planned in `step`: its state is kept before, where that is marked."""
        if (leaf := self.states.mark(step, request, running)) is not None:
            request.untold.append(leaf)
            self._lower(request)

    def _lower_states(self, request: Request) -> None:
        """Tell the tiers of states that the tree has by now."""
        untold, request.untold = request.untold, []
        for leaf in filter(self.states.alive, untold):
            assert self.tiers is not None and request.names is not None
            pages = self.tree.path(leaf)
            count = len(pages) - self.states.each
            names = request.names.upto(count)[:count]
            self.tiers.shared(leaf, [*names, *self.states.names(names)], count, pages[count:])

    def _told(self, request: Request) -> bool:
        """Whether tiers are told of the pages of a running request, as things are."""
        return request.names is not None and request.node is not None and not self._encoder.makes(request)

    def _lower(self, request: Request) -> None:
        """Tell the tiers of pages that the tree has by now."""
        if request.told < request.shared and self._told(request):
            assert self.tiers is not None and request.names is not None and request.node is not None
            first, names = request.told, request.names.upto(request.shared)
            self.tiers.shared(request.node, names, first, request.pages[first : request.shared])
            request.told = request.shared
        if request.untold and self._told(request):
            self._lower_states(request)

    def made(self, numbers: Iterable[int], running: Iterable[Request]) -> None:
        """A step that made these media is over: pages of those who show them are right."""
        self._encoder.made(numbers)
        for request in running:
            if request.shown:
                self._lower(request)

    def spoiled(self, number: int) -> None:
        """Medium `number` could not be made, and who uses it runs no more: forget what was computed behind it."""
        texts = self._encoder.texts(number)
        assert texts, f"medium {number} was made for nobody"
        self._spoiled += texts
        self._encoder.forget(number)
        self.moved()

    def moved(self) -> None:
        """A move is over: forget what is spoiled, if none holds pages of it any longer."""
        if self._spoiled:
            self._spoiled = [(salt, key) for salt, key in self._spoiled if not self.pages.forget(key, salt)]
            held = self.tiers is not None and any(self.tiers.nodes())
            assert held or not self._spoiled, "only moves hold pages of requests that run no more"

    def grow(self, step: StepColumns, request: Request, position: int, running: int) -> None:
        """`request` decodes, and `step` computes `position`, the first of a page: its state is kept now and then."""
        if request.keeps is not None and request.keeps[0] <= len(request.ids):
            step.set_pages(request, self.share(request, request.keeps[0]))
            self.states.settle(request, request.keeps[0])
        self.states.grow(step, request, position, running)

    def free(self, request: Request, end: int) -> None:
        """Take back all pages; those of tokens before position `end` stay in the cache."""
        if request.keeps is not None:
            self.share(request, min(request.keeps[0], end))
            self.states.settle(request, min(request.keeps[0], end))
        self.states.forget(request)
        if request.leaf is not None:
            request.untold.append(request.leaf)
        self.share(request, end)
        self._lower(request)
        self.pool.give(request.pages[request.shared :])
        if request.node is not None:
            self.tree.unlock(request.node)
        if request.session is not None or request.program is not None:
            self._keep_below(request)

    def _keep_below(self, request: Request) -> None:
        """Somebody may come back to its pages: in the host they are of those that are asked for again."""
        if self.tiers is None or request.names is None:
            return
        names = request.names.upto(request.shared)[: request.shared]
        self.tiers.device.again(names, request.pages[: request.shared])
        if request.node is not None and (leaf := self.states.last(request.node)) is not None:
            pages = self.tree.path(leaf)
            state = self.states.names(names[: len(pages) - self.states.each])
            self.tiers.device.again(state, pages[-self.states.each :])
        if request.session is not None:
            request.session.below = Below(self.tiers.host, names)

    def sweep(self) -> None:
        """Moves that held pages at a flush are over: forget these, too."""
        self.pages.evict(self.tree.evictable)
