"""Runs steps on one device: applies a StepPlan to the device's tables, computes, samples, and reports.

    tokens[slot, position] ── gather ──> ids ── model ──> hidden ── logits ── adjust ── sample ─┐
        ^───────────────────────────────────────────────────────────────────────────────────────┘

The sampled tokens go back into the table on the device, so a step may be launched before the result of the
one before is known. On a GPU `launch` returns while the device computes; on a CPU the step is over by then.
Left out: CUDA graphs, copies on a side stream, more than one token a row.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from engine.layers.batch import Batch
from engine.layers.model import Model
from engine.messages import Logprobs, Sampling, SlotAdmit, StepDone, StepPlan
from engine.worker.batch import build_batch, upload
from engine.worker.kv import Caches, copy_pages
from engine.worker.logits import Adjustments
from engine.worker.logprobs import Scores, score, score_prompt
from engine.worker.sampler import Columns, sample


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
    """What a step yields: `tokens` [S] int64, and log-probabilities of sampled rows and of prompts that ask."""

    tokens: Tensor
    sampled: Block | None = None
    prompts: Block | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Result":
        """The same, each tensor put elsewhere by `move`."""
        sampled, prompts = (
            block and dataclasses.replace(block, scores=block.scores.moved(move))
            for block in (self.sampled, self.prompts)
        )
        return Result(move(self.tokens), sampled, prompts)


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way. The `result` on the host holds once `ready`."""

    step: int
    result: Result
    seconds: float = 0.0  # on a CPU
    began: torch.cuda.Event | None = None  # on a GPU
    ended: torch.cuda.Event | None = None

    def ready(self) -> bool:
        return self.ended is None or self.ended.query()


class Runner:
    """A model with its caches and tables on one device."""

    def __init__(
        self, model: Model, caches: Caches, device: torch.device, *, slots: int, max_model_len: int, page_size: int
    ) -> None:
        self.model = model
        self.caches = caches
        self.device = device
        self.page_size = page_size
        pages = -(-max_model_len // page_size)
        # One position beyond the longest sequence: its last token is sampled there, never computed.
        self.tokens = torch.zeros(slots, max_model_len + 1, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(slots, pages, dtype=torch.int32, device=device)
        self.columns = Columns.empty(slots)
        self.adjustments = Adjustments(slots, model.vocab_size, device)
        self.unscored = np.zeros((slots, 2), np.int64)  # prompt positions to be scored: from, to

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Step:
        """Starts a step. Steps run in the order launched."""
        if self.device.type == "cpu":
            began = time.perf_counter()
            result = self._run(plan)
            return Step(plan.step, result, seconds=time.perf_counter() - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = self._run(plan).moved(_to_pinned)
        end.record()
        return Step(plan.step, result, began=start, ended=end)

    def finish(self, step: Step) -> StepDone:
        """The result of a step, waiting for it if need be."""
        seconds = step.seconds
        if step.began is not None and step.ended is not None:
            step.ended.synchronize()
            seconds = step.began.elapsed_time(step.ended) / 1e3
        result = step.result
        tokens = result.tokens.numpy().astype("<i4")
        return StepDone(
            step.step,
            np.ones(len(tokens), "<i4").tobytes(),
            tokens.tobytes(),
            seconds,
            result.sampled.messages() if result.sampled else (),
            result.prompts.messages() if result.prompts else (),
        )

    def _run(self, plan: StepPlan) -> Result:
        """What the step yields, on the device."""
        self.apply(plan)
        rows = np.frombuffer(plan.rows, "<i4").reshape(-1, 4).astype(np.int64)
        sampled = rows[rows[:, 3] != 0]
        slots, positions = sampled[:, 0], sampled[:, 1] + sampled[:, 2]
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        if not len(rows):
            return Result(nothing)
        hidden, batch = self.forward(rows)
        prompts = self._score_prompts(rows, hidden)
        if not len(sampled):
            return Result(nothing, prompts=prompts)
        logits = self.model.logits(hidden[batch.sampled])
        wanted = self.columns.logprobs[slots]
        asking = np.flatnonzero(wanted >= 0)
        raw = logits[upload(asking, self.device)] if len(asking) else None  # a copy: what follows changes the logits
        self.adjustments.apply(logits, slots, positions, self.tokens)
        tokens = sample(logits, self.columns.rows(slots), positions)
        places = upload(np.stack((slots, positions)), self.device)
        self.tokens[places[0], places[1]] = tokens.to(torch.int32)
        if raw is None:
            return Result(tokens, prompts=prompts)
        scores = score(raw, tokens[upload(asking, self.device)])
        spans = [(int(row), index, index + 1, int(wanted[row])) for index, row in enumerate(asking)]
        return Result(tokens, Block(scores, spans), prompts)

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
            spans.append((int(row), at, at + count, int(self.columns.prompt_logprobs[slot])))
            steps = np.arange(count)
            places.append(np.stack((offsets[row] + steps, np.full(count, slot), firsts[row] + 1 + steps)))
            at += count
        index, slots, positions = upload(np.concatenate(places, axis=1), self.device)
        scores = score_prompt(hidden[index], self.tokens[slots, positions], self.model.logits, self.model.vocab_size)
        return Block(scores, spans)

    def apply(self, plan: StepPlan) -> None:
        """Brings the tables up to date: admits, then pages, then page copies."""
        for admit in plan.admits:
            ids = np.frombuffer(admit.ids, "<i4").copy()
            self.tokens[admit.slot, : len(ids)] = upload(ids, self.device)
            self.columns.set(admit.slot, admit.sampling)
            self.adjustments.set(admit)
            asks = admit.sampling.prompt_logprobs >= 0
            self.unscored[admit.slot] = (admit.scored, admit.prompt_len - 1) if asks else (0, 0)
        if plan.pages:
            slot, index, page = self._upload_columns(plan.pages, 3)
            self.page_table[slot, index] = page.to(torch.int32)
        if plan.copies:
            source, destination = self._upload_columns(plan.copies, 2)
            copy_pages(self.caches, source, destination)

    def _upload_columns(self, packed: bytes, columns: int) -> Tensor:
        """int32 bytes of n rows to int64 [columns, n]."""
        return upload(np.frombuffer(packed, "<i4").reshape(-1, columns).T.astype(np.int64, order="C"), self.device)

    def forward(self, rows: np.ndarray) -> tuple[Tensor, Batch]:
        """Hidden states [T, H] of the tokens of `rows` (int64 [R, 4], R at least 1), and the batch they came from."""
        batch = build_batch(rows, self.tokens, self.page_table, self.page_size, self.caches)
        batch = dataclasses.replace(batch, plans=self.model.prepare(batch))
        return self.model(batch), batch

    def warm_up(self, tokens: int) -> None:
        """Runs a prompt of `tokens` (or the longest there can be) and a decode step, in slot 0 and the first pages."""
        longest = self.tokens.shape[1] - 1
        tokens = min(tokens, longest)
        pages = [(0, index, index) for index in range(self.page_table.shape[1])]
        admit = SlotAdmit(0, np.zeros(tokens, "<i4").tobytes(), Sampling(1.0, 0, 1.0, 0.0, 0))
        self._warm_step(0, tokens, StepPlan(0, b"", (admit,), np.array(pages, "<i4").tobytes()))
        if tokens < longest:
            self._warm_step(tokens, 1, StepPlan(0, b""))

    def _warm_step(self, start: int, length: int, plan: StepPlan) -> None:
        rows = np.array([[0, start, length, 1]], "<i4").tobytes()
        self.finish(self.launch(msgspec.structs.replace(plan, rows=rows)))


def _to_pinned(tensor: Tensor) -> Tensor:
    """A copy on the host, which is there once the stream has come so far."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
