"""The seam between a model and a backend of latent attention (MLA, DeepSeek-V2, arXiv:2405.04434).

The cache holds one latent a token, of which a matrix `up` makes the keys and values of all heads. So there are two ways
to attend, with the same result:

    absorbed   query ─ up(keys)ᵀ ─ attends to latents ─ up(values) ─> out      reads little, computes more a token
    expanded   latents ─ up ─> keys, values of every head; query attends ─> out   computes less a token, once expanded

A row goes the way that costs less: few tokens after many are absorbed, prompts expanded. The latter expand their own
tokens at once and what is cached before them in chunks, and add the parts by the size of their scores' sums. Which rows
are which is decided here, for all backends. Left out: windows, expanded rows in CUDA graphs, whose sizes change from
step to step.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from engine.layers.attention import Backend
from engine.layers.batch import Batch
from engine.plugin.specs import KVGroup

LEAST_EXPANDED = 32  # tokens of a row: where it is short, either way costs little and one for all costs least
CHUNK_BYTES = 256 << 20  # of keys and values expanded from the cache at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShape:
    """Causal latent attention as one rank computes it; `scale` multiplies the scores.

    A token's latent is `latent_dim` numbers, and `rope_dim` that are rotated and are part of every head's key. A query
    or an expanded key of a head has `key_dim + rope_dim` numbers, the rotated ones last, an expanded value `value_dim`.
    `kv_dtype` is the cache's type, by default that of the activations; values are rounded to it, not scaled.
    """

    layers: int
    query_heads: int
    latent_dim: int
    rope_dim: int
    key_dim: int
    value_dim: int
    scale: float
    kv_dtype: torch.dtype | None = None

    @property
    def width(self) -> int:
        """Numbers in the cache, a token and layer."""
        return self.latent_dim + self.rope_dim


Tokens = slice | Tensor | None  # which of a step's tokens: a range, int64 indices, or all


class CachedPart(NamedTuple):
    """Cached tokens that are expanded together."""

    queries: slice  # which of the expanded rows' tokens attend to them
    places: Tensor  # [m] int64
    plan: Any  # of `prepare_expanded`


class Expansion(NamedTuple):
    """Rows that are expanded: their own tokens, then what lies before them."""

    tokens: Tokens
    own: Any  # of `prepare_expanded`
    cached: tuple[CachedPart, ...]


class SplitPlan(NamedTuple):
    """A step with expanded rows, and perhaps others. A step without has what `prepare_absorbed` returned for a plan."""

    expansion: Expansion
    absorbed_tokens: Tokens
    absorbed: Any | None


class LatentBackend(Backend):
    """Latent attention over a paged cache whose pages are [page_size, latent_dim + rope_dim].

    The model writes the latents of all rows of a step (`Ops.latent_into_pages`), then calls `forward`. A subclass says
    how absorbed rows attend over pages, and expanded ones over keys and values that lie side by side.
    """

    shape: LatentShape
    chunk_bytes = CHUNK_BYTES
    most_graph_tokens = 1024  # more tokens of prompts are better expanded

    def kv_group(self) -> KVGroup:
        shape = (self.page_size, self.shape.width)
        return KVGroup(self.shape.layers, shape, str(self.kv_dtype).removeprefix("torch."))

    @abstractmethod
    def prepare_absorbed(self, batch: Batch) -> Any:
        """The plan of rows that are absorbed, of any length; `capture` and the like return such a plan too."""

    @abstractmethod
    def attend(self, query: Tensor, rotated: Tensor, cache: Tensor, plan: Any) -> Tensor:
        """Absorbed rows over pages that hold all latents: [T, query_heads, latent_dim].

        `query` [T, query_heads, latent_dim] and `rotated` [T, query_heads, rope_dim] of any strides with the last
        dimension dense; `cache` [pages, page_size, latent_dim + rope_dim].
        """

    @abstractmethod
    def prepare_expanded(self, queries: np.ndarray, keys: np.ndarray, causal: bool) -> Any:
        """The plan for rows of queries[r] queries and keys[r] keys, [R] int64, at least 1. Of n queries and m keys of
        a row, query i sees the keys up to m - n + i if `causal`, else all."""

    @abstractmethod
    def attend_expanded(
        self, query: Tensor, key: Tensor, rotated: Tensor, value: Tensor, plan: Any
    ) -> tuple[Tensor, Tensor]:
        """(attention [n, query_heads, value_dim], logarithm of the sum of exponentials [n, query_heads] float32).

        `query` [n, query_heads, key_dim + rope_dim], `key` [m, query_heads, key_dim], `rotated` [m, rope_dim] that is
        part of every head's key, `value` [m, query_heads, value_dim]: the rows' end to end, the last dimension dense.
        """

    def expands(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Which rows are expanded, [R] bool: those that take fewer multiplications so.

        Of a head, a token costs as much to absorb as to expand; what remains are the scores and sums of each pair of
        positions, and what lies in the cache, which has to be expanded."""
        shape = self.shape
        token = shape.latent_dim * (shape.key_dim + shape.value_dim)
        absorbed = 2 * shape.latent_dim + shape.rope_dim  # of a pair
        expanded = shape.key_dim + shape.rope_dim + shape.value_dim
        pairs = lengths * (starts + lengths / 2)
        chosen: np.ndarray = (lengths >= LEAST_EXPANDED) & (pairs * (absorbed - expanded) >= starts * token)
        return chosen

    def prepare(self, batch: Batch) -> Any:
        long = self.expands(batch.starts, batch.lengths)
        if not long.any():
            return self.prepare_absorbed(batch)
        absorbed_tokens, absorbed = None, None
        if not long.all():
            rows = np.flatnonzero(~long)
            absorbed_tokens = self._tokens(batch, rows)
            absorbed = self.prepare_absorbed(self._select(batch, rows))
        rows = np.flatnonzero(long)
        lengths, starts = batch.lengths[rows], batch.starts[rows]
        own = self.prepare_expanded(lengths, lengths, causal=True)
        cached = tuple(self._cached_part(batch, rows, *part) for part in cut(starts, self.chunk_tokens))
        return SplitPlan(Expansion(self._tokens(batch, rows), own, cached), absorbed_tokens, absorbed)

    @property
    def chunk_tokens(self) -> int:
        """Cached tokens that are expanded at a time."""
        shape = self.shape
        numbers = shape.query_heads * (2 * shape.key_dim + shape.rope_dim + shape.value_dim)  # some copy keys
        return max(self.chunk_bytes // (numbers * self.dtype.itemsize), 1)

    def _cached_part(
        self, batch: Batch, rows: np.ndarray, first: int, begins: np.ndarray, ends: np.ndarray
    ) -> CachedPart:
        """The cached positions begins[i] .. ends[i] - 1 of the rows rows[first + i]."""
        lengths, counts = batch.lengths[rows], ends - begins
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        queries = slice(int(offsets[first]), int(offsets[first + len(counts)]))
        chosen = rows[first : first + len(counts)]
        positions = np.arange(counts.sum()) + np.repeat(begins - np.cumsum(counts) + counts, counts)
        row, position = self.upload(np.stack((np.repeat(chosen, counts), positions)))
        page = batch.page_table[batch.slots[row], position // self.page_size].to(torch.int64)
        places = page * self.page_size + position % self.page_size
        return CachedPart(queries, places, self.prepare_expanded(batch.lengths[chosen], counts, causal=False))

    def _tokens(self, batch: Batch, rows: np.ndarray) -> Tokens:
        """The tokens of `rows`, which ascend."""
        if len(rows) == len(batch.lengths):
            return None
        if rows[-1] - rows[0] == len(rows) - 1:
            return slice(int(batch.offsets[rows[0]]), int(batch.offsets[rows[-1] + 1]))
        return self.upload(np.concatenate([np.arange(*batch.offsets[row : row + 2]) for row in rows.tolist()]))

    def _select(self, batch: Batch, rows: np.ndarray) -> Batch:
        """The step of `rows` alone, as far as attention looks at it."""
        lengths = batch.lengths[rows]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        index, row_offsets = self.upload(np.concatenate((rows, offsets))).split([len(rows), len(offsets)])
        return dataclasses.replace(
            batch,
            slots=batch.slots[index],
            row_starts=batch.row_starts[index],
            row_offsets=row_offsets,
            starts=batch.starts[rows],
            lengths=lengths,
            offsets=offsets,
        )

    def forward(self, query: Tensor, latents: Tensor, up: Tensor, cache: Tensor, plan: Any) -> Tensor:
        """Attends: [T, query_heads, value_dim].

        `query` [T, query_heads, key_dim + rope_dim] and `latents` [T, latent_dim + rope_dim] as they are written in
        `cache`, both rotated; `up` [query_heads, key_dim + value_dim, latent_dim] in the activations' type.
        """
        if not isinstance(plan, SplitPlan):
            return self._absorbed(query, up, cache, plan)
        expansion = plan.expansion
        if expansion.tokens is None:
            return self._expanded(query, latents, up, cache, expansion)
        out = query.new_empty(*query.shape[:2], self.shape.value_dim)
        out[expansion.tokens] = self._expanded(query[expansion.tokens], latents[expansion.tokens], up, cache, expansion)
        out[plan.absorbed_tokens] = self._absorbed(query[plan.absorbed_tokens], up, cache, plan.absorbed)
        return out

    def _absorbed(self, query: Tensor, up: Tensor, cache: Tensor, plan: Any) -> Tensor:
        shape = self.shape
        keys, values = up.split([shape.key_dim, shape.value_dim], dim=1)
        unrotated, rotated = query.split([shape.key_dim, shape.rope_dim], dim=2)
        ops = self.kernels.dense
        attended = self.attend(ops.multiply_heads(unrotated, keys), rotated, cache, plan)
        return ops.multiply_heads(attended, values.transpose(1, 2))

    def _expanded(self, query: Tensor, latents: Tensor, up: Tensor, cache: Tensor, expansion: Expansion) -> Tensor:
        out, sums = self.attend_expanded(query, *self._expand(latents, up), expansion.own)
        if not expansion.cached:
            return out
        out = out.to(torch.float32)
        for part in expansion.cached:
            expanded = self._expand(self.gather(cache, part.places), up)
            before = self.attend_expanded(query[part.queries], *expanded, part.plan)
            add_part(out[part.queries], sums[part.queries], *before)
        return out.to(query.dtype)

    def _expand(self, latents: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [m, query_heads, key_dim], what is rotated of all of them [m, rope_dim], and values [m, query_heads,
        value_dim] of `latents` [m, width]."""
        shape = self.shape
        latent, rotated = latents.split([shape.latent_dim, shape.rope_dim], dim=1)
        both = functional.linear(latent, up.flatten(0, 1)).view(len(latents), shape.query_heads, -1)
        key, value = both.split([shape.key_dim, shape.value_dim], dim=2)
        return key, rotated, value

    def gather(self, cache: Tensor, places: Tensor) -> Tensor:
        """The latents [m, width] at `places`, in the activations' type."""
        if cache.dtype == self.dtype:
            return cache[places // self.page_size, places % self.page_size]
        numbers = cache.view(torch.uint8)[places // self.page_size, places % self.page_size]
        return numbers.view(cache.dtype).to(self.dtype)


def cut(lengths: np.ndarray, most: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Cuts rows of `lengths` [R] into chunks of at most `most` in all: (first row, begins, ends), what the chunk has of
    each row from the first on."""
    row, begin = 0, 0
    while row < len(lengths):
        if begin == lengths[row]:
            row, begin = row + 1, 0
            continue
        first, room = row, most
        begins, ends = [], []
        while row < len(lengths) and room and lengths[row]:
            end = min(begin + room, int(lengths[row]))
            begins.append(begin)
            ends.append(end)
            room -= end - begin
            begin = end
            if begin == lengths[row]:
                row, begin = row + 1, 0
        yield first, np.array(begins), np.array(ends)


def add_part(out: Tensor, sums: Tensor, more: Tensor, others: Tensor) -> None:
    """Makes `out` [n, heads, dim] float32 and `sums` [n, heads], attention over some keys and the logarithm of the sum
    of exponentials, those over more keys: `more` and `others` are the same of the other keys."""
    total = torch.logaddexp(sums, others)
    out.mul_((sums - total).exp_()[..., None]).add_(more * (others - total).exp_()[..., None])
    sums.copy_(total)
