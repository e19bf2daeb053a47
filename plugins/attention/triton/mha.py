"""Paged attention in Triton, for GPUs: keys and values are read where they lie, for any page size and head size.

Rows of one token go to a kernel that cuts long contexts among programs, others to one that cuts prompts into blocks
(engine/kernels/attention/decode.py, extend.py). Decode steps can be captured: of their plan nothing comes
from the host but which rows share a prefix.

The few last tokens of a prompt whose beginning is cached make one block, so one program would read all of the context.
In captured steps the first kernel has such rows too, each token as a row of its own. Left out: the same in steps that
are not captured.
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

FEW_TOKENS, LONG = 8, 256  # a row of so few tokens behind so many positions is cut as its tokens are
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: the rows of one token, and the others; None where there are none."""

    page_table: Tensor
    decode: "DecodeRows | None"
    extend: "ExtendRows | None"
    numbers: Mirror | None = None  # of a captured step: what differs from replay to replay
    # of a captured step with prompts: the slots of its rows [R], and by a row of `decode`, which of them it is [D]
    slots: Tensor | None = None
    rows: Tensor | None = None


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
        # of several tokens, whose programs leave half of the device's processors idle
        self._idle_rows = max(1, kernels.decode_teams(self._shape, device, 1) // 4)
        self._block_tokens = kernels.extend_blocks(self._shape, dtype).queries // self._shape.group

    def prepare(self, batch: Batch) -> Plan:
        decode, extend = self.decode_rows(batch, np.flatnonzero(batch.lengths == 1)), None
        if not (batch.lengths == 1).all():
            blocks = kernels.list_extend_blocks(batch.starts, batch.lengths, self._block_tokens)
            extend = kernels.ExtendRows(
                blocks=self.upload(blocks), slots=batch.slots, starts=batch.row_starts, offsets=batch.row_offsets
            )
        return Plan(batch.page_table, decode, extend)

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
        blocks = -(-len(batch.ids) // self._block_tokens) + rows + 1
        numbers = Mirror(3 * rows + 2 * blocks, self.device)
        positions, tokens, row, listed = numbers.device.split([rows, rows, rows, 2 * blocks])
        extend = kernels.ExtendRows(
            blocks=listed.view(2, blocks), slots=batch.slots, starts=batch.row_starts, offsets=batch.row_offsets
        )
        decode = self._decode(batch.slots[:-1].clone(), positions, tokens)
        return Plan(batch.page_table, decode, extend, numbers, batch.slots, row)

    def refill_prompts(self, plan: Plan, starts: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> None:
        assert plan.numbers is not None and plan.decode is not None and plan.slots is not None and plan.rows is not None
        host, most = plan.numbers.host(), len(plan.decode.slots)
        positions, tokens, row, listed = np.split(host, [most, 2 * most, 3 * most])
        cut = self._cut_rows(starts, lengths, most)
        rows = np.flatnonzero(cut)
        each = np.repeat(rows, lengths[rows])
        count = len(each)
        tokens[:count] = np.arange(int(offsets[-1]))[np.repeat(cut, lengths)]
        positions[:count], positions[count:] = starts[each] + tokens[:count] - offsets[each], -1
        row[:count], row[count:] = each, 0
        blocks = kernels.list_extend_blocks(starts, np.where(cut, 0, lengths), self._block_tokens)
        listed = listed.reshape(2, -1)
        listed[0], listed[1] = len(starts), 0  # an empty row
        listed[:, : blocks.shape[1]] = blocks
        plan.numbers.send()
        torch.index_select(plan.slots, 0, plan.rows, out=plan.decode.slots)

    def _cut_rows(self, starts: np.ndarray, lengths: np.ndarray, most: int) -> np.ndarray:
        """Which rows of a captured step go to the kernel for rows of one token, [R] bool: those, and others whose
        blocks would leave the device idle, while all have `most` tokens at most."""
        ones = lengths == 1
        few = ~ones & (lengths > 0) & (lengths <= FEW_TOKENS) & (starts >= LONG)
        if few.sum() > self._idle_rows:
            return ones
        fits = np.cumsum(np.where(few, lengths, 0)) <= most - ones.sum()
        return ones | (few & fits)

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
