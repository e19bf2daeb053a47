"""The seam between a model and an attention backend: the cache layout is the backend's, the layer is thin.

One backend object serves one KV group: layers that share a shape, so one plan a step serves them all.
Left out: masks other than causal and windows, latent (MLA) attention, which is a backend of another shape; pages
that all windows have passed stay with their request until it ends.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.layers.batch import Batch
from engine.plugin.specs import KVGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Causal grouped-query attention as one rank computes it; `scale` multiplies the scores.

    With a `window`, a query sees that many positions, its own the last of them.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None


class AttentionBackend(ABC):
    """Causal attention over a paged KV cache.

    The contract: `forward` writes K and V of ALL rows of the step into the cache before any row reads
    it, so a row may use pages that another row of the same step fills. Query i of row r sees positions
    0 .. starts[r]+i of that row, with a window the last `window` of them, and nothing else, whatever else lies
    in the pages: they start as zeros and are reused without being cleared.
    """

    def __init__(self, shape: AttentionShape, page_size: int, device: torch.device, dtype: torch.dtype) -> None:
        """Raises ConfigError for a shape, page size or type that the backend cannot serve."""
        self.shape = shape
        self.page_size = page_size
        self.device = device
        self.dtype = dtype

    @abstractmethod
    def kv_group(self) -> KVGroup:
        """Layout of one page of one layer. The cache is allocated to it, zeroed."""

    @abstractmethod
    def prepare(self, batch: Batch) -> Any:
        """The plan of one step, made once for all layers (`batch.plans` is not set yet)."""

    @abstractmethod
    def forward(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, plan: Any) -> Tensor:
        """Writes key and value, then attends.

        `query` [T, query_heads, head_dim]; `key`, `value` [T, kv_heads, head_dim], any strides with the last
        dimension dense; `cache` [pages, *page shape]. Returns [T, query_heads * head_dim] in query's dtype.
        """


class Attention(nn.Module):
    """Layer `layer` of KV group `group`, computed by that group's backend."""

    def __init__(self, backend: AttentionBackend, layer: int, group: int = 0) -> None:
        super().__init__()
        self.backend = backend
        self.layer = layer
        self.group = group

    def forward(self, query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> Tensor:
        """Shapes as AttentionBackend.forward."""
        cache = batch.caches[self.group][self.layer]
        return self.backend.forward(query, key, value, cache, batch.plans[self.group])
