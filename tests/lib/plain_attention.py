"""Attention by its definition, whose steps can be captured, and a stand-in for a graph: it computes anew from what the
replay put in place."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.layers.attention import PagedAttention
from engine.layers.batch import Batch


class PlainAttention(PagedAttention):
    """By the definition, row by row. A plan is a dict with the rows: what a captured one is brought up to date with."""

    def prepare(self, batch: Batch) -> dict[str, Any]:
        plan = {"table": batch.page_table, "slots": batch.slots}
        return plan | {"starts": batch.starts, "lengths": batch.lengths, "offsets": batch.offsets}

    def capture(self, batch: Batch) -> dict[str, Any]:
        return {"table": batch.page_table, "slots": batch.slots}

    capture_prompts = capture

    def refill(self, plan: dict[str, Any], slots: np.ndarray, starts: np.ndarray) -> None:
        assert plan["slots"].tolist() == slots.tolist()
        self.refill_prompts(plan, starts, np.ones_like(starts), np.arange(len(starts) + 1))

    def capture_shared(self, batch: Batch) -> dict[str, Any]:
        return self.capture(batch) | {"prefixes": None}

    def refill_shared(self, plan: dict[str, Any], slots: np.ndarray, starts: np.ndarray, prefixes: Any) -> None:
        plan["prefixes"] = prefixes
        self.refill(plan, slots, starts)

    def refill_prompts(
        self, plan: dict[str, Any], starts: np.ndarray, lengths: np.ndarray, offsets: np.ndarray
    ) -> None:
        plan.update(starts=starts.copy(), lengths=lengths.copy(), offsets=offsets.copy())

    def attend(self, query: Tensor, cache: Tensor, plan: dict[str, Any]) -> Tensor:
        out = torch.full_like(query, torch.nan)  # of what belongs to no row
        for row, (start, length) in enumerate(zip(plan["starts"], plan["lengths"], strict=True)):
            first, end = int(plan["offsets"][row]), int(start + length)
            pages = plan["table"][plan["slots"][row]].long()
            each = self.shape.query_heads // self.shape.kv_heads
            key, value = cache[pages].transpose(0, 1).flatten(1, 2)[:, :end].repeat_interleave(each, dim=2)
            scores = torch.einsum("qhd,khd->hqk", query[first : first + length], key) * self.shape.scale
            unseen = torch.ones(length, end, dtype=torch.bool).triu(int(start) + 1)
            weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
            out[first : first + length] = torch.einsum("hqk,khd->qhd", weights, value)
        return out.flatten(1)


def captured(run: Callable[[], Tensor], pool: Any) -> tuple[Any, Tensor]:
    out = run()
    return SimpleNamespace(replay=lambda: out.copy_(run())), out
