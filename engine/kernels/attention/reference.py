"""Attention in torch, by its definition: what every kernel and every backend of attention must compute."""

import torch
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Causal attention of one row: `query` [n, query_heads, dim] of its last n positions over all of its m, `key` and
    `value` [m, kv_heads, dim], which as many query heads share. [n, query_heads, dim].

    `scale` multiplies the scores. With a `window` a query sees that many positions, its own the last of them."""
    start, group = len(key) - len(query), query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    unseen = torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device).triu(start + 1)
    if window is not None:
        unseen |= torch.ones_like(unseen).tril(start - window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), value)


def list_pages(page_table: Tensor, slots: Tensor, offsets: Tensor, pages: Tensor) -> None:
    """Writes row r's pages, the first of the line `page_table[slots[r]]`, to pages[offsets[r] : offsets[r + 1]].

    `page_table` [slots, P] int32, lines dense; `slots` [R] int64; `offsets` [R + 1] int32, ascending from 0 by at most
    P; `pages` int32, at least offsets[R]; what lies behind that stays. All on one device."""
    for row, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        pages[first:end] = page_table[slots[row], : end - first]


def join_keys(key: Tensor, rotated: Tensor) -> Tensor:
    """Whole keys [m, heads, key_dim + rope_dim] of `key` [m, heads, key_dim] and `rotated` [m, rope_dim]."""
    return torch.cat((key, rotated[:, None].expand(-1, key.shape[1], -1)), dim=2)
