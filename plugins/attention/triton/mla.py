"""Latent attention in Triton, for GPUs: latents are read where they lie, once for many query heads.

Absorbed rows of one token go to a kernel that divides contexts evenly among programs, longer ones to one that cuts
prompts into blocks (engine/kernels/attention/mla.py); expanded rows to one of their own (expanded.py). Steps can
be captured: of a decode step's plan nothing comes from the host.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine.plugin import ConfigError, kernels
from engine.plugin.layers import Batch, LatentBackend, LatentShape, Mirror

if TYPE_CHECKING:
    from engine.plugin.kernels import ExpandedRows, MlaDecodeRows, MlaExtendRows, MlaScratch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Plan:
    """Absorbed rows of a step: those of one token, and the others; None where there are none."""

    page_table: Tensor
    decode: "MlaDecodeRows | None"
    extend: "MlaExtendRows | None"
    numbers: Mirror | None = None  # of a captured step with prompts: what differs from replay to replay


class TritonLatentAttention(LatentBackend):
    """Serves bfloat16, float16 and float32, each with a cache of its own type or float8_e4m3fn, and dimensions that are
    powers of two."""

    def set_up(self) -> None:
        shape, device, dtype = self.shape, self.device, self.dtype
        check_served(shape, device, dtype, self.kv_dtype, interpreted=kernels.interpreted())
        self._shape = kernels.MlaShape(
            heads=shape.query_heads,
            latent_dim=shape.latent_dim,
            rope_dim=shape.rope_dim,
            page_size=self.page_size,
            scale=shape.scale,
        )
        self._teams = kernels.mla_decode_teams(self._shape, dtype, device)
        self._scratch: MlaScratch = kernels.MlaScratch.of(self._teams, self._shape, device)
        self._lines = kernels.mla_extend_cut(self._shape, dtype).lines
        self._queries = kernels.expanded_cut(dtype).queries

    def prepare_absorbed(self, batch: Batch) -> Plan:
        rows = np.flatnonzero(batch.lengths == 1)
        decode = extend = None
        if len(rows):
            index = self.upload(rows)
            decode = self._decode(*(part[index] for part in (batch.slots, batch.row_starts, batch.row_offsets)))
        if len(rows) < len(batch.lengths):
            listed = kernels.list_mla_blocks(batch.starts, batch.lengths, self._shape.heads, self._lines)
            extend = self._extend(batch, self.upload(listed))
        return Plan(batch.page_table, decode, extend)

    def capture(self, batch: Batch) -> Plan:
        return Plan(batch.page_table, self._decode(batch.slots, batch.row_starts, batch.row_offsets[:-1]), None)

    def capture_prompts(self, batch: Batch) -> Plan:
        rows = len(batch.slots) - 1  # the last one is always empty
        blocks = -(-len(batch.ids) * self._shape.heads // self._lines) + rows + 1
        numbers = Mirror(2 * (rows + blocks), self.device)
        positions, tokens, listed = numbers.device.split([rows, rows, 2 * blocks])
        decode = self._decode(batch.slots[:-1], positions, tokens)
        return Plan(batch.page_table, decode, self._extend(batch, listed.view(2, blocks)), numbers)

    def refill_prompts(self, plan: Plan, starts: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> None:
        assert plan.numbers is not None and plan.decode is not None
        host, rows, count = plan.numbers.host(), len(plan.decode.slots), len(starts)
        positions, tokens, listed = host[:rows], host[rows : 2 * rows], host[2 * rows :].reshape(2, -1)
        positions[:], tokens[:count] = -1, offsets[:-1]
        positions[:count][lengths == 1] = starts[lengths == 1]
        blocks = kernels.list_mla_blocks(starts, lengths, self._shape.heads, self._lines)
        listed[0], listed[1] = count, 0  # an empty row
        listed[:, : blocks.shape[1]] = blocks
        plan.numbers.send()

    def _decode(self, slots: Tensor, positions: Tensor, tokens: Tensor) -> "MlaDecodeRows":
        return kernels.MlaDecodeRows(
            slots=slots, positions=positions, tokens=tokens, scratch=self._scratch, teams=self._teams
        )

    def _extend(self, batch: Batch, blocks: Tensor) -> "MlaExtendRows":
        return kernels.MlaExtendRows(
            blocks=blocks, slots=batch.slots, starts=batch.row_starts, offsets=batch.row_offsets
        )

    def attend(self, query: Tensor, rotated: Tensor, cache: Tensor, plan: Plan) -> Tensor:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        common = (query, rotated, cache, plan.page_table, out)
        if plan.decode is not None:
            kernels.attend_mla_decode(*common, plan.decode, self._shape)
        if plan.extend is not None:
            kernels.attend_mla_extend(*common, plan.extend, self._shape)
        return out

    def prepare_expanded(self, queries: np.ndarray, keys: np.ndarray, causal: bool) -> "ExpandedRows":
        blocks = kernels.list_expanded(queries, keys, causal, self._queries)
        ends = [np.concatenate(([0], np.cumsum(lengths))) for lengths in (queries, keys)]
        parts = self.upload(np.concatenate((blocks.ravel(), *ends))).split([blocks.size, *map(len, ends)])
        return kernels.ExpandedRows(blocks=parts[0].view(2, -1), queries=parts[1], keys=parts[2], causal=causal)

    def attend_expanded(
        self, query: Tensor, key: Tensor, rotated: Tensor, value: Tensor, plan: "ExpandedRows"
    ) -> tuple[Tensor, Tensor]:
        out = query.new_empty(*query.shape[:2], value.shape[2])
        sums = query.new_empty(query.shape[:2], dtype=torch.float32)
        kernels.attend_expanded(query, key, rotated, value, out, sums, plan, self.shape.scale)
        return out, sums


def check_served(
    shape: LatentShape, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, interpreted: bool
) -> None:
    """Raises ConfigError for what the kernels do not compute."""
    if device.type != "cuda" and not interpreted:
        raise ConfigError(f"latent attention triton runs on GPUs, not on {device}; say --plugins torch")
    if dtype not in DTYPES or kv_dtype not in (dtype, torch.float8_e4m3fn):
        raise ConfigError(
            f"latent attention triton computes in bfloat16, float16 or float32 and caches that or float8_e4m3fn, "
            f"not {kv_dtype} for {dtype}"
        )
    dims = (shape.latent_dim, shape.rope_dim, shape.key_dim, shape.value_dim)
    if any(dim < 16 or dim & (dim - 1) for dim in dims) or shape.latent_dim > 512:
        raise ConfigError(f"latent attention triton takes dimensions of 16, 32, … 512, not {dims}")
