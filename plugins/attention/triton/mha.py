"""Paged attention in Triton, for GPUs: keys and values are read where they lie, for any page size and head size.

Rows of one token go to a kernel that divides contexts among programs on the device, others to one whose tasks the host
lists (engine/kernels/attention/decode.py, extend.py). Decode steps can be captured: of their plan nothing comes from
the host but which rows share a prefix. So can steps with prompts, which read the list.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine.plugin import ConfigError, kernels
from engine.plugin.layers import Batch, Mirror, Prefix
from engine_plugins.attention.into import AttentionInto

if TYPE_CHECKING:
    from engine.plugin.kernels import DecodeRows, ExtendRows, Scratch, SharedRows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: the rows of one token, and the others; None where there are none."""

    page_table: Tensor
    decode: "DecodeRows | None"
    extend: "ExtendRows | None"
    numbers: Mirror | None = None  # of a captured step: what differs from replay to replay


class TritonAttention(AttentionInto):
    """Serves bfloat16, float16 and float32, each with a cache of its own type or float8_e4m3fn."""

    def set_up(self) -> None:
        shape, device, dtype = self.shape, self.device, self.dtype
        if device.type != "cuda" and not kernels.interpreted():
            raise ConfigError(f"attention triton runs on GPUs, not on {device}; say --plugins torch")
        if dtype not in DTYPES or self.kv_dtype not in (dtype, torch.float8_e4m3fn):
            raise ConfigError(
                f"attention triton computes in bfloat16, float16 or float32 and caches that or float8_e4m3fn, "
                f"not {self.kv_dtype} for {dtype}"
            )
        if shape.head_dim > 256 or shape.head_dim % 16:
            raise ConfigError(f"attention triton takes head sizes of 16, 32, … 256, not {shape.head_dim}")
        self._shape = kernels.PagedShape(
            query_heads=shape.query_heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            page_size=self.page_size,
            scale=shape.scale,
            window=shape.window,
        )
        self._scratch: Scratch | None = None
        self._shared: SharedRows | None = None
        self._blocks = kernels.extend_blocks(self._shape, dtype)
        self._teams = kernels.extend_teams(self._shape, device)
        self._pieces = kernels.extend_scratch(self._shape, dtype, self._teams, device)

    def prepare(self, batch: Batch) -> Plan:
        decode, extend = self.decode_rows(batch, np.flatnonzero(batch.lengths == 1)), None
        if not (batch.lengths == 1).all():
            extend = self._extend_rows(batch, self.upload(self._list_tasks(batch.starts, batch.lengths)))
        return Plan(batch.page_table, decode, extend)

    def _list_tasks(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return kernels.list_extend_tasks(starts, lengths, self._shape, self._blocks, self._teams)

    def _extend_rows(self, batch: Batch, tasks: Tensor) -> "ExtendRows":
        return kernels.ExtendRows(
            tasks=tasks,
            slots=batch.slots,
            starts=batch.row_starts,
            offsets=batch.row_offsets,
            scratch=self._pieces,
        )

    def decode_rows(self, batch: Batch, rows: np.ndarray) -> "DecodeRows | None":
        """Those `rows` of `batch`, of one token each."""
        if not len(rows):
            return None
        index = self.upload(rows)
        return self._decode(*(part[index] for part in (batch.slots, batch.row_starts, batch.row_offsets)))

    def capture(self, batch: Batch) -> Plan:
        return Plan(batch.page_table, self._decode(batch.slots, batch.row_starts, batch.row_offsets[:-1]), None)

    def capture_shared(self, batch: Batch) -> Plan | None:
        if self.shape.window is not None:
            return None
        rows = len(batch.slots)
        numbers = Mirror(kernels.SharedRows.size(rows), self.device)
        shared = kernels.SharedRows.of(numbers.device, rows, self._shape, self._shared)
        self._shared = self._shared or shared  # graphs run one at a time, and the largest is captured first
        decode = self._decode(batch.slots, batch.row_starts, batch.row_offsets[:-1])
        return Plan(batch.page_table, dataclasses.replace(decode, shared=shared), None, numbers)

    def refill_shared(self, plan: Plan, slots: np.ndarray, starts: np.ndarray, prefixes: Sequence[Prefix]) -> None:
        assert plan.numbers is not None
        host = plan.numbers.host()
        host[:] = 0
        teams = kernels.decode_teams(self._shape, self.device, len(slots))
        filled = kernels.list_shared(prefixes, len(slots), self._shape, teams)
        for part, values in zip(np.split(host, np.cumsum([2, 3 * len(slots), len(slots)])), filled, strict=True):
            part[: len(values)] = values
        plan.numbers.send()

    def capture_prompts(self, batch: Batch) -> Plan:
        rows = len(batch.slots) - 1  # the last one is always empty
        block_tokens = self._blocks.queries // self._shape.group
        tasks = kernels.most_extend_tasks(len(batch.ids), rows, block_tokens, self._teams)
        numbers = Mirror(2 * rows + 6 * tasks, self.device)
        positions, tokens, listed = numbers.device.split([rows, rows, 6 * tasks])
        extend = self._extend_rows(batch, listed.view(6, tasks))
        return Plan(batch.page_table, self._decode(batch.slots[:-1], positions, tokens), extend, numbers)

    def refill_prompts(self, plan: Plan, starts: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> None:
        assert plan.numbers is not None and plan.decode is not None
        host, rows, count = plan.numbers.host(), len(plan.decode.slots), len(starts)
        positions, tokens, listed = host[:rows], host[rows : 2 * rows], host[2 * rows :].reshape(6, -1)
        positions[:], tokens[:count] = -1, offsets[:-1]
        positions[:count][lengths == 1] = starts[lengths == 1]
        tasks = self._list_tasks(starts, lengths)
        listed[0], listed[1:] = count, 0  # an empty row
        listed[:, : tasks.shape[1]] = tasks
        plan.numbers.send()

    def _decode(self, slots: Tensor, positions: Tensor, tokens: Tensor) -> "DecodeRows":
        teams = kernels.decode_teams(self._shape, self.device, len(slots))
        rows = kernels.plan_decode(slots, positions, tokens, self._shape, teams, self._scratch)
        self._scratch = rows.scratch
        return rows

    def attend_into(self, out: Tensor, query: Tensor, cache: Tensor, plan: Plan) -> None:
        if plan.decode is not None:
            kernels.attend_decode(query, cache, plan.page_table, out, plan.decode, self._shape)
        if plan.extend is not None:
            kernels.attend_extend(query, cache, plan.page_table, out, plan.extend, self._shape)
