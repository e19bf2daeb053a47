"""Runs steps on one device: applies a StepPlan to the device's tables, computes, samples, and reports.

    tokens[slot, position] ── gather ──> ids ── model ──> hidden ── logits ── adjust ── mask ── sample ─┐
        ^───────────────────────────────────────────────────────────────────────────────────────────────┘

The sampled tokens go back into the table on the device, so a step may be launched before the result of the
one before is known. On a GPU `launch` returns while the device computes, and most steps replay a CUDA graph
(graphs.py); on a CPU the step is over by then. Rows that follow a grammar need the tokens of all steps
before on the host: `launch` asks for them when the model is on its way, and makes the masks meanwhile (grammar.py).
Left out: copies on a side stream, more than one token a row.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from engine.layers.batch import Batch, upload
from engine.layers.encoder import Encoder
from engine.layers.model import Model
from engine.messages.grammars import GRAMMAR
from engine.messages.request import Sampling
from engine.messages.step import Logprobs, SlotAdmit, StepDone, StepPlan
from engine.worker.experts import heed_padding
from engine.worker.loaders import Loader
from engine.worker.memory import Caches, copy_pages
from engine.worker.sampling.adjustments import Adjustments
from engine.worker.sampling.grammars import Grammars, Guided
from engine.worker.sampling.logprobs import Scores, score, score_prompt
from engine.worker.sampling.sampler import Sampler
from engine.worker.steps.batch import build_batch
from engine.worker.steps.graphs import ALL_ROWS_TOKENS, DecodeGraphs, Tables, most_prompt_tokens, prompt_graphs
from engine.worker.steps.prefixes import LEAST_ROWS, SharedPrefixes
from engine.worker.steps.recorded import RecordedSteps
from engine.worker.steps.warmup import PLAIN

SHORT_PROMPT = 1024  # tokens, up to which those of several requests are sent to the device together


@dataclass(frozen=True, slots=True)
class Block:
    """Log-probabilities computed together. A span is a row, where its tokens begin in them and end, and how many
    likeliest ones it asks for."""

    scores: Scores
    spans: list[tuple[int, int, int, int]]

    def messages(self) -> tuple[Logprobs, ...]:
        return tuple(self.scores.message(*span) for span in self.spans)


@dataclass(frozen=True, slots=True)
class Result:
    """What a step yields: `tokens` [S] int64, and log-probabilities of sampled rows and of prompts that ask; or
    float32 `vectors` [R, size]. `guided` are the rows that follow a grammar."""

    tokens: Tensor
    sampled: Block | None = None
    prompts: Block | None = None
    vectors: Tensor | None = None
    guided: Guided | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Result":
        """The same, each tensor put elsewhere by `move`."""
        sampled, prompts = (
            block and dataclasses.replace(block, scores=block.scores.moved(move))
            for block in (self.sampled, self.prompts)
        )
        vectors = None if self.vectors is None else move(self.vectors)
        return Result(move(self.tokens), sampled, prompts, vectors, self.guided)


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way. The `result` on the host holds once `ready`."""

    step: int
    result: Result
    seconds: float = 0.0  # on a CPU
    began: torch.cuda.Event | None = None  # on a GPU
    ended: torch.cuda.Event | None = None
    previous: torch.cuda.Event | None = None  # the end of the step before, if this one was launched ahead of it

    def ready(self) -> bool:
        return self.ended is None or self.ended.query()


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
    ) -> None:
        self.model = model
        self.caches = caches
        self.device = device
        self.page_size = page_size
        pages = -(-max_model_len // page_size)
        # One position beyond the longest sequence: its last token is sampled there, never computed.
        # One slot more than there are: the padding of a graph's rows.
        self.tokens = torch.zeros(slots + 1, max_model_len + 1, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(slots + 1, pages, dtype=torch.int32, device=device)
        self.sampler = Sampler(self.tokens)
        self.adjustments = Adjustments(slots, model.vocab_size, device)
        self.grammars = grammars
        self.loaders: dict[str, Loader] = {} if grammars is None else {GRAMMAR: grammars}  # by kind of need
        self.unscored = np.zeros((slots, 2), np.int64)  # prompt positions to be scored: from, to
        self._ahead_of: torch.cuda.Event | None = None  # the end of the last step, while it is not known to be over
        draw = self._draw_plain if self.sampler.captures else None
        real = heed_padding(model)
        masks = grammars is not None
        tables = Tables(model, caches, self.tokens, self.page_table, page_size, real, draw, masks)
        self.decode_graphs = DecodeGraphs(tables) if device.type != "cpu" else RecordedSteps(tables)
        self.shared_graphs = DecodeGraphs(tables, shared=True)
        self.prompt_graphs = prompt_graphs(tables)
        self.prefixes: SharedPrefixes | None = None  # where steps with shared prefixes have graphs

    @torch.inference_mode()
    def launch(self, plan: StepPlan, catch_up: Callable[[], None] = _nothing) -> Step:
        """Starts a step. Steps run in the order launched. `catch_up` is to `finish` all that are under way; it is
        called if a row follows a grammar, once the model is on its way."""
        if self.device.type == "cpu":
            began = time.perf_counter()
            result = self._run(plan, catch_up)
            return Step(plan.step, result, seconds=time.perf_counter() - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        previous, self._ahead_of = self._ahead_of, end
        result = self._run(plan, catch_up).moved(_to_pinned)
        end.record()
        return Step(plan.step, result, began=start, ended=end, previous=previous)

    def finish(self, step: Step) -> StepDone:
        """The result of a step, waiting for it if need be."""
        seconds, idle = step.seconds, 0.0
        if step.began is not None and step.ended is not None:
            step.ended.synchronize()
            seconds = step.began.elapsed_time(step.ended) / 1e3
            idle = step.previous.elapsed_time(step.began) / 1e3 if step.previous is not None else 0.0
            if self._ahead_of is step.ended:  # nothing was launched meanwhile: the device waits for work
                self._ahead_of = None
        result = step.result
        tokens = result.tokens.numpy().astype("<i4")
        counts = np.ones(len(tokens), "<i4")
        stuck: tuple[tuple[int, str], ...] = ()
        if result.guided:
            assert self.grammars is not None
            stuck = self.grammars.accept(result.guided, tokens.tolist())
            counts[[row for row, _ in stuck]] = 0
        return StepDone(
            step.step,
            counts.tobytes(),
            tokens[counts > 0].tobytes(),
            seconds,
            result.sampled.messages() if result.sampled else (),
            result.prompts.messages() if result.prompts else (),
            idle,
            b"" if result.vectors is None else result.vectors.numpy().astype("<f4").tobytes(),
            stuck,
        )

    def _run(self, plan: StepPlan, catch_up: Callable[[], None]) -> Result:
        """What the step yields, on the device."""
        self.apply(plan)
        rows = np.frombuffer(plan.rows, "<i4").reshape(-1, 4).astype(np.int64)
        sampled = rows[rows[:, 3] != 0]
        slots, lasts = sampled[:, 0], sampled[:, 1] + sampled[:, 2] - 1
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        if not len(rows):
            return Result(nothing)
        if isinstance(self.model, Encoder):
            hidden, batch = self.forward(rows)
            return Result(nothing, vectors=self.model.embed(hidden, batch))
        prompts = None
        on_device: Sequence[Tensor] | Tensor
        steps: DecodeGraphs | RecordedSteps | None = None
        if len(sampled) == len(rows) and self.decode_graphs.fits(rows):
            steps, hidden, on_device = self._decode(rows)
        else:
            hidden, offsets = self._hidden(rows)
            prompts = self._score_prompts(rows, hidden)
            if not len(sampled):
                return Result(nothing, prompts=prompts)
            ends, *on_device = upload(np.stack((offsets[1:][rows[:, 3] != 0] - 1, slots, lasts)), self.device)
            hidden = hidden[ends]
        guided = self.grammars.guided(slots) if self.grammars is not None else None
        adjusts = self.adjustments.acts(slots)
        if isinstance(steps, DecodeGraphs) and steps.draws and not adjusts and self.sampler.plain(slots):
            lines = None
            if guided is not None:
                assert self.grammars is not None
                catch_up()
                lines = self.grammars.lines(guided, len(rows))
            return Result(steps.draw(len(rows), lines), guided=guided)
        logits = self.model.logits(hidden)
        wanted = self.sampler.columns.logprobs[slots]
        asking = np.flatnonzero(wanted >= 0)
        adjusted = logits
        if adjusts:
            adjusted = logits.to(torch.float32, copy=len(asking) > 0)
            self.adjustments.apply(adjusted, slots, lasts + 1, self.tokens)
        if guided:
            assert self.grammars is not None
            catch_up()
            adjusted = adjusted.clone() if adjusted is logits and len(asking) else adjusted
            self.grammars.mask(adjusted, guided)
        tokens = self.sampler.draw(adjusted, slots, lasts, on_device)
        if not len(asking):
            return Result(tokens, prompts=prompts, guided=guided)
        which = upload(asking, self.device)
        scores = score(logits, tokens[which], which)
        spans = [(int(row), index, index + 1, int(wanted[row])) for index, row in enumerate(asking)]
        return Result(tokens, Block(scores, spans), prompts, guided=guided)

    def _decode(self, rows: np.ndarray) -> tuple[DecodeGraphs | RecordedSteps, Tensor, Tensor]:
        """Hidden states of a step of one token a row, its slots and positions, and whose graph they are from."""
        if self.prefixes is not None and (prefixes := self.prefixes.find(rows[:, 0], rows[:, 1])):
            return self.shared_graphs, *self.shared_graphs.replay(rows, prefixes)
        return self.decode_graphs, *self.decode_graphs.replay(rows)

    def _draw_plain(self, hidden: Tensor, on_device: Tensor, lines: Tensor | None) -> Tensor:
        """Tokens of rows that ask for no more than a temperature, under masks of those `lines`, as a graph has it."""
        masks = None
        if lines is not None:
            assert self.grammars is not None
            masks = self.grammars.masks, lines
        return self.sampler.draw_plain(self.model.logits(hidden), on_device, masks=masks)

    def _hidden(self, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Hidden states [T, H] of the tokens of `rows`, and where each row's begin, [R + 1]."""
        for graphs in self.prompt_graphs:
            if graphs.fits(rows):
                return graphs.replay(rows)
        hidden, batch = self.forward(rows)
        return hidden, batch.offsets

    def _score_prompts(self, rows: np.ndarray, hidden: Tensor) -> Block | None:
        """The log-probabilities of prompt tokens after the positions that `rows` compute, where they are asked for."""
        firsts, ends = self.unscored[rows[:, 0]].T
        firsts = np.maximum(firsts, rows[:, 1])
        counts = np.minimum(ends, rows[:, 1] + rows[:, 2]) - firsts
        if not (counts > 0).any():
            return None
        offsets = np.cumsum(rows[:, 2]) - rows[:, 2] + firsts - rows[:, 1]  # of each first position, in `hidden`
        spans: list[tuple[int, int, int, int]] = []
        places: list[np.ndarray] = []
        at = 0
        for row in np.flatnonzero(counts > 0):
            slot, count = rows[row, 0], int(counts[row])
            spans.append((int(row), at, at + count, int(self.sampler.columns.prompt_logprobs[slot])))
            steps = np.arange(count)
            places.append(np.stack((offsets[row] + steps, np.full(count, slot), firsts[row] + 1 + steps)))
            at += count
        index, slots, positions = upload(np.concatenate(places, axis=1), self.device)
        scores = score_prompt(hidden[index], self.tokens[slots, positions], self.model.logits, self.model.vocab_size)
        return Block(scores, spans)

    def apply(self, plan: StepPlan) -> None:
        """Brings the tables up to date: admits, then pages, then page copies."""
        self.sampler.admit(plan.admits)
        self.adjustments.admit(plan.admits)
        self._write_ids(plan.admits)
        for admit in plan.admits:
            if self.grammars is not None:
                self.grammars.admit(admit)
            asks = admit.sampling.prompt_logprobs >= 0
            self.unscored[admit.slot] = (admit.scored, admit.prompt_len - 1) if asks else (0, 0)
        if plan.pages:
            slot, index, page = self._upload_columns(plan.pages, 3)
            self.page_table[slot, index] = page.to(torch.int32)
            if self.prefixes is not None:
                self.prefixes.apply(np.frombuffer(plan.pages, "<i4").reshape(-1, 3), admitted=bool(plan.admits))
        if plan.copies:
            source, destination = self._upload_columns(plan.copies, 2)
            copy_pages(self.caches, source, destination)

    def _write_ids(self, admits: Sequence[SlotAdmit]) -> None:
        """Those of short prompts in one copy: with one for each of many requests, the host would take longer than the
        device."""
        short: dict[int, np.ndarray] = {}
        for admit in admits:
            ids = np.frombuffer(admit.ids, "<i4")
            if len(ids) <= SHORT_PROMPT:
                short[admit.slot] = ids
            else:
                self.tokens[admit.slot, : len(ids)] = upload(ids.copy(), self.device)
        if short:
            slots = np.repeat(list(short), [len(ids) for ids in short.values()])
            positions = np.concatenate([np.arange(len(ids)) for ids in short.values()])
            slot, position, token = upload(np.stack((slots, positions, np.concatenate([*short.values()]))), self.device)
            self.tokens[slot, position] = token.to(torch.int32)

    def _upload_columns(self, packed: bytes, columns: int) -> Tensor:
        """int32 bytes of n rows to int64 [columns, n]."""
        return upload(np.frombuffer(packed, "<i4").reshape(-1, columns).T.astype(np.int64, order="C"), self.device)

    def forward(self, rows: np.ndarray) -> tuple[Tensor, Batch]:
        """Hidden states [T, H] of the tokens of `rows` (int64 [R, 4], R at least 1), and the batch they came from."""
        batch = build_batch(rows, self.tokens, self.page_table, self.page_size, self.caches)
        batch = dataclasses.replace(batch, plans=self.model.prepare(batch))
        return self.model(batch), batch

    def capture(self, scratch_page: int, shares: bool = True, step_tokens: int = ALL_ROWS_TOKENS[-1]) -> bool:
        """Makes CUDA graphs of steps, which have `step_tokens` at most; padding writes to `scratch_page`. `shares`:
        requests may share pages. False where decode steps can have no graphs."""
        self.page_table[-1] = scratch_page
        pool = torch.cuda.graph_pool_handle()
        slots, longest = len(self.tokens) - 1, self.tokens.shape[1] - 1
        most = min(step_tokens, slots * longest, most_prompt_tokens(self.model))
        for graphs in reversed(self.prompt_graphs):  # the largest steps first
            graphs.capture(most, pool)
        assert isinstance(self.decode_graphs, DecodeGraphs)
        if shares and slots >= LEAST_ROWS:
            self.shared_graphs.capture(slots, pool)
            if self.shared_graphs.most == slots:
                self.prefixes = SharedPrefixes(slots, self.page_table.shape[1], self.page_size)
        return self.decode_graphs.capture(slots, pool)

    def warm_up(self, tokens: int, rows: int = 1, sampling: Sampling = PLAIN) -> None:
        """Runs prompts of `tokens` in all (or as long as there can be) in `rows` rows, then a decode step of them.

        All ask for `sampling`, and use the first pages, as many as one of them needs."""
        longest = self.tokens.shape[1] - 1
        rows = min(rows, tokens)
        length = min(tokens // rows, longest)
        pages = -(-min(length + 1, longest) // self.page_size)
        ids = np.zeros(length, "<i4").tobytes()
        admits = tuple(SlotAdmit(slot, ids, sampling, length) for slot in range(rows))
        triples = [(slot, index, index) for slot in range(rows) for index in range(pages)]
        self._warm_step(rows, 0, length, StepPlan(0, b"", admits, np.array(triples, "<i4").tobytes()))
        if length < longest and not isinstance(self.model, Encoder):
            self._warm_step(rows, length, 1, StepPlan(0, b""))

    def _warm_step(self, count: int, start: int, length: int, plan: StepPlan) -> None:
        rows = np.array([[slot, start, length, 1] for slot in range(count)], "<i4").tobytes()
        self.finish(self.launch(msgspec.structs.replace(plan, rows=rows)))


def _to_pinned(tensor: Tensor) -> Tensor:
    """A copy on the host, which is there once the stream has come so far."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
