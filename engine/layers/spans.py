"""Attention of tokens that see each other: those of a picture in Gemma 3, before which all else is causal.

    positions   0 1 2 [3 4 5] 6      4 sees 0 .. 5, and 2 sees 0 .. 2; with a window of 3 it sees 2 .. 5

A backend attends causally, and then the tokens of whole spans attend once more, over all keys up to the end of their
span, which the step has written by then. So backends know nothing of spans, as long as their pages are laid out as
PagedAttention's. What a span takes twice is little beside the rest of a prompt. Left out: spans in captured steps, of
which there are none, and one call for several spans.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.layers.batch import Batch


def attend_whole(
    attended: Tensor, query: Tensor, cache: Tensor, batch: Batch, *, window: int | None, scale: float
) -> Tensor:
    """`attended` [T, heads * dim], in which what the tokens of whole spans say is written over.

    `query` [T, heads, dim] is rotated; `cache` [pages, 2, page_size, kv_heads, dim] holds all keys and values."""
    page_size = cache.shape[2]
    stored = cache.view(torch.uint8) if cache.itemsize == 1 else cache  # floats of one byte are no type to index
    for span in batch.whole:
        rows = slice(span.first, span.first + span.count)
        end = span.position + span.count
        low = 0 if window is None else max(0, span.position - window + 1)
        first = low // page_size
        pages = batch.page_table[span.slot, first : -(-end // page_size)].to(torch.int64)
        known = slice(low - first * page_size, end - first * page_size)
        key, value = (
            stored[pages, half].view(cache.dtype).flatten(0, 1)[known].to(query.dtype).transpose(0, 1)[None]
            for half in range(2)
        )
        mask = None
        if window is not None:
            places = torch.arange(low, end, device=query.device)
            mask = places > places[-span.count :, None] - window
        mixed = scaled_dot_product_attention(
            query[rows].transpose(0, 1)[None], key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
        attended[rows] = mixed[0].transpose(0, 1).flatten(1)
    return attended
