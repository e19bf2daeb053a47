"""Runs steps on one device: applies a StepPlan to the device's tables, computes, samples, and reports.

    tokens[slot, position] ── gather ──> ids ── model ──> hidden ── logits ── sample ─┐
        ^─────────────────────────────────────────────────────────────────────────────┘

The sampled tokens go back into the table on the device, so a step may be launched before the result of the
one before is known. On a GPU `launch` returns while the device computes; on a CPU the step is over by then.
Left out: CUDA graphs, copies on a side stream, more than one token a row.
"""

import dataclasses
import time
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from engine.layers.batch import Batch
from engine.layers.model import Model
from engine.messages import Sampling, SlotAdmit, StepDone, StepPlan
from engine.worker.batch import build_batch, upload
from engine.worker.kv import Caches, copy_pages
from engine.worker.sampler import Columns, sample


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way. `tokens` [S] int64 on the host hold once `ready`."""

    step: int
    tokens: Tensor
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

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Step:
        """Starts a step. Steps run in the order launched."""
        if self.device.type == "cpu":
            began = time.perf_counter()
            tokens = self._run(plan)
            return Step(plan.step, tokens, seconds=time.perf_counter() - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        tokens = self._run(plan)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        end.record()
        return Step(plan.step, host, began=start, ended=end)

    def finish(self, step: Step) -> StepDone:
        """The result of a step, waiting for it if need be."""
        seconds = step.seconds
        if step.began is not None and step.ended is not None:
            step.ended.synchronize()
            seconds = step.began.elapsed_time(step.ended) / 1e3
        tokens = step.tokens.numpy().astype("<i4")
        return StepDone(step.step, np.ones(len(tokens), "<i4").tobytes(), tokens.tobytes(), seconds)

    def _run(self, plan: StepPlan) -> Tensor:
        """The sampled tokens, [S] int64 on the device."""
        self.apply(plan)
        rows = np.frombuffer(plan.rows, "<i4").reshape(-1, 4).astype(np.int64)
        sampled = rows[rows[:, 3] != 0]
        slots, positions = sampled[:, 0], sampled[:, 1] + sampled[:, 2]
        if not len(rows):
            return torch.empty(0, dtype=torch.int64, device=self.device)
        hidden, batch = self.forward(rows)
        if not len(sampled):
            return torch.empty(0, dtype=torch.int64, device=self.device)
        logits = self.model.logits(hidden[batch.sampled])
        tokens = sample(logits, self.columns.rows(slots), positions)
        places = upload(np.stack((slots, positions)), self.device)
        self.tokens[places[0], places[1]] = tokens.to(torch.int32)
        return tokens

    def apply(self, plan: StepPlan) -> None:
        """Brings the tables up to date: admits, then pages, then page copies."""
        for admit in plan.admits:
            ids = np.frombuffer(admit.ids, "<i4").copy()
            self.tokens[admit.slot, : len(ids)] = upload(ids, self.device)
            self.columns.set(admit.slot, admit.sampling)
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
