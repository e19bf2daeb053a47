"""The inputs of one step, as a model and its attention backend see them.

R rows (one request's part of the step each) hold T tokens, laid end to end; S of the rows are sampled.
Host arrays let a backend plan its work without asking the device. Left out: media embeddings, spans of
speculated tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step. Row r computes the positions starts[r] .. starts[r]+lengths[r]-1 of its request."""

    ids: Tensor  # [T] int64, device
    positions: Tensor  # [T] int64, device
    places: Tensor  # [T] int64, device: page * page_size + offset, where each token's K/V is written
    page_table: Tensor  # [R, P] int64, device: pages of each row; entries past its own are pages, but not its
    sampled: Tensor  # [S] int64, device: which of the T tokens are sampled from, in row order
    starts: np.ndarray  # [R] int64, host: tokens of the request that are in the cache already
    lengths: np.ndarray  # [R] int64, host: tokens computed in this step, at least 1
    offsets: np.ndarray  # [R + 1] int64, host: row r's tokens are offsets[r] .. offsets[r+1]-1 of the T
    caches: tuple[tuple[Tensor, ...], ...]  # per KV group, per layer: [pages, *page shape]
    plans: tuple[Any, ...] = ()  # per KV group: what its attention backend's `prepare` returned
