"""Paged attention in C, for CPUs: keys and values are read where they lie.

Every row, prefill or decode, is cut into runs of a few tokens; a run and a key head are one task of one pass over the
row's pages with an online softmax (engine/kernels/cpu.c). float32 only; without a C compiler `torch` takes its place.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.plugin import ConfigError, KVGroup
from engine.plugin.kernels import attention_tasks, kernels
from engine.plugin.layers import AttentionBackend, AttentionShape, Batch

DIMENSIONS = range(16, 257, 16)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step, for all layers: what the kernels are called with, and what keeps that memory alive."""

    places: int  # address of [T] int64: where keys and values go
    tasks: tuple[int, int, int, int]  # addresses of the page table and, after its stride, of the tasks; their number
    held: tuple[Tensor, Tensor, np.ndarray]


class CpuAttention(AttentionBackend):
    """A page is [2, page_size, kv_heads, head_dim]: its keys, then its values."""

    def __init__(self, shape: AttentionShape, page_size: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(shape, page_size, device, dtype)
        found = kernels() if device.type == "cpu" and dtype == torch.float32 else None
        if found is None or self.kv_dtype != torch.float32:
            raise ConfigError(
                f"attention cpu needs a C compiler and float32 on a CPU, and has {dtype}, cached as {self.kv_dtype}, "
                f"on {device}"
            )
        if shape.head_dim not in DIMENSIONS:
            raise ConfigError(f"attention cpu takes head sizes of 16, 32, … 256, not {shape.head_dim}")
        self._library = found.library
        self._group = shape.query_heads // shape.kv_heads

    def kv_group(self) -> KVGroup:
        shape = (2, self.page_size, self.shape.kv_heads, self.shape.head_dim)
        return KVGroup(self.shape.layers, shape, "float32")

    def prepare(self, batch: Batch) -> Plan:
        tasks = attention_tasks(batch.starts, batch.lengths, batch.offsets, self._group)
        places, table = batch.places.contiguous(), batch.pages(self.page_size)
        called_with = (table.data_ptr(), table.stride(0), tasks.ctypes.data, len(tasks))
        return Plan(places.data_ptr(), called_with, (places, table, tasks))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, places: Tensor, plan: Plan) -> Tensor:
        shape, tokens = self.shape, query.shape[0]
        self._library.write_cache(
            *(key.data_ptr(), value.data_ptr(), key.stride(0), value.stride(0)),
            *(plan.places, tokens, self.page_size, shape.kv_heads * shape.head_dim, cache.data_ptr()),
        )
        out = torch.empty(tokens, shape.query_heads * shape.head_dim)
        self._library.attend(
            *(query.data_ptr(), query.stride(0), cache.data_ptr()),
            *plan.tasks,
            *(self.page_size, shape.query_heads, shape.kv_heads, shape.head_dim),
            *(shape.scale, shape.window or 0, out.data_ptr()),
        )
        return out
