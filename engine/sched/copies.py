"""Attention in several copies, each with slots and pages of its own: one scheduler sees them all.

    queue ──┬─> copy 0: slots 0 .. n-1,   its pages, its radix tree ─ rows ─┐
            └─> copy 1: slots n .. 2n-1,  …                         ─ rows ─┴─> one plan, rows in the order of copies

Each copy is planned by a Scheduler as if it were alone, and they share the requests that wait. A waiting request goes
to the copy where it costs least: where few of its tokens are to be computed, because the cache has its prefix, and
where what runs has few tokens, because all of them are read in each step. Pages that the cache alone holds cost
nothing, or a copy that has served much would seem busy. A request that has to give way comes back to the queue, and its
pages stay in the cache: so it goes where it was, unless that copy is much fuller than another. A prefix that a copy is
computing is waited for (underway.py).

All copies step together, so a step takes as long as the copy with the most to do. Prompts that come one by one would
make many steps long, each for the sake of one copy, while the rows of all wait for their next tokens. So where many
rows decode, requests are held for a few steps, until each copy can begin one. bench/engine/copies.py is where the
numbers come from. Left out: moving a request that runs to another copy.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.cache.blocks import HeldBlocks
from engine.cache.pins import Holder
from engine.cache.tiers import TierOptions
from engine.messages.assets import Bound
from engine.messages.control import CopyStats
from engine.messages.reply import Tokens
from engine.messages.request import Admit
from engine.messages.step import KeptState, StepDone, StepPlan
from engine.plugin.specs import Policy
from engine.sched.batcher import Scheduler
from engine.sched.chunks import ChunkRule
from engine.sched.columns import StepColumns
from engine.sched.encoder import Encoder
from engine.sched.live import LiveRequests
from engine.sched.request import Request
from engine.sched.shares import Share, parted
from engine.sched.underway import Underway

COMPUTED = 16  # how many tokens that are read in each step cost as much as one that is computed
HELD_STEPS = 4  # for which requests are held at most
BUSY_ROWS = 8  # that decode in a copy, on average, where requests are held


class Copies:
    """`copies` schedulers of `pages` KV pages each, which divide `slots` evenly; used as one Scheduler is.

    A step has up to `max_step_tokens` tokens of each copy. In a pipeline it is of the same lane in all copies. Each has
    an encoder like `encoder`: it makes and holds the embeddings of media that its own requests show."""

    def __init__(
        self,
        copies: int,
        pages: int,
        page_size: int,
        *,
        slots: int,
        max_model_len: int,
        max_step_tokens: int,
        policy: Policy,
        prefix_cache: bool,
        max_waiting: int,
        fronts: int = 1,
        chunks: ChunkRule | None = None,
        held: HeldBlocks | None = None,
        tiers: TierOptions | None = None,
        encoder: Encoder | None = None,
        state_pages: int = 0,
        held_steps: int = HELD_STEPS,
        busy_rows: int = BUSY_ROWS,
    ) -> None:
        each = slots // copies
        self.live = LiveRequests(policy, self._cached, max_waiting, fronts)
        self.copies = tuple(
            Scheduler(
                pages,
                page_size,
                each,
                max_model_len=max_model_len,
                max_step_tokens=max_step_tokens,
                policy=policy,
                prefix_cache=prefix_cache,
                max_waiting=max_waiting,
                fronts=fronts,
                chunks=chunks,
                held=held,
                copy=copy,
                live=self.live,
                tiers=None if tiers is None else replace(tiers, copy=copy, copies=copies),
                encoder=None if encoder is None else Encoder(encoder.budget, encoder.room),
                state_pages=state_pages,
            )
            for copy in range(copies)
        )
        self._lanes = 1 if chunks is None else chunks.stages
        self._lane = self._steps = 0  # whose turn it was last, in all copies
        self._tokens = [0] * copies  # that each has computed
        self._most_tokens = self._held = 0  # of the copy that had the most, over all steps; steps that the queue waits
        self._in_flight: deque[tuple[int, list[Share]]] = deque()
        self._most_held, self._busy_rows = held_steps, max(1, copies * busy_rows)

    # ── figures ──────────────────────────────────────────────────────────────────────────────

    def counts(self) -> dict[str, Any]:
        """As Scheduler.counts, of all copies, and of each."""
        each = [copy.counts() for copy in self.copies]
        total: dict[str, Any] = {name: sum(counts[name] for counts in each) for name in each[0]}
        copies = tuple(
            CopyStats(counts["running"], counts["pages"], counts["pages_free"], counts["pages_cached"], tokens)
            for counts, tokens in zip(each, self._tokens, strict=True)
        )
        return {
            **total,
            "waiting": len(self.live.queue),
            "steps": self._steps,
            "copies": copies,
            "most_tokens_total": self._most_tokens,
        }

    # ── requests come and go ─────────────────────────────────────────────────────────────────

    def admit(self, admit: Admit, bound: tuple[Bound, ...] = ()) -> None:
        """As Scheduler.admit."""
        self.live.admit(admit, bound, self.copies[0].accept, sum(copy.free_slots for copy in self.copies))

    def stop(self, rid: str, keep: int | None = None) -> bool:
        """As Scheduler.stop."""
        return self._of(rid).stop(rid, keep)

    def abort(self, rid: str) -> Tokens | None:
        """As Scheduler.abort."""
        return self._of(rid).abort(rid)

    def _of(self, rid: str) -> Scheduler:
        """The copy that `rid` runs in; any, if it does not run."""
        request = self.live.by_rid.get(rid)
        return self.copies[0 if request is None or request.slot < 0 else request.slot // len(self.copies[0].slots)]

    def reset(self) -> list[str]:
        """As Scheduler.reset."""
        self._in_flight.clear()
        return [rid for copy in self.copies for rid in copy.reset()]

    def flush(self) -> tuple[int, int]:
        """As Scheduler.flush."""
        freed, used = zip(*(copy.flush() for copy in self.copies), strict=True)
        return sum(freed), sum(used)

    def retract_all(self) -> None:
        """As Scheduler.retract_all."""
        for copy in self.copies:
            copy.retract_all()

    def end_program(self, program: Holder) -> None:
        """As Scheduler.end_program."""
        for copy in self.copies:
            copy.end_program(program)

    # ── a step's plan ────────────────────────────────────────────────────────────────────────

    def plan(self, now: float = 0.0) -> StepPlan | None:
        """As Scheduler.plan: the next step of all copies, of which some may have no rows."""
        works = [copy.begin_turn() for copy in self.copies]
        for after in range(1, self._lanes + 1):
            lane = (self._lane + after) % self._lanes
            if (plan := self._plan_lane(now, lane, works)) is not None:
                self._lane = lane
                return plan
        return None

    def _plan_lane(self, now: float, lane: int, works: Sequence[float]) -> StepPlan | None:
        """As `plan`, of the rows of one lane of a pipeline, whose prompts get so much work in each copy."""
        for copy in self.copies:
            copy.steps = self._steps
        steps = [copy.begin(now, lane, work) for copy, work in zip(self.copies, works, strict=True)]
        if self.live.queue and not self._holds(steps):
            self._place(steps)
        plans: list[StepPlan] = []
        shares: list[Share] = []
        for copy, step in zip(self.copies, steps, strict=True):
            if (plan := copy.finish(step)) is not None:
                plans.append(plan)
                shares.append(Share(copy, step.rows, len(step.requests), len(step.pooled)))
        if not plans:
            return None
        self._steps += 1
        tokens = [step.tokens for step in steps]
        self._tokens = [total + more for total, more in zip(self._tokens, tokens, strict=True)]
        self._most_tokens += max(tokens)
        self._in_flight.append((self._steps, shares))
        return joined(self._steps, plans)

    def _place(self, steps: Sequence[StepColumns]) -> None:
        """Let requests run, in the order of the queue, until one fits nowhere."""
        if not any(step.budget and copy.free_slots for copy, step in zip(self.copies, steps, strict=True)):
            return
        loads, underway = [copy.context_tokens for copy in self.copies], Underway(self.copies, steps)
        for request in self.live.queue.ordered():
            costs = [
                (loads[index] + self._cost(copy, request), index)
                for index, (copy, step) in enumerate(zip(self.copies, steps, strict=True))
                if step.budget and copy.free_slots
            ]
            if self._waits(request, min(costs, default=(0, -1))[1]):
                continue
            if costs and self._shares(request, costs, loads, underway):
                continue
            chosen = next(
                (index for _, index in sorted(costs) if self.copies[index].enter(steps[index], request)), None
            )
            if chosen is None:
                return
            loads[chosen] += len(request.ids)
            self._held = 0

    def _waits(self, request: Request, best: int) -> bool:
        """Whether pages of `request` come up in some copy, or begin to in the `best` one, or its state comes there."""
        if best < 0:
            return False
        under_way = any(copy.tiers is not None and copy.tiers.under_way(request.rise) for copy in self.copies)
        return under_way or self.copies[best].places.waits(request, self.copies[best].running)

    def _shares(self, request: Request, costs: Sequence[tuple[int, int]], loads: list[int], underway: Underway) -> bool:
        """Whether `request` waits for a prefix that some copy computes: less is computed then, and it costs less than
        any of `costs`."""
        (cost, best), left = min(costs), underway.rests(request)
        waits = [
            (loads[index] + COMPUTED * (own + before), index)
            for index, (own, before) in left.items()
            if COMPUTED * (own + before) < cost - loads[best]
        ]
        least, index = min(waits, default=(cost, -1))
        if least >= cost:
            return False
        underway.waits(index, left[index][0])
        request.waited = min(request.waited, self._steps + 1)
        loads[index] += len(request.ids)
        return True

    def _cost(self, copy: Scheduler, request: Request) -> int:
        """What `request` costs in `copy`, in tokens that are read: an embedding of media as much as a token."""
        cached = copy.cached(request)
        return COMPUTED * (len(request.ids) - cached + copy.encoder.missing(request, cached))

    def _holds(self, steps: Sequence[StepColumns]) -> bool:
        """Whether those that wait are held for a step, because some copy could not begin one of them now. Never where
        few rows decode, nor where the step has prompts anyway."""
        if self._held >= self._most_held or any(step.prompts for step in steps):
            return False
        able = sum(bool(step.budget and copy.free_slots) for copy, step in zip(self.copies, steps, strict=True))
        decoding = sum(len(step.requests) for step in steps)
        if min(able, len(self.live.queue)) == len(steps) or decoding < self._busy_rows:
            return False
        self._held += 1
        return True

    def _cached(self, request: Request) -> int:
        return max(copy.cached(request) for copy in self.copies)

    # ── a step's result ──────────────────────────────────────────────────────────────────────

    def stuck(self, done: StepDone) -> list[tuple[str, str]]:
        """As Scheduler.stuck."""
        parts = parted(done, self._in_flight[0][1])
        return [found for share, part in parts for found in share.copy.stuck(part)]

    def commit_each(self, done: StepDone, now: float = 0.0) -> list[Tokens]:
        """As Scheduler.commit_each: what is said of each copy's rows, one after the other."""
        number, shares = self._in_flight.popleft()
        assert done.step == number, f"step {done.step} is done, but step {number} is the oldest in flight"
        return [told for share, part in parted(done, shares) for told in share.copy.commit_each(part, now)]

    # ── looking ──────────────────────────────────────────────────────────────────────────────

    def check_integrity(self) -> None:
        """As Scheduler.check_integrity, of each copy."""
        for copy in self.copies:
            copy.check_own()
        self.live.check_integrity(request for copy in self.copies for request in copy.running_requests())


def joined(number: int, plans: Sequence[StepPlan]) -> StepPlan:
    """The plan of step `number`, of all that the `plans` of copies say."""
    encodes = forgets = b""
    keeps: tuple[KeptState, ...] = ()
    for plan in plans:  # nearly always nothing
        encodes += plan.encodes
        forgets += plan.forgets
        keeps += plan.keeps
    return StepPlan(
        step=number,
        slots=b"".join(plan.slots for plan in plans),
        starts=b"".join(plan.starts for plan in plans),
        lengths=b"".join(plan.lengths for plan in plans),
        yields=b"".join(plan.yields for plan in plans),
        admits=tuple(admit for plan in plans for admit in plan.admits),
        pages=b"".join(plan.pages for plan in plans),
        lane=plans[0].lane,
        encodes=encodes,
        forgets=forgets,
        keeps=keeps,
    )
