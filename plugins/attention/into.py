"""Paged attention whose kernels write where they are told, so that two backends can compute one step (hybrid.py)."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from engine.plugin.layers import PagedAttention


class AttentionInto(PagedAttention):
    """A subclass says how `attend_into` writes."""

    @abstractmethod
    def attend_into(self, out: Tensor, query: Tensor, cache: Tensor, plan: Any) -> None:
        """As `attend`, for the tokens of `plan`: `out` is as `query`, and other tokens stay as they are."""

    def attend(self, query: Tensor, cache: Tensor, plan: Any) -> Tensor:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        self.attend_into(out, query, cache, plan)
        return out.view(len(out), -1)
