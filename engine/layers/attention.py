"""The seam between a model and an attention backend: the cache layout is the backend's, the layer is thin.

One backend object serves one KV group: layers that share a shape, so one plan a step serves them all.
Latent attention (MLA) is a backend of another shape (latent.py). Tokens that see each other attend once more, beside
it (spans.py). Left out: other masks; pages that all windows have passed stay with their request until it ends.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.kernels import KernelSet, choose
from engine.kernels.dense.reference import HeadNorms, Heads, Rotation
from engine.kernels.types import Prefix
from engine.layers.batch import Batch, upload
from engine.layers.kv_scales import FP8_TYPES, KVScales
from engine.layers.spans import attend_whole
from engine.messages.step import STEPS_IN_FLIGHT
from engine.plugin.specs import KVGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Causal grouped-query attention as one rank computes it; `scale` multiplies the scores.

    With a `window`, a query sees that many positions, its own the last of them. `kv_dtype` is the cache's type, by
    default that of the activations; keys and values come scaled into its range, and are rounded to it.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    kv_dtype: torch.dtype | None = None


class Backend(ABC):
    """What the worker knows of a backend: the layout of its cache, and a plan of each step for all layers.

    The contract of all backends: what ALL rows of the step put into the cache is there before any row reads
    it, so a row may use pages that another row of the same step fills. Query i of row r sees positions
    0 .. starts[r]+i of that row and nothing else, whatever else lies in the pages: they start as zeros and are reused
    without being cleared.

    Rows begin at `batch.row_starts`, on the device. The host's `starts` are the same, but for rows of drafts on a GPU:
    these may begin later than the host knows, so a backend that plans on the host from `starts`, as FlashInfer does,
    cannot serve them. No step with drafts is captured, so `refill` and its like always get exact starts.
    """

    steps_in_flight: int = STEPS_IN_FLIGHT  # whose plans may be under way at a time: what takes turns has so many
    most_graph_tokens: float = float("inf")  # of a step with prompts, beyond which `prepare` has a faster way

    def __init__(
        self,
        shape: Any,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
        kernel_set: KernelSet | None = None,
    ) -> None:
        """`shape` is what the layers share, of the type that a subclass declares; `dtype` that of the activations.
        `kernel_set` is the model's, as `Build` gives it; a backend without a model has the fastest one.

        Raises ConfigError for a shape, page size or type that the backend cannot serve."""
        self.shape = shape
        self.page_size = page_size
        self.device = device
        self.dtype = dtype
        self.kv_dtype: torch.dtype = shape.kv_dtype or dtype
        self.kernels = choose(device, dtype) if kernel_set is None else kernel_set
        self.set_up()

    def set_up(self) -> None:  # noqa: B027
        """What a backend does once it knows all that: it refuses what it cannot serve, and loads its kernels.

        Raises ConfigError, as the constructor then does."""

    def upload(self, numbers: np.ndarray) -> Tensor:
        """A device copy of a host array that does not wait for the device."""
        return upload(numbers, self.device)

    @abstractmethod
    def kv_group(self) -> KVGroup:
        """Layout of one page of one layer. The cache is allocated to it, zeroed."""

    @abstractmethod
    def prepare(self, batch: Batch) -> Any:
        """The plan of one step, made once for all layers (`batch.plans` is not set yet)."""

    def capture(self, batch: Batch) -> Any | None:
        """The plan of a decode step for a CUDA graph, or None: what the backend does cannot be captured.

        Each row of `batch` is one token. Its tensors stay where they are, and hold other numbers at each replay; its
        host arrays say nothing. `refill` is called before each replay.
        """
        return None

    def refill(self, plan: Any, slots: np.ndarray, starts: np.ndarray) -> None:  # noqa: B027
        """Brings a plan from `capture` up to date: row r computes position `starts[r]` of `slots[r]`, [R] int64 on the
        host.

        By default there is nothing to do: the kernels read all they need on the device."""

    def capture_shared(self, batch: Batch) -> Any | None:
        """As `capture`, for steps in which rows share prefixes: where the backend reads those once for all of them."""
        return None

    def refill_shared(self, plan: Any, slots: np.ndarray, starts: np.ndarray, prefixes: Sequence[Prefix]) -> None:
        """As `refill`, for a plan from `capture_shared`."""
        raise NotImplementedError  # who captures such plans fills them

    def capture_prompts(self, batch: Batch) -> Any | None:
        """As `capture`, for steps of at most as many rows and tokens as `batch` has, and no more than
        `most_graph_tokens`; `refill_prompts` says which."""
        return None

    def refill_prompts(  # noqa: B027
        self, plan: Any, starts: np.ndarray, lengths: np.ndarray, offsets: np.ndarray
    ) -> None:
        """Brings a plan from `capture_prompts` up to date; host arrays as in a Batch. The rows that
        `batch` has beyond them, one at least, are empty: on the device their offsets are equal."""


class AttentionBackend(Backend):
    """Causal attention of heads with keys and values of their own, over a paged KV cache.

    `forward` writes K and V of all rows, then attends. With a window, a query sees the last `window` of the positions
    up to its own.
    """

    shape: AttentionShape

    @abstractmethod
    def forward(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, places: Tensor, plan: Any) -> Tensor:
        """Writes key and value, then attends.

        `query` [T, query_heads, head_dim]; `key`, `value` [T, kv_heads, head_dim], any strides with the last
        dimension dense; `cache` [pages, *page shape]; `places` [T] as in a Batch. Returns [T, query_heads * head_dim]
        in query's dtype.
        """


class PagedAttention(AttentionBackend):
    """A backend whose pages are [2, page_size, kv_heads, head_dim], keys then values, and which reads nothing else.

    The model then rotates and writes in one kernel. A subclass says what `prepare` and `attend` do.
    """

    def kv_group(self) -> KVGroup:
        shape = (2, self.page_size, self.shape.kv_heads, self.shape.head_dim)
        return KVGroup(self.shape.layers, shape, str(self.kv_dtype).removeprefix("torch."))

    @abstractmethod
    def attend(self, query: Tensor, cache: Tensor, plan: Any) -> Tensor:
        """`query` [T, query_heads, head_dim] over pages that hold all keys and values; [T, query_heads * head_dim]."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, places: Tensor, plan: Any) -> Tensor:
        self.kernels.dense.write_pages(key, value, cache, places)
        return self.attend(query, cache, plan)


def check_layout(backend: AttentionBackend) -> None:
    """Raises ConfigError where tokens cannot see each other: what reads their keys and values knows one layout."""
    shape = backend.shape
    if tuple(backend.kv_group().shape) != (2, backend.page_size, shape.kv_heads, shape.head_dim):
        raise ConfigError(
            f"tokens of a picture see each other, and the attention backend {type(backend).__name__} has pages of "
            f"{backend.kv_group().shape}, not keys and then values of {backend.page_size} tokens; name another one in "
            "--plugins"
        )


class Attention(nn.Module):
    """Layer `layer` of KV group `group`, computed by that group's backend."""

    def __init__(self, backend: AttentionBackend, layer: int, group: int = 0) -> None:
        super().__init__()
        self.backend = backend
        self.layer = layer
        self.group = group
        self.scales: KVScales | None = None

    def scale(self, key: float, value: float, heads: Heads, norms: HeadNorms | None, like: Tensor) -> None:
        """Keeps an FP8 cache in range by these scales, as kv_scales.py says; a cache of another type needs none."""
        if self.backend.kv_dtype in FP8_TYPES:
            self.scales = KVScales.of(key, value, heads, norms, like)

    def forward(
        self,
        qkv: Tensor,
        heads: Heads,
        batch: Batch,
        rotation: Rotation | None = None,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        """`qkv` [T, (query + 2 * kv) * dim] as projected, which may be written over, to [T, query * dim].

        Query and key heads pass `norms`, then turn by `rotation`, where there are such."""
        if self.scales is not None:
            qkv, norms = self.scales.before(qkv, norms)
        ops, plan = self.backend.kernels.dense, batch.plans[self.group]
        cache = batch.caches[self.group][self.layer]
        if isinstance(self.backend, PagedAttention):
            query = ops.rotate_into_pages(qkv, heads, norms, rotation, cache, batch.places)
            attended = self.backend.attend(query, cache, plan)
        else:
            query, key, value = ops.rotate_heads(qkv, heads, norms, rotation)
            attended = self.backend.forward(query, key, value, cache, batch.places, plan)
        if batch.whole:
            shape = self.backend.shape
            attended = attend_whole(attended, query, cache, batch, window=shape.window, scale=shape.scale)
        return attended if self.scales is None else self.scales.after(attended)
