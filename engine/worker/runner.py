"""Runs steps on one device, in stages:

    apply ──> gather ──> forward ──> admit ──> head ──> choose ──> publish ──> report
    tables    rows       hidden      fields    logits   tokens     │           StepDone, once the device is there
      ^────────────────────── tokens[slot, position], lengths[slot] ┘

The tokens drawn go back into the tables on the device, so a step may be launched before the result of the one before is
known, and a row of drafts begins where its slot stands by then. On a GPU `launch` returns while the device computes,
and most steps replay a CUDA graph (steps/graphs.py); on a CPU the step is over by then. Rows that follow a grammar need
the tokens of all steps before on the host: `choose` asks for them when the model is on its way, and makes the masks
meanwhile (sampling/grammars.py).
Left out: copies on a side stream (transfers.py); who proposes drafts.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.layers.batch import Batch, upload
from engine.layers.model import Model
from engine.messages.grammars import GRAMMAR
from engine.messages.media import MEDIA
from engine.messages.step import NOTHING, VECTOR, SlotAdmit, StepDone, StepPlan
from engine.parallel.pipeline import Pipeline
from engine.params.sampling import Sampling
from engine.worker.experts import routers_of
from engine.worker.loaders import LoadedElsewhere, Loader
from engine.worker.media import MediaTable
from engine.worker.memory import Caches, States
from engine.worker.sampling.adjustments import Adjustments
from engine.worker.sampling.grammars import Grammars, Guided
from engine.worker.sampling.logprobs import score, score_prompt
from engine.worker.sampling.sampler import Sampler
from engine.worker.steps.admits import write_ids, write_pages
from engine.worker.steps.batch import build_batch
from engine.worker.steps.copies import Among, Copy
from engine.worker.steps.drafts import Draws, Held, held, real_starts
from engine.worker.steps.graphs import ALL_ROWS_TOKENS, DecodeGraphs, Tables, capture_prompts, prompt_graphs
from engine.worker.steps.prefixes import LEAST_ROWS, SharedPrefixes
from engine.worker.steps.recorded import RecordedSteps
from engine.worker.steps.results import Block, Forward, Head, Result, Step, to_pinned, written_to_pinned
from engine.worker.steps.rows import Rows
from engine.worker.steps.shown import NOTHING_SHOWN
from engine.worker.steps.stage import Stage
from engine.worker.steps.warmup import PLAIN
from engine.worker.transfers import Transfers


def _nothing() -> None:
    """There is no step under way."""


class Runner:
    """A model with its caches and tables on one device."""

    def __init__(
        self,
        model: Model,
        caches: Caches,
        device: torch.device,
        *,
        slots: int,
        max_model_len: int,
        page_size: int,
        grammars: Grammars | None = None,
        pipeline: Pipeline | None = None,
        copy: Copy | None = None,
        check: Callable[[], object] = _nothing,
    ) -> None:
        """Where the model is a stage of a `pipeline`, tokens are drawn on its last stage. Where attention runs in
        copies, `slots` and pages are those of this rank's `copy`, and the last page is a scratch page. `check` raises
        where a step that is over has gone wrong on the device."""
        self.model, self.caches, self.device = model, caches, device
        self.page_size = page_size
        pages = -(-max_model_len // page_size)
        # One position beyond the longest sequence: its last token is sampled there, never computed.
        # One slot more than there are: the padding of a graph's rows.
        self.tokens = torch.zeros(slots + 1, max_model_len + 1, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(slots + 1, pages, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(slots + 1, dtype=torch.int64, device=device)  # tokens of each slot
        self.states = States(model.kv_spec(), slots, device, caches)
        self.limits = np.zeros(slots, np.int64)  # tokens at which the request of each slot ends
        self._logits = model.kernels.logits
        self.sampler = Sampler(self.tokens, self.lengths, self._logits, model.vocabulary)
        self.adjustments = Adjustments(slots, model.vocab_size, device, self._logits)
        self.grammars = grammars
        self._check, self.copy = check, copy
        self.transfers: Transfers | None = None  # where there are tiers below the caches
        if copy is not None and caches:
            self.page_table[-1] = len(caches[0][0]) - 1
        self.stage = None if pipeline is None else Stage(pipeline, model, self.tokens, self.lengths)
        self.draws = self.stage is None or self.stage.last
        loader = grammars if self.draws else LoadedElsewhere()
        self.loaders: dict[str, Loader] = {} if loader is None else {GRAMMAR: loader}  # by kind of need
        enters = pipeline is not None and not pipeline.first
        self.media = MediaTable(model, slots, device, embeds=not enters, copy=copy) if model.sees else None
        self.loaders |= {} if self.media is None else {MEDIA: self.media}
        self.unscored = np.zeros((slots, 2), np.int64)  # prompt positions to be scored: from, to
        self._no_tokens = torch.empty(0, dtype=torch.int64, device=device)
        self._ahead_of: torch.cuda.Event | None = None  # the end of the last step, while it is not known to be over
        tables = self._tables(caches, page_size, enters=enters)
        self.decode_graphs = DecodeGraphs(tables) if device.type != "cpu" else RecordedSteps(tables)
        self.shared_graphs = DecodeGraphs(tables, shared=True)
        self.prompt_graphs = prompt_graphs(tables)
        self.prefixes: SharedPrefixes | None = None  # where steps with shared prefixes have graphs

    def _tables(self, caches: Caches, page_size: int, *, enters: bool) -> Tables:
        """What graphs are captured over."""
        draw = self._draw_plain if self.sampler.captures and self.draws else None
        real, masks = bool(routers_of(self.model)), self.grammars is not None
        shape = page_size, real, draw, masks, self.states.layers, enters, self.copy.copies if self.copy else 0
        shown = (None, 0) if self.media is None else (self.media.shifts, self.media.size if self.copy is None else 0)
        return Tables(self.model, caches, self.tokens, self.page_table, *shape, *shown)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, catch_up: Callable[[], None] = _nothing) -> Step:
        """Starts a step. Steps run in the order launched. `catch_up` is to `finish` all that are under way; it is
        called if a row follows a grammar, once the model is on its way."""
        among = None
        if self.copy is not None:
            plan, among = self.copy.own(plan, self.media is not None and self.media.told(plan))
        if self.device.type == "cpu":
            began = time.perf_counter()
            result = self._run(plan, among, catch_up)
            return Step(plan.step, result, seconds=time.perf_counter() - began, among=among)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        previous, self._ahead_of = self._ahead_of, end
        result = self._run(plan, among, catch_up).moved(to_pinned if self.transfers is None else written_to_pinned)
        end.record()
        if self.transfers is not None:
            self.transfers.launched(plan, end)
        return Step(plan.step, result, began=start, ended=end, previous=previous, among=among)

    def finish(self, step: Step) -> StepDone:
        """The result of a step, waiting for it if need be."""
        seconds, idle = step.seconds, 0.0
        if step.began is not None and step.ended is not None:
            step.ended.synchronize()
            self._check()
            seconds = step.began.elapsed_time(step.ended) / 1e3
            idle = step.previous.elapsed_time(step.began) / 1e3 if step.previous is not None else 0.0
            if self._ahead_of is step.ended:  # nothing was launched meanwhile: the device waits for work
                self._ahead_of = None
        done = self.report(step.step, step.result, seconds, idle)
        return done if step.among is None else step.among.numbered(done)

    def _run(self, plan: StepPlan, among: Among | None, catch_up: Callable[[], None]) -> Result:
        """All stages but the last: what the step yields, on the device."""
        self.apply(plan)
        rows = self.gather(plan, among)
        if not len(rows):
            self.admit(plan.admits)
            return Result(self._no_tokens)
        forward = self.forward(rows, None if self.stage is None else self.stage.enter(rows))
        self.admit(plan.admits)  # while the device computes
        if self.stage is not None and not self.stage.last:
            self.stage.leave(rows, forward.hidden, lent=forward.batch is None)
            return Result(self._no_tokens)
        if rows.idle:
            return Result(self._no_tokens)
        if self.model.yields == VECTOR:
            assert forward.batch is not None
            return Result(self._no_tokens, vectors=self.model.pool(forward.hidden, forward.batch))
        prompts = self._score_prompts(rows, forward)
        if (rows.yields == NOTHING).all():
            return Result(self._no_tokens, prompts=prompts)
        head = self.head(rows, forward)
        tokens = self.choose(head, catch_up)
        kept = self.publish(head, tokens)
        return Result(tokens, head.draws, kept, self._score_drawn(head, tokens), prompts, guided=head.guided)

    # ── apply ────────────────────────────────────────────────────────────────────────────────

    def apply(self, plan: StepPlan) -> None:
        """Brings the tables up to date that the forward pass reads: states, admits, then pages."""
        if self.stage is not None:
            self.stage.admit(plan.admits)
        if self.media is not None:
            self.media.apply(plan)
        self.states.apply(plan, write_ids(plan.admits, self.tokens, self.lengths) if plan.admits else None)
        if plan.pages:
            pages = np.frombuffer(plan.pages, "<i4").reshape(-1, 3)
            write_pages(pages, self.page_table)
            if self.prefixes is not None:
                self.prefixes.apply(pages, admitted=bool(plan.admits))

    def admit(self, admits: Sequence[SlotAdmit]) -> None:
        """From now on these slots are drawn and scored as their requests ask; the forward pass does without."""
        self.sampler.admit(admits)
        if self.draws:
            self.adjustments.admit(admits)
        for admit in admits:
            if self.grammars is not None:
                self.grammars.admit(admit)
            self.limits[admit.slot], asks = admit.limit, admit.sampling.prompt_logprobs >= 0
            self.unscored[admit.slot] = (admit.scored, admit.prompt_len - 1) if asks else (0, 0)

    # ── gather ───────────────────────────────────────────────────────────────────────────────

    def gather(self, plan: StepPlan, among: Among | None = None) -> Rows:
        """The rows of a step, which is `among` those of other copies of attention. Ids and pages are gathered on the
        device, from the tables, as part of `forward`."""
        rows = Rows.planned(plan, among)
        assert not (self.states and rows.drafts.any()), "a state that a wrong draft has changed cannot be taken back"
        if self.device.type == "cpu" and rows.drafts.any():
            rows = dataclasses.replace(rows, starts=real_starts(rows, self.lengths, self.limits).numpy())
        return rows

    # ── forward ──────────────────────────────────────────────────────────────────────────────

    def forward(self, rows: Rows, entering: Tensor | None = None) -> Forward:
        """The hidden states of the step of `rows`, one or more; `entering` are from the stage before."""
        shows = self.media is not None and self.media.shows(rows)
        if not shows and self.decode_graphs.fits(rows):
            prefixes = self.prefixes.find(rows.slots, rows.starts) if self.prefixes is not None else ()
            steps = self.shared_graphs if prefixes else self.decode_graphs
            hidden, on_device = steps.replay(rows, prefixes, entering)
            return Forward(hidden, np.arange(len(rows) + 1), steps=steps, on_device=on_device)
        if (graphs := next((each for each in self.prompt_graphs if each.fits(rows)), None)) is not None:
            shown = NOTHING_SHOWN if self.media is None else self.media.shown(rows)
            if not shown.whole:
                return Forward(*graphs.replay(rows, entering, shown))
        hidden, batch = self.compute(rows, entering)
        return Forward(hidden, batch.offsets, batch)

    def compute(self, rows: Rows, entering: Tensor | None = None) -> tuple[Tensor, Batch]:
        """Runs the model as it is: hidden states [T, H] of the tokens of `rows`, and the batch they came from."""
        guessed = self.device.type != "cpu" and rows.drafts.any()
        starts = real_starts(rows, self.lengths, self.limits) if guessed else None
        states = self.states.layers
        batch = build_batch(rows, self.tokens, self.page_table, self.page_size, self.caches, starts, states)
        if self.media is not None:
            batch = self.media.seen(batch, rows)
        batch = dataclasses.replace(batch, plans=self.model.prepare(batch))
        return self.model(batch, entering), batch

    # ── head ─────────────────────────────────────────────────────────────────────────────────

    def head(self, rows: Rows, forward: Forward) -> Head:
        """The logits of the positions that tokens are drawn after."""
        steps = forward.steps
        draws = Draws.of(rows) if steps is None else Draws.decode(rows)
        guided = self.grammars.guided(draws.slots) if self.grammars is not None else None
        if steps is not None:
            assert forward.on_device is not None
            within = steps.draws and not self.adjustments.acts(draws.slots) and self.sampler.plain(draws.slots)
            if within:
                return Head(draws, forward.on_device, None, steps, guided)
            logits, own = self._head_logits(forward.hidden, draws.slots, guided)
            return Head(draws, forward.on_device, logits, steps, guided, own=own)
        index, slots, lasts = upload(np.stack((draws.index, draws.slots, draws.lasts)), self.device)
        logits, own = self._head_logits(forward.hidden[index], draws.slots, guided)
        if not draws.rows.drafts.any():
            return Head(draws, (slots, lasts), logits, None, guided, own=own)
        assert forward.batch is not None, "steps with drafts are not captured"
        lasts = forward.batch.positions[index]
        known, drafted = self.lengths[slots], self.tokens[slots, lasts + 1]
        return Head(draws, (slots, lasts), logits, None, guided, known, drafted, own=own)

    def _head_logits(self, hidden: Tensor, slots: np.ndarray, guided: Guided | None) -> tuple[Tensor, bool]:
        """The logits [D, V] that tokens of `slots` are drawn from; or, and True, those of this rank's tokens alone,
        where these suffice: where no row asks for what needs all."""
        own = self.sampler.draws_own(guided is not None) and self.sampler.plain(slots)
        if own and not self.adjustments.acts(slots):
            return self.model.own_logits(hidden), True
        return self.model.logits(hidden), False

    def _score_prompts(self, rows: Rows, forward: Forward) -> Block | None:
        """The log-probabilities of prompt tokens after the positions that `rows` compute, where they are asked for."""
        firsts, ends = self.unscored[rows.slots].T
        firsts = np.maximum(firsts, rows.starts)
        counts = np.minimum(ends, rows.starts + rows.lengths) - firsts
        if not (counts > 0).any():
            return None
        offsets = forward.offsets[:-1] + firsts - rows.starts  # of each first position, in the hidden states
        spans: list[tuple[int, int, int, int]] = []
        places: list[np.ndarray] = []
        at = 0
        for row in np.flatnonzero(counts > 0):
            slot, count = rows.slots[row], int(counts[row])
            spans.append((int(row), at, at + count, int(self.sampler.columns.prompt_logprobs[slot])))
            steps = np.arange(count)
            places.append(np.stack((offsets[row] + steps, np.full(count, slot), firsts[row] + 1 + steps)))
            at += count
        index, slots, positions = upload(np.concatenate(places, axis=1), self.device)
        tokens = self.tokens[slots, positions]
        scores = score_prompt(self._logits, forward.hidden[index], tokens, self.model.logits, self.model.vocab_size)
        return Block(scores, spans)

    # ── choose ───────────────────────────────────────────────────────────────────────────────

    def choose(self, head: Head, catch_up: Callable[[], None]) -> Tensor:
        """Draws tokens, [D] int64: by the captured step, or from logits as the rows ask."""
        draws, guided = head.draws, head.guided
        slots = draws.slots
        if head.logits is None:
            lines = None
            if guided is not None:
                assert self.grammars is not None
                catch_up()
                lines = self.grammars.lines(guided, len(slots))
            assert head.steps is not None
            return head.steps.draw(len(slots), lines)
        logits = head.logits
        if head.own:
            masks = None
            if guided is not None:
                assert self.grammars is not None
                catch_up()
                masks = self.grammars.masks, upload(self.grammars.lines(guided, len(slots)), self.device)
            return self.sampler.draw_own(logits, head.on_device, masks)
        asked = bool((self.sampler.columns.logprobs[slots] >= 0).any())  # of these logits, as the model made them
        adjusted = logits
        if self.adjustments.acts(slots):
            adjusted = logits.to(torch.float32, copy=asked)
            exact = head.known is None or self.device.type == "cpu"
            ends = draws.lasts + 1 if exact else np.maximum(self.limits[slots], draws.lasts + 1)
            self.adjustments.apply(adjusted, slots, ends, self.tokens, None if exact else head.on_device[1] + 1)
        if guided is not None:
            assert self.grammars is not None
            catch_up()
            adjusted = adjusted.clone() if adjusted is logits and asked else adjusted
            self.grammars.mask(adjusted, guided)
        return self.sampler.draw(adjusted, slots, head.on_device)

    def _draw_plain(self, hidden: Tensor, on_device: Tensor, lines: Tensor | None) -> Tensor:
        """Tokens of rows that ask for no more than a temperature, under masks of those `lines`, as a graph has it."""
        masks = None
        if lines is not None:
            assert self.grammars is not None
            masks = self.grammars.masks, lines
        if self.sampler.draws_own(masks is not None):
            return self.sampler.draw_own(self.model.own_logits(hidden), on_device, masks)
        return self.sampler.draw_plain(self.model.logits(hidden), on_device, masks=masks)

    # ── publish ──────────────────────────────────────────────────────────────────────────────

    def publish(self, head: Head, tokens: Tensor) -> Held | None:
        """Makes the tables of this rank say what was drawn: `choose` has written a token after each draw, and counted
        it. Of rows of drafts, what holds stays."""
        slots, lasts = head.on_device
        if self.stage is not None:
            self.stage.tell(tokens)
        if head.known is None or head.drafted is None:
            return None
        kept = held(head.draws, tokens, head.drafted, lasts + 1, head.known)
        had = lasts + 1 < head.known
        self.tokens[slots, lasts + 1] = torch.where(had, head.drafted, tokens).to(torch.int32)
        firsts = upload(head.draws.firsts, self.device)
        self.lengths[slots[firsts]] = head.known[firsts] + kept.counts
        return kept

    def _score_drawn(self, head: Head, tokens: Tensor) -> Block | None:
        """The log-probabilities of what was drawn, where they are asked for."""
        draws, columns = head.draws, self.sampler.columns
        rows = np.flatnonzero(columns.logprobs[draws.rows.slots] >= 0)
        if not len(rows):
            return None
        assert head.logits is not None, "a captured step draws for rows that ask for nothing more"
        counts = draws.counts[rows]
        ends = np.cumsum(counts)
        which = upload(np.repeat(draws.firsts[rows] - ends + counts, counts) + np.arange(ends[-1]), self.device)
        wide = columns.logprobs[draws.rows.slots[rows]]
        spans = list(zip(rows.tolist(), (ends - counts).tolist(), ends.tolist(), wide.tolist(), strict=True))
        return Block(score(self._logits, head.logits, tokens[which], which), spans)

    # ── report ───────────────────────────────────────────────────────────────────────────────

    def report(self, step: int, result: Result, seconds: float, idle: float) -> StepDone:
        """What the scheduler is told, once `result` is on the host."""
        tokens = result.tokens.numpy().astype("<i4")
        counts, skipped, sampled = np.ones(len(tokens), "<i4"), None, result.sampled
        if result.held is not None:
            counts, skipped = result.held.counts.numpy().astype("<i4"), result.held.skipped.numpy()
        stuck: tuple[tuple[int, str], ...] = ()
        if result.guided is not None:
            assert self.grammars is not None and result.draws is not None
            stuck = self.grammars.accept(result.guided, tokens.tolist())
            rows = np.searchsorted(result.draws.firsts, [draw for draw, _ in stuck], "right") - 1
            stuck = tuple((int(row), cause) for row, (_, cause) in zip(rows, stuck, strict=True))
            counts[rows] = 0
        if skipped is not None:
            assert result.draws is not None
            tokens = tokens[result.draws.chosen(skipped, counts)]
            sampled = sampled and sampled.cut(skipped, counts)
        elif stuck:
            tokens = tokens[counts > 0]
        return StepDone(
            step=step,
            counts=counts.tobytes(),
            tokens=tokens.tobytes(),
            seconds=seconds,
            logprobs=sampled.messages() if sampled else (),
            prompt_logprobs=result.prompts.messages() if result.prompts else (),
            idle=idle,
            vectors=b"" if result.vectors is None else result.vectors.numpy().astype("<f4").tobytes(),
            stuck=stuck,
            failed=() if self.media is None else self.media.take_failed(),
        )

    # ── before there is any step ─────────────────────────────────────────────────────────────

    def capture(self, scratch_page: int, shares: bool = True, step_tokens: int = ALL_ROWS_TOKENS[-1]) -> bool:
        """Makes CUDA graphs of steps, which have `step_tokens` at most; padding writes to `scratch_page`. `shares`:
        requests may share pages; of a model with states few layers attend, so it has no graphs for that. False where
        decode steps can have no graphs."""
        self.page_table[-1] = scratch_page
        pool = torch.cuda.graph_pool_handle()
        slots, longest = len(self.tokens) - 1, self.tokens.shape[1] - 1
        capture_prompts(self.prompt_graphs, min(step_tokens, slots * longest), pool)
        if shares and not self.states and self.copy is None and slots >= LEAST_ROWS:
            self.shared_graphs.capture(slots, pool)
            if self.shared_graphs.most == slots:
                self.prefixes = SharedPrefixes(slots, self.page_table.shape[1], self.page_size)
        return self.decode_graphs.capture(slots, pool)

    def warm_up(self, tokens: int, rows: int = 1, sampling: Sampling = PLAIN) -> None:
        """Runs prompts of `tokens` in all (or as long as there can be) in `rows` rows, then a decode step of them; each
        copy of attention does.

        All ask for `sampling`, and use the first pages, as many as one of them needs."""
        longest = self.tokens.shape[1] - 1
        rows = min(rows, tokens)
        length = min(tokens // rows, longest)
        pages = -(-min(length + 1, longest) // self.page_size)
        ids = np.zeros(length, "<i4").tobytes()
        firsts = [0] if self.copy is None else range(0, self.copy.copies * self.copy.slots, self.copy.slots)
        slots = [first + row for first in firsts for row in range(rows)]
        admits = tuple(SlotAdmit(slot, ids, sampling, length) for slot in slots)
        triples = [(slot, index, index) for slot in slots for index in range(pages)]
        self._warm_step(slots, 0, length, admits, np.array(triples, "<i4").tobytes())
        if length < longest and self.model.yields != VECTOR:
            self._warm_step(slots, length, 1)

    def _warm_step(
        self, slots: list[int], start: int, length: int, admits: tuple[SlotAdmit, ...] = (), pages: bytes = b""
    ) -> None:
        starts, lengths, yields = (
            np.full(len(slots), number, "<i4").tobytes() for number in (start, length, self.model.yields)
        )
        named = np.array(slots, "<i4").tobytes()
        self.finish(self.launch(StepPlan(0, named, starts, lengths, yields, admits, pages)))
        if self.stage is not None:
            self.stage.settle()
