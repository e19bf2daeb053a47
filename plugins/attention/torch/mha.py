"""Paged attention in plain PyTorch, for CPUs and as the fallback on GPUs.

Decode rows of a step are one call: their pages are gathered, padded to the longest, and masked. Rows of
more than one token (prefill chunks) are one call each; one that starts at 0 reads its own keys and values
instead of the pages. With a window, only pages that it touches are gathered. Left out: attending in place. A gather
copies the context once a layer, and a decode step costs rows x longest context, so a kernel that reads pages where
they lie beats this on a GPU; and a prefill chunk computes scores that its window masks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.plugin import ConfigError, KVGroup
from engine.plugin.layers import AttentionBackend, Batch


class Prefill(NamedTuple):
    """A row of several tokens: where its tokens are in the step, the halves of its pages, its mask."""

    tokens: slice
    halves: Tensor | None  # [2, pages] from the first that is seen; None when the row has nothing in the cache yet
    mask: Tensor | None  # [tokens, context] bool, true where seen; None when that is all up to the token


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. A page's keys are half 2 * page and its values half 2 * page + 1 of the flat cache."""

    key_places: Tensor  # [T] where in the flat cache each token's key goes
    value_places: Tensor  # [T]
    prefills: tuple[Prefill, ...]
    decodes: Tensor | None  # [R] which tokens are a row of their own; None when all are, in order
    halves: Tensor | None  # [2, R, pages] of the decode rows, padded; None when there is no decode row
    mask: Tensor | None  # [R, 1, 1, pages * page_size] bool, true where seen


class TorchAttention(AttentionBackend):
    """A page is [2, page_size, kv_heads, head_dim]: its keys, then its values."""

    def set_up(self) -> None:
        if self.kv_dtype != self.dtype:
            raise ConfigError(
                f"attention torch keeps the KV cache in {self.dtype}, not {self.kv_dtype}; say --kv-dtype auto"
            )
        self._halves_apart = 2 * self.shape.layers  # of a page and the next one, in the flat cache

    def kv_group(self) -> KVGroup:
        shape = (2, self.page_size, self.shape.kv_heads, self.shape.head_dim)
        return KVGroup(self.shape.layers, shape, str(self.dtype).removeprefix("torch."))

    def prepare(self, batch: Batch) -> Plan:
        size = self.page_size
        pages = batch.places.div(size, rounding_mode="floor")
        key_places = batch.places + pages * (self._halves_apart - 1) * size
        rows = np.flatnonzero(batch.lengths == 1)
        table = batch.pages(size)
        decodes = halves = mask = None
        if len(rows):
            if len(rows) < len(batch.lengths):
                decodes = self._tensor(batch.offsets[rows])
            halves, mask = self._decode_pages(batch, table, rows)
        prefills = tuple(self._prefill(batch, table[row], row) for row in np.flatnonzero(batch.lengths > 1).tolist())
        return Plan(key_places, key_places + size, prefills, decodes, halves, mask)

    def _first_page(self, positions: np.ndarray) -> np.ndarray:
        """The first page that queries at `positions` see."""
        window = self.shape.window
        return np.zeros_like(positions) if window is None else (positions + 1 - window).clip(0) // self.page_size

    def _seen(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether a query sees a key, by their positions."""
        seen = keys <= queries
        return seen if self.shape.window is None else seen & (keys > queries - self.shape.window)

    def _decode_pages(self, batch: Batch, table: Tensor, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """`halves` and `mask` of the rows that compute one token."""
        size, ends = self.page_size, batch.starts[rows]
        first = self._first_page(ends)
        count = int((ends // size - first).max()) + 1
        if len(rows) < len(batch.lengths):
            table = table[self._tensor(rows)]
        keys = torch.arange(count * size, device=self.device)
        if first.any():
            begins = self._tensor(first)[:, None]
            pages = begins + torch.arange(count, device=self.device)  # past a row's last page some other, masked one
            table = table.gather(1, pages.clamp_(max=table.shape[1] - 1))
            keys = keys + begins * size
        mask = self._seen(self._tensor(ends)[:, None], keys)
        return self._halves(table[:, :count]), mask[:, None, None]

    def _prefill(self, batch: Batch, pages: Tensor, row: int) -> Prefill:
        start, length, window = int(batch.starts[row]), int(batch.lengths[row]), self.shape.window
        tokens = slice(int(batch.offsets[row]), int(batch.offsets[row + 1]))
        if start == 0 and (window is None or length <= window):
            return Prefill(tokens, None, None)
        end = start + length
        first = int(self._first_page(np.array(start)))
        positions = torch.arange(first * self.page_size, end, device=self.device)
        mask = self._seen(positions[-length:, None], positions)
        if start == 0:
            return Prefill(tokens, None, mask)
        return Prefill(tokens, self._halves(pages[first : -(-end // self.page_size)]), mask)

    def _tensor(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.device, non_blocking=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, places: Tensor, plan: Plan) -> Tensor:
        tokens = self._flat(cache).flatten(0, 1)
        tokens.index_copy_(0, plan.key_places, key)
        tokens.index_copy_(0, plan.value_places, value)
        if plan.decodes is None and not plan.prefills:
            return self._decode(query, cache, plan).reshape(query.shape[0], -1)
        out = torch.empty_like(query)
        for prefill in plan.prefills:
            part = prefill.tokens
            out[part] = self._attend_prefill(query[part], key[part], value[part], cache, prefill)
        if plan.halves is not None:
            out[plan.decodes] = self._decode(query[plan.decodes], cache, plan)
        return out.view(out.shape[0], -1)

    def _decode(self, query: Tensor, cache: Tensor, plan: Plan) -> Tensor:
        """[R, query_heads, head_dim] in and out. The query heads that share a key head ride as its queries."""
        assert plan.halves is not None
        key, value = self._gather(cache, plan.halves)
        grouped = query.view(query.shape[0], self.shape.kv_heads, -1, self.shape.head_dim)
        out = scaled_dot_product_attention(grouped, key, value, attn_mask=plan.mask, scale=self.shape.scale)
        return out.reshape(query.shape)

    def _attend_prefill(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, prefill: Prefill) -> Tensor:
        """[length, query_heads, head_dim] in and out, for one row."""
        if prefill.halves is None:
            key, value = key.transpose(0, 1)[None], value.transpose(0, 1)[None]
        else:
            assert prefill.mask is not None
            key, value = self._gather(cache, prefill.halves[:, None])
            context = prefill.mask.shape[1]
            key, value = key[:, :, :context], value[:, :, :context]
        out = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key,
            value,
            attn_mask=prefill.mask,
            is_causal=prefill.mask is None,
            scale=self.shape.scale,
            enable_gqa=self.shape.query_heads != self.shape.kv_heads,
        )
        return out[0].transpose(0, 1)

    def _gather(self, cache: Tensor, halves: Tensor) -> Tensor:
        """Keys and values of the pages: `halves` [2, R, pages] to [2, R, kv_heads, pages * page_size, head_dim]."""
        _, rows, pages = halves.shape
        gathered = self._flat(cache).index_select(0, halves.reshape(-1))
        return gathered.view(2, rows, pages * self.page_size, *gathered.shape[2:]).transpose(2, 3)

    def _flat(self, cache: Tensor) -> Tensor:
        """One layer's cache [pages, 2, page_size, kv_heads, head_dim] as halves of pages end to end, those of the other
        layers between: [halves, page_size, kv_heads, head_dim]."""
        halves = (len(cache) - 1) * self._halves_apart + 2
        return cache.as_strided((halves, *cache.shape[2:]), cache.stride()[1:])

    def _halves(self, pages: Tensor) -> Tensor:
        """Where the keys, then the values, of `pages` are in the flat cache: [...] to [2, ...]."""
        first = self._halves_apart * pages
        return torch.stack((first, first + 1))
