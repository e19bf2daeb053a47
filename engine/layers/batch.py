"""The inputs of one step, as a model and its attention backend see them, and how host numbers reach a device.

R rows (one request's part of the step each) hold T tokens, laid end to end. Host arrays let a backend plan its work
without asking the device. Left out: media embeddings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.messages.step import STEPS_IN_FLIGHT

NO_STATES: Mapping[str, tuple[Tensor, ...]] = MappingProxyType({})


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
    real: Tensor | None = None  # [1] int64, device: how many of the T tokens are no padding, where some may be

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
    """A device copy of a host array that does not wait for the device: through pinned memory on a GPU."""
    host = torch.from_numpy(numbers)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


class Mirror:
    """Numbers of the host that a CUDA graph reads at one address: fill what `host` gives, then `send` it.

    A copy runs when the device comes to it, so the host's buffers take turns: one for each step that may be in flight.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = torch.zeros(size, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(size, dtype=torch.int64, pin_memory=pinned) for _ in range(STEPS_IN_FLIGHT)]
        self._turn = 0

    def host(self) -> np.ndarray:
        """[size] int64, with what it held some sends ago."""
        self._turn = (self._turn + 1) % STEPS_IN_FLIGHT
        numbers: np.ndarray = self._hosts[self._turn].numpy()
        return numbers

    def send(self) -> None:
        self.device.copy_(self._hosts[self._turn], non_blocking=True)
