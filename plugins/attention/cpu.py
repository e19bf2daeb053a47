"""Paged attention in C, for CPUs: keys and values are read where they lie.

Every row, prefill or decode, is cut into runs of a few tokens; a run and a key head are one task of one pass over the
row's pages with an online softmax (engine/kernels/cpu/attention.c). float32 only; without a C compiler `torch` takes
its place.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.plugin import ConfigError
from engine.plugin.kernels import MOST_QUERIES, Kernels, attention_tasks
from engine.plugin.layers import Batch, PagedAttention

DIMENSIONS = range(16, 257, 16)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step, for all layers: int32 `tasks` as attention_tasks makes them, with slots for rows, and page table."""

    tasks: np.ndarray
    table: Tensor  # [slots, P] int32


class CpuAttention(PagedAttention):
    """Causal attention of any grouping of heads, with or without a window."""

    def set_up(self) -> None:
        shape, device, dtype = self.shape, self.device, self.dtype
        found = self.kernels.dense
        if not isinstance(found, Kernels) or self.kv_dtype != torch.float32:
            raise ConfigError(
                f"attention cpu needs a C compiler and float32 on a CPU, and has {dtype}, cached as {self.kv_dtype}, "
                f"on {device}"
            )
        if shape.head_dim not in DIMENSIONS:
            raise ConfigError(f"attention cpu takes head sizes of 16, 32, … 256, not {shape.head_dim}")
        self._kernels = found
        self._group = shape.query_heads // shape.kv_heads
        if self._group > MOST_QUERIES:
            raise ConfigError(f"attention cpu takes up to {MOST_QUERIES} query heads to a key head, not {self._group}")

    def prepare(self, batch: Batch) -> Plan:
        tasks = attention_tasks(batch.starts, batch.lengths, batch.offsets, self._group)
        tasks[:, 2] = batch.slots.numpy()[tasks[:, 2]]
        return Plan(tasks, batch.page_table.contiguous())

    def capture(self, batch: Batch) -> Plan:
        rows = np.arange(len(batch.slots))
        ones, none = np.ones_like(rows), np.zeros_like(rows)
        tasks = np.stack((rows, ones, none, none), axis=1).astype(np.int32)
        return Plan(tasks, batch.page_table)

    def refill(self, plan: Plan, slots: np.ndarray, starts: np.ndarray) -> None:
        plan.tasks[:, 2], plan.tasks[:, 3] = slots, starts

    def attend(self, query: Tensor, cache: Tensor, plan: Plan) -> Tensor:
        shape, tokens = self.shape, query.shape[0]
        out = torch.empty(tokens, shape.query_heads * shape.head_dim)
        self._kernels.library.attend(
            *(query.data_ptr(), query.stride(0), cache.data_ptr(), plan.table.data_ptr(), plan.table.stride(0)),
            *(plan.tasks.ctypes.data, len(plan.tasks)),
            *(self.page_size, cache.stride(0), shape.query_heads, shape.kv_heads, shape.head_dim),
            *(shape.scale, shape.window or 0, out.data_ptr()),
        )
        return out
