"""The scheduler: which rows run in the next step, and which pages they write.

`plan` runs ahead of the device by as many steps as its caller allows: it assumes that every row survives. A row begins
where its slot stands on the device by then, so a row that got several tokens wastes no step that was planned before
that was known. Only a stop id can prove a plan wrong, and costs one dropped row. `commit` takes the results, in the
order of the plans. A step is built in four parts:

    1. pages for every running row: from the pool, from the cache, or from the request that loses least
    2. decode rows: requests whose tokens but the last are computed
    3. prefill rows: the next chunk of running prompts, while the step's token budget lasts
    4. admissions: waiting requests that find a slot and pages for their whole prompt

The whole pages of a chunk go into the tree when the chunk is planned, because steps run in order and write the keys and
values of all their rows before any row attends. A running prompt leaves no budget for admissions until its last chunk
is planned: thus whoever shares its prefix stays in the queue until the tree offers all of it, and a prefix is computed
once under every policy. A request for a vector has no such life: its prompt is computed whole, in the one step that
places it, without pages.

Left out: preemption by priority while slots and pages last; a request's pages (places.py), and its copy (copies.py).
"""

from array import array
from collections import Counter, deque
from collections.abc import Iterator
from itertools import chain

from engine.cache.blocks import HeldBlocks
from engine.cache.pages import CachePages
from engine.cache.pins import MOST_BRANCHES, PROGRAM_SECONDS, Holder
from engine.cache.tiers import TierOptions, Tiers
from engine.messages.assets import Bound
from engine.messages.reply import Tokens
from engine.messages.request import Admit
from engine.messages.step import StepDone, StepPlan
from engine.plugin.specs import Policy
from engine.sched.chunks import ChunkRule
from engine.sched.columns import StepColumns
from engine.sched.encoder import Encoder
from engine.sched.integrity import check_pages, check_slots
from engine.sched.lanes import Lanes
from engine.sched.limits import check, pages_for
from engine.sched.live import LiveRequests
from engine.sched.parts import Parts
from engine.sched.places import Places
from engine.sched.reply import Reply
from engine.sched.request import Request


class Scheduler:
    """Continuous batching of requests over `slots` device rows and `pages` KV pages of `page_size` tokens.

    The caller sends each plan to the device, and commits its result, in order, and says with both what its clock
    shows, in seconds. `policy` orders the queue. The device proposes up to `drafts` tokens a row. With `chunks` it is a
    pipeline, whose stages need a lane of rows each. `held` is told of the blocks of prompts that the cache holds. Of
    copies of attention it schedules number `copy`, whose slots come after those of the copies before it, and `live` are
    the requests of all. Pages may lie in `tiers` below the device. A copy of a request's states takes `state_pages`, if
    the model has any. Nothing but `admit` refuses.
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        slots: int,
        *,
        max_model_len: int,
        max_step_tokens: int,
        policy: Policy,
        prefix_cache: bool,
        max_waiting: int,
        drafts: int = 0,
        fronts: int = 1,
        chunks: ChunkRule | None = None,
        held: HeldBlocks | None = None,
        copy: int = 0,
        live: LiveRequests | None = None,
        tiers: TierOptions | None = None,
        encoder: Encoder | None = None,
        state_pages: int = 0,
    ) -> None:
        assert chunks is None or not drafts, "stages of a pipeline do not know where rows of drafts begin"
        assert not (state_pages and drafts), "a state that a wrong draft has changed cannot be taken back"
        self.page_size = page_size
        self.slots = range(copy * slots, (copy + 1) * slots)
        self.max_model_len = max_model_len
        self.max_step_tokens = max_step_tokens
        self.prefix_cache = prefix_cache
        self.drafts = drafts
        self.fronts = fronts  # that requests come from
        self.chunks = chunks
        self.encoder = encoder or Encoder()
        self._state_pages = state_pages
        self._now = 0.0  # when the plan at hand is made
        self.steps = 0  # planned so far; of copies by any of them, so that a request may go from one to another
        self._prompt_tokens = self._cached_tokens = 0  # of requests that came to run, the second among the first
        self._generated_tokens = self._retractions = self._departures = 0  # the last: of requests from the device
        self.live = live or LiveRequests(policy, self.cached, max_waiting, fronts)
        self._queue = self.live.queue
        self._start_afresh(CachePages(pages, page_size, held, copy * pages, tiers))

    def _start_afresh(self, pages: CachePages) -> None:
        self._pages, self._pool, self._tree = pages, pages.pool, pages.tree
        self.places = Places(pages, self.page_size, self.prefix_cache, self.encoder, self._state_pages)
        # All that run, by how far the plans have got:
        self._prefilling: dict[str, Request] = {}  # not to the end of the prompt
        self._lanes = Lanes.empty(1 if self.chunks is None else self.chunks.stages, self.drafts, self.fronts)
        self._decoding = self._lanes.rows[0]  # those of the lane whose turn it is
        self._ending: dict[str, Request] = {}  # to the end: the last token is in flight, or the vector
        self._stop_ids: Counter[int] = Counter()  # of all that run
        self._free_slots = list(reversed(self.slots))
        self._in_flight: deque[tuple[int, StepColumns]] = deque()
        self.encoder.clear()

    @property
    def tiers(self) -> Tiers | None:
        """What lies below its pages."""
        return self._pages.tiers

    # ── figures ──────────────────────────────────────────────────────────────────────────────

    def counts(self) -> dict[str, int]:
        """The figures of messages.Stats that it knows. `pages_cached` are taken when no page is free."""
        return {
            "running": self.running,
            "waiting": len(self._queue),
            "pages": self._pool.size,
            "pages_free": self._pool.free_pages,
            "pages_cached": self._tree.evictable,
            "prompt_tokens_total": self._prompt_tokens,
            "cached_tokens_total": self._cached_tokens,
            "generated_tokens_total": self._generated_tokens,
            "retractions_total": self._retractions,
            "pins_released_total": self._pages.pins.released,
            "steps": self.steps,
            **self.encoder.counts,
        }

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._lanes) + len(self._prefilling) + len(self._ending)

    @property
    def cache(self) -> CachePages:
        """Its pages, to look at."""
        return self._pages

    @property
    def free_slots(self) -> int:
        """Slots that no request has."""
        return len(self._free_slots)

    @property
    def context_tokens(self) -> int:
        """Tokens that the pages of running requests hold, those of a shared prefix once for each."""
        return sum(len(request.pages) for request in self.running_requests()) * self.page_size

    # ── requests come and go ─────────────────────────────────────────────────────────────────

    def admit(self, admit: Admit, bound: tuple[Bound, ...] = ()) -> None:
        """Queue a request whose needs are met as `bound` says. Raises RequestError: 400 if it can never fit, 409 if its
        rid lives, 503 if the queue is full."""
        self.live.admit(admit, bound, self.accept, self.free_slots)

    def accept(self, request: Request, admit: Admit) -> None:
        """Raises RequestError (400) if a request can never fit."""
        self.encoder.check(request, self.max_step_tokens)
        self.places.know(request, admit)
        check(request, self.max_model_len, self.max_step_tokens, self._pool.size, self.page_size)

    def stop(self, rid: str, keep: int | None = None) -> bool:
        """End `rid` in silence; nobody waits for tokens after its first `keep`. False if no such request lives."""
        request = self.live.end(rid)
        if request is None:
            return False
        if request.slot >= 0:
            self._release(request, None if keep is None else request.prompt_len + keep)
        return True

    def abort(self, rid: str) -> Tokens | None:
        """End `rid` now, and what to say of it; None if no such request lives."""
        if not self.stop(rid):
            return None
        return Tokens.aborted(rid, self.steps)

    def reset(self) -> list[str]:
        """The device lost everything: forget the requests that run, and name them. Waiting ones stay."""
        lost = [request.rid for request in self.running_requests()]
        for rid in lost:
            del self.live.by_rid[rid]
        self.live.sessions.lose()
        self._start_afresh(self._pages.afresh())
        return lost

    def flush(self) -> tuple[int, int]:
        """Forget cached prefixes that no running request uses: pages freed, and pages still in use."""
        return self._pages.flush()

    def end_program(self, program: Holder) -> None:
        """No more calls of `program` will come: nothing is kept for it."""
        self._pages.pins.end(program)

    # ── a step's plan ────────────────────────────────────────────────────────────────────────

    def plan(self, now: float = 0.0) -> StepPlan | None:
        """The next step; None if there is nothing to compute before a result or a request comes."""
        if self.chunks is not None:
            return self._plan_lanes(now)
        return self._complete(self.begin(now))

    def _plan_lanes(self, now: float) -> StepPlan | None:
        """As `plan`, of the lane whose turn it is."""
        work = self.begin_turn()
        for lane in self._lanes.turns():
            if (plan := self._complete(self.begin(now, lane, work))) is not None:
                self._lanes.last = lane
                return plan
        return None

    def begin_turn(self) -> float:
        """Before the first step of a turn of lanes: the work that the prompts of each get."""
        if self.chunks is None:
            return 0.0
        self._lanes.even_out()
        return self.chunks.budget(chain(self._prefilling.values(), self._queue))

    def begin(self, now: float, lane: int = 0, work: float = 0.0) -> StepColumns:
        """A step with the rows of all that run. Who has several copies lets requests `enter`, and has it `finish`."""
        self._now = self._pages.pins.now = now
        step = StepColumns(self.max_step_tokens, self._departures)
        if self.chunks is not None:
            step.lane, step.work, self._decoding = lane, work, self._lanes.rows[lane]
        if self._decoding.requests:
            self._grow(step)
            for request in self._decoding.plan(step):  # they fit: nobody joins them but with budget to spare
                self._ending[request.rid] = request
        if self._prefilling:
            for request in list(self._prefilling.values()):
                if step.budget:
                    self._plan_chunk(step, request)
            cut = self._prefilling and step.budget and not self.places.states
            assert not cut, "who shares the prefix of a prompt would compute it again"
        return step

    def _complete(self, step: StepColumns) -> StepPlan | None:
        if self._free_slots and step.budget and self._queue:
            self._plan_admissions(step)
        if self._pages.tiers is not None:
            self.places.look_ahead(self._queue, self.running)
        return self.finish(step)

    def finish(self, step: StepColumns) -> StepPlan | None:
        """The plan of `step`; None if there is nothing in it."""
        if not (step.requests or step.prompts):
            assert not step.pages and not step.admits
            return None
        self.steps += 1
        self._in_flight.append((self.steps, step))
        return step.message(self.steps)

    def _grow(self, step: StepColumns) -> None:
        """Find the pages that running rows need next. Who must give way does so before any row is planned."""
        while short := self._decoding.short():
            missing = [pages_for(tokens, self.page_size) - len(request.pages) for request, tokens in short]
            if sum(missing) <= self._pages.available:
                break
            self._retract(self._lanes.cheapest(list(self.running_requests())))
        else:
            return
        pages = self._pages.take(sum(missing))
        for (request, _), count in zip(short, missing, strict=True):
            held = len(request.pages)
            request.pages += [pages.pop() for _ in range(count)]
            self._decoding.grow(request, (held + count) * self.page_size)
            step.set_pages(request, range(held, held + count))
            if self.places.states:
                self.places.grow(step, request, held * self.page_size, self.running)

    def _plan_chunk(self, step: StepColumns, request: Request) -> None:
        """Compute as much of `request` as the budget allows; at its end, draw a token. Its tokens are all known."""
        start, length = request.computed, len(request.ids)
        self.places.mark(step, request, self.running)
        end = most = min(length, start + step.budget, *request.marks[:1])
        if self.chunks is not None:
            end = self.chunks.cut(step, start, end, self.page_size)
        if request.shown:
            end = self.encoder.reach(step, request, start, end, most)
        if end > start:
            step.add_chunk(request, start, end - start, last=end == length)
        request.computed = end
        step.set_pages(request, self.places.share(request, end))
        if end < length:
            if not self.places.states.due(request):
                step.budget = 0  # nobody comes between its chunks, also where media have ended this one
            return
        del self._prefilling[request.rid]
        if length + 1 == request.limit:
            self._ending[request.rid] = request
        else:
            self._lanes.join(request, len(request.pages) * self.page_size, step.lane)

    def _plan_admissions(self, step: StepColumns) -> None:
        for request in self._queue.ordered():
            if not step.budget or not self._free_slots:
                return
            if not self.places.waits(request, self.running) and not self.enter(step, request):
                return

    def enter(self, step: StepColumns, request: Request) -> bool:
        """Let a waiting request run from `step` on, which has budget; there is a slot. False if it does not fit."""
        if not self._place(request, step.budget):
            return False
        self._queue.remove(request)
        step.admits += (request.slot_admit(),)
        if request.pools:
            step.add_whole(request)
            request.computed = len(request.ids)
            self._ending[request.rid] = self._prefilling.pop(request.rid)
        else:
            step.set_pages(request, range(len(request.pages)))
            self._plan_chunk(step, request)
        return True

    def _place(self, request: Request, budget: int) -> bool:
        """Give a waiting request a slot, and either pages for its tokens or, if it asks for a vector, the step."""
        if not (len(request.ids) <= budget if request.pools else self.places.place(request, self.running)):
            return False
        if request.cached < 0:
            request.cached, request.began = request.computed, self._now
            self._cached_tokens += request.cached
            self._prompt_tokens += request.prompt_len
        request.slot = self._free_slots.pop()
        request.since = self.steps + 1
        if request.use is not None:
            request.session = self.live.sessions.begin(request.use, request.salt, self._now)
        self._stop_ids.update(request.stop_ids)
        self._prefilling[request.rid] = request
        return True

    # ── a step's result ──────────────────────────────────────────────────────────────────────

    def stuck(self, done: StepDone) -> list[tuple[str, str]]:
        """Of the result of the oldest step in flight, before it is committed: who cannot go on, and why."""
        number, step = self._in_flight[0]
        rows = ((step.requests[row], cause) for row, cause in done.stuck)
        return [(request.rid, cause) for request, cause in rows if number >= request.since]

    def commit(self, done: StepDone, now: float = 0.0) -> Tokens | None:
        """Take in the result of the oldest step in flight; None if it gives nobody a token."""
        reply = self._take_in(done, now)
        return reply.message() if reply.rids else None

    def commit_each(self, done: StepDone, now: float = 0.0) -> list[Tokens]:
        """As `commit`: what each front is told that it concerns."""
        reply = self._take_in(done, now)
        if isinstance(reply, Parts):
            return reply.messages()
        return [reply.message()] if reply.rids else []

    def _take_in(self, done: StepDone, now: float) -> Reply:
        number, step = self._in_flight.popleft()
        assert done.step == number, f"step {done.step} is done, but step {number} is the oldest in flight"
        if step.encodes:
            self.places.made((medium for _, medium in step.encodes), self.running_requests())
        reply = Reply(number, step, now) if self.fronts == 1 else Parts(number, step, now, self.fronts)
        if done.prompt_logprobs:
            reply.add_prompt_scores(done.prompt_logprobs)
        tokens = array("i", done.tokens)
        if step.spans is None and len(tokens) == len(step.requests):
            reply.take_one_each(tokens, done.logprobs, self._stop_ids, whole=step.departures == self._departures)
        else:
            rows = self._lanes.rows[step.lane]
            for request in reply.take_several(array("i", done.counts), tokens, done.logprobs, rows):
                self._ending[request.rid] = request
        if step.pooled:
            reply.take_vectors(done.vectors)
        for request in reply.ended:
            del self.live.by_rid[request.rid]
            self._release(request)
        self._generated_tokens += len(reply.tokens)
        return reply

    # ── giving way ───────────────────────────────────────────────────────────────────────────

    def _retract(self, request: Request) -> None:
        """Send a running request back to its place in the queue, its prefix left in the cache."""
        self._release(request)
        self._queue.add(request)
        self._retractions += 1

    def retract_all(self) -> None:
        """Send all that runs back to the queue. No step may be in flight: a result would be computed twice."""
        assert not self._in_flight, "a step in flight still gives tokens"
        for request in list(self.running_requests()):
            self._retract(request)

    def _release(self, request: Request, end: int | None = None) -> None:
        """The one place where a running request gives back its pages, its locks and its slot. Pages of known
        tokens (before position `end`, if given) stay in the cache.

        Steps in flight may still read and write what is freed here: they run before any step that reuses it."""
        if request.row >= 0:
            self._lanes.of(request).leave(request)
        known = min(request.computed, len(request.ids))
        self.places.free(request, known if end is None else min(known, end))
        self._free_slots.append(request.slot)
        self._prefilling.pop(request.rid, None)
        self._ending.pop(request.rid, None)
        for stop_id in request.stop_ids:
            self._stop_ids[stop_id] -= 1
            if not self._stop_ids[stop_id]:
                del self._stop_ids[stop_id]
        self._departures += 1
        self._pin(request)
        request.leave()

    def _pin(self, request: Request) -> None:
        """Keep the pages where `request` ended for its program and its session."""
        end = self.places.states.last(request.node) if self.places.states else request.node
        if request.program is not None and end is not None:
            self._pages.pins.keep(request.program, end, PROGRAM_SECONDS, MOST_BRANCHES)
        if request.session is not None:
            self.live.sessions.leave(request.session, self._pages.pins, end, self._now)

    # ── looking ──────────────────────────────────────────────────────────────────────────────

    def running_requests(self) -> Iterator[Request]:
        """Those that have a slot."""
        return chain(self._lanes.requests, self._ending.values(), self._prefilling.values())

    def cached(self, request: Request) -> int:
        """How many tokens of a waiting request the cache holds."""
        return self.places.cached(request)

    def check_integrity(self) -> None:
        """Assert that pages, locks, slots and requests fit together. For tests, and when idle."""
        self.check_own()
        self.live.check_integrity(self.running_requests())

    def check_own(self) -> None:
        """As check_integrity, of what runs here alone."""
        running = list(self.running_requests())
        self._pages.check_integrity()
        check_pages(self._pages, running)
        self.places.states.check_integrity(running)
        check_slots(self.slots, self._free_slots, self._stop_ids, running)
        assert all(request.computed < len(request.ids) for request in self._prefilling.values())
        self._lanes.check_integrity(self.page_size, idle=not self._in_flight)
