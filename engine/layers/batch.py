"""The inputs of one step, as a model and its attention backend see them, and how host numbers reach a device.

R rows (one request's part of the step each) hold T tokens, laid end to end. Host arrays let a backend plan its work
without asking the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

AT_ONCE = 1 << 16  # bytes of a copy that CUDA takes along with the call
MOST_PARTS = 16  # such copies for one array

NO_STATES: Mapping[str, tuple[Tensor, ...]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Spread:
    """How many tokens of a step each copy of attention has, where there are several, and how they lie together.

        gathered   a b . │ c d e        from each copy as many as the one with `most` has: [copies * most]
        together   a b c d e            what layers get that all copies share: first all tokens, then padding, [N]

    `order` says where the tokens together lie in what is gathered, `back` the reverse; where padding lies says nothing.
    Both are None where the two are the same."""

    counts: tuple[int, ...]  # host: tokens of each copy, 0 of one that is idle; none in a captured step
    most: int
    order: Tensor | None = None  # [N] int64, device
    back: Tensor | None = None  # [copies * most] int64, device
    real: Tensor | None = None  # [copies] int64, device: tokens of each copy that are no padding, in a captured step

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device) -> "Spread":
        """Of a step that the host knows; together it has no padding."""
        most, total = max(counts), sum(counts)
        if min(counts) == most:
            return cls(tuple(counts), most)
        return cls(tuple(counts), most, *_orders(upload(np.array(counts, np.int64), device), most, total))

    @classmethod
    def captured(cls, counts: Tensor, most: int) -> "Spread":
        """Of a captured step, whose copies have `most` tokens each, of which `counts` [copies] on the device are no
        padding."""
        return cls((), most, *_orders(counts, most, len(counts) * most), counts)


def _orders(counts: Tensor, most: int, size: int) -> tuple[Tensor, Tensor]:
    """`order` and `back` of a Spread of `size` tokens together."""
    copies, device = len(counts), counts.device
    ends = counts.cumsum(0)
    firsts = ends - counts
    places = torch.arange(size, device=device)
    copy = torch.searchsorted(ends, places, right=True).clamp_(max=copies - 1)
    order = (copy * most + places - firsts[copy]).clamp_(max=copies * most - 1)
    back = (firsts[:, None] + torch.arange(most, device=device)).clamp_(max=size - 1)
    return order, back.flatten()


@dataclass(frozen=True, slots=True)
class Media:
    """What media say to a step: the embeddings of M of its tokens, which take the place of those of their ids.

    Those of `levels` are added to the stream behind the first layers, one behind each (DeepStack, arXiv:2406.04334)."""

    places: Tensor  # [M] int64, device: which of the T tokens
    embeddings: Tensor  # [M, H]
    levels: tuple[Tensor, ...] = ()  # [M, H] each

    def into(self, hidden: Tensor) -> Tensor:
        """`hidden` [T, H] with the embeddings in their places; it is written over."""
        return hidden.index_copy_(0, self.places, self.embeddings.to(hidden.dtype))

    def behind(self, layer: int, stream: Tensor) -> None:
        """Adds to `stream` [T, H] what is said behind that layer."""
        if layer < len(self.levels):
            stream.index_add_(0, self.places, self.levels[layer].to(stream.dtype))


@dataclass(frozen=True, slots=True)
class CapturedMedia:
    """As Media, in a captured step: there is a line for each of the T tokens, and `shown` says which lines count."""

    shown: Tensor  # [T, 1] bool, device
    embeddings: Tensor  # [T, H]
    levels: tuple[Tensor, ...] = ()  # [T, H] each

    def into(self, hidden: Tensor) -> Tensor:
        return torch.where(self.shown, self.embeddings, hidden)

    def behind(self, layer: int, stream: Tensor) -> None:
        if layer < len(self.levels):
            stream.add_(torch.where(self.shown, self.levels[layer], 0))


@dataclass(frozen=True, slots=True)
class WholeSpan:
    """Tokens of a step that see each other as well as all before them: `count` of the T, from `first` on, which are the
    positions `position` and on of the slot `slot`. The span they are the rest of ends with them."""

    first: int
    count: int
    position: int
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step. Row r computes the positions starts[r] .. starts[r]+lengths[r]-1 of its request."""

    ids: Tensor  # [T] int64, device
    positions: Tensor  # [T] int64, device
    places: Tensor  # [T] int64, device: page * page_size + offset, where each token's K/V is written
    page_table: Tensor  # [slots, P] int32, device: pages of every slot; entries past its own are pages, but not its
    slots: Tensor  # [R] int64, device: the rows' lines in `page_table`
    row_starts: Tensor  # [R] int64, device: tokens of the request that are in the cache already
    row_offsets: Tensor  # [R + 1] int64, device: as `offsets`
    starts: np.ndarray  # [R] int64, host: as row_starts; of a row of drafts on a GPU the least it may be
    lengths: np.ndarray  # [R] int64, host: tokens computed in this step, at least 1
    offsets: np.ndarray  # [R + 1] int64, host: row r's tokens are offsets[r] .. offsets[r+1]-1 of the T
    caches: tuple[tuple[Tensor, ...], ...]  # per KV group, per layer: [pages, *page shape]
    # by the name of a state group, per layer: [slots + 1, *shape]; a row reads and writes its slot's line
    states: Mapping[str, tuple[Tensor, ...]] = field(default_factory=lambda: NO_STATES)
    plans: tuple[Any, ...] = ()  # per KV group: what its attention backend's `prepare` returned
    # [1] int64, device: how many of the T tokens are no padding, where some may be; with `spread` of those together
    real: Tensor | None = None
    # [T], or [3, T] for time, height and width, int64, device: where rotary embedding places the tokens, if not at
    # their positions
    turns: Tensor | None = None
    media: Media | CapturedMedia | None = None
    whole: tuple[WholeSpan, ...] = ()  # of steps that are not captured
    spread: Spread | None = None  # where attention runs in copies: this one's tokens are the T

    def pages(self, page_size: int) -> Tensor:
        """[R, P] int64: the pages of each row, as many as the longest has; a line's further ones are not its own."""
        count = -(-int((self.starts + self.lengths).max()) // page_size)
        return self.page_table[self.slots, :count].to(torch.int64)

    @property
    def begins(self) -> Tensor:
        """[R] bool, device: which rows compute the first token of their request. Their states are zeros."""
        return self.row_starts == 0

    def token_rows(self) -> Tensor:
        """[T] int64, device: the row of each token. Padding of a captured step is of rows of the scratch slot."""
        numbers = torch.arange(len(self.ids), device=self.ids.device)
        return (torch.searchsorted(self.row_offsets, numbers, right=True) - 1).clamp_(max=len(self.slots) - 1)


def upload(numbers: np.ndarray, device: torch.device) -> Tensor:
    """A device copy of a host array, which does not wait for the device; nor, up to 1 MiB, for what else is copied."""
    host = torch.from_numpy(numbers)
    if device.type == "cpu":
        return host
    there = torch.empty(host.shape, dtype=host.dtype, device=device)
    fill(there, host)
    return there


def fill(there: Tensor, host: Tensor) -> None:
    """Copy `host` into `there`, which is contiguous and as large, once the device comes to it. On return `host` may
    change.

    CUDA takes up to 64 KiB of memory that is not pinned along with the call. A copy from pinned memory is the bus's:
    beside pages of a KV cache on their way up, each one of 16 KiB or more took an H200 1 to 8 ms. Much goes that way
    nevertheless, as it costs the host least."""
    if (count := -(-host.nbytes // AT_ONCE)) <= 1:
        there.copy_(host, non_blocking=True)
    elif count > MOST_PARTS:
        there.copy_(host.pin_memory(), non_blocking=True)
    else:
        each = AT_ONCE // host.element_size()
        for to, part in zip(there.view(-1).split(each), host.reshape(-1).split(each), strict=True):
            to.copy_(part, non_blocking=True)


class Mirror:
    """Numbers of the host that a CUDA graph reads at one address: fill what `host` gives, then `send` it."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = torch.zeros(size, dtype=torch.int64, device=device)
        self._host = torch.zeros(size, dtype=torch.int64)

    def host(self) -> np.ndarray:
        """[size] int64, with what was sent last."""
        numbers: np.ndarray = self._host.numpy()
        return numbers

    def send(self) -> None:
        fill(self.device, self._host)
