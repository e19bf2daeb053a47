"""Latent attention in plain PyTorch, for CPUs and as the reference.

Absorbed rows of one token are one call: their latents are gathered, padded to the longest, and masked; others are one
call each. Expanded rows are computed one by one, a block of queries at a time. Left out: attending in place.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.plugin.layers import Batch, LatentBackend

BLOCK = 512  # queries of an expanded row whose scores are held at a time


class Absorbed(NamedTuple):
    """Rows that attend in one call: R rows of n tokens."""

    tokens: Tensor | slice  # [R] indices, or the range of the only row's tokens
    pages: Tensor  # [R, P] int64
    mask: Tensor  # [R, n, P * page_size] bool, true where seen


class Expanded(NamedTuple):
    """Queries and keys of each row, [R] each, on the host."""

    queries: list[int]
    keys: list[int]
    causal: bool


class TorchLatentAttention(LatentBackend):
    """Serves every shape and type, on any device."""

    def prepare_absorbed(self, batch: Batch) -> list[Absorbed]:
        table, size = batch.pages(self.page_size), self.page_size
        calls = []
        ones = np.flatnonzero(batch.lengths == 1)
        if len(ones):
            index, tokens, starts = self.upload(np.stack((ones, batch.offsets[ones], batch.starts[ones])))
            count = int(batch.starts[ones].max()) // size + 1
            mask = torch.arange(count * size, device=self.device) <= starts[:, None, None]
            calls.append(Absorbed(tokens, table[index, :count], mask))
        for row in np.flatnonzero(batch.lengths > 1).tolist():
            start, end = int(batch.starts[row]), int(batch.starts[row] + batch.lengths[row])
            count = -(-end // size)
            positions = torch.arange(count * size, device=self.device)
            mask = positions <= positions[start:end, None]
            tokens = slice(int(batch.offsets[row]), int(batch.offsets[row + 1]))
            calls.append(Absorbed(tokens, table[row : row + 1, :count], mask[None]))
        return calls

    def attend(self, query: Tensor, rotated: Tensor, cache: Tensor, plan: list[Absorbed]) -> Tensor:
        latent = self.shape.latent_dim
        whole = torch.cat((query, rotated), dim=2)
        out = query.new_empty(*query.shape[:2], latent)
        for call in plan:
            rows, tokens, context = call.mask.shape
            places = call.pages[:, :, None] * self.page_size + torch.arange(self.page_size, device=self.device)
            latents = self.gather(cache, places.flatten()).view(rows, 1, context, -1)
            mine = whole[call.tokens].view(rows, tokens, *whole.shape[1:]).transpose(1, 2).flatten(1, 2)[:, None]
            mask = call.mask[:, None].expand(-1, query.shape[1], -1, -1).flatten(1, 2)[:, None]
            attended = scaled_dot_product_attention(
                mine, latents, latents[..., :latent], attn_mask=mask, scale=self.shape.scale
            )
            out[call.tokens] = attended.view(rows, -1, tokens, latent).transpose(1, 2).flatten(0, 1)
        return out

    def prepare_expanded(self, queries: np.ndarray, keys: np.ndarray, causal: bool) -> Expanded:
        return Expanded(queries.tolist(), keys.tolist(), causal)

    def attend_expanded(
        self, query: Tensor, key: Tensor, rotated: Tensor, value: Tensor, plan: Expanded
    ) -> tuple[Tensor, Tensor]:
        key = torch.cat((key, rotated[:, None].expand(-1, key.shape[1], -1)), dim=2)
        out = query.new_empty(*query.shape[:2], value.shape[2])
        sums = query.new_empty(query.shape[:2], dtype=torch.float32)
        first = 0
        keys = key.split(plan.keys)
        for count, mine, values in zip(plan.queries, keys, value.split(plan.keys), strict=True):
            for begin in range(0, count, BLOCK):
                end = min(begin + BLOCK, count)
                seen = len(mine) - count + end if plan.causal else len(mine)
                scores = torch.einsum("nhd,mhd->hnm", query[first + begin : first + end], mine[:seen])
                scores = scores.to(torch.float32) * self.shape.scale
                if plan.causal:
                    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=self.device)
                    scores.masked_fill_(hidden.triu(seen - (end - begin) + 1), -torch.inf)
                weights = scores.softmax(-1).to(value.dtype)
                out[first + begin : first + end] = torch.einsum("hnm,mhd->nhd", weights, values[:seen])
                sums[first + begin : first + end] = scores.logsumexp(-1).T
            first += count
        return out, sums
