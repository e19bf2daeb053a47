"""The faster of two for each part of a step on Hopper: FlashInfer's FA3 for prompts, Triton for rows of one token.

Both read the same pages. FA3 reaches 1.5 times the rate of the Triton kernel in prompts that fill the device; in decode
steps Triton's needs no plan from the host and reads shared prefixes once (bench/kernels/attention.py). Prompts too
small for FA3 are Triton's, and so are captured steps of a thousand tokens. Left out: FP8 caches, which FA3 does not
read.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.plugin import ConfigError
from engine.plugin.layers import Batch, Mirror
from engine_plugins.attention.flashinfer.mha import (
    PLAN_BYTES,
    CapturedLaunch,
    FlashInferAttention,
    Launch,
    leading_ones,
)
from engine_plugins.attention.flashinfer.modules import FA3_TILE, fa3_plan_bytes
from engine_plugins.attention.triton.mha import Plan, TritonAttention

TRITON_TOKENS = 1024  # of a captured step, whose rows may all be short: up to so many it is Triton's


@dataclass(frozen=True, slots=True)
class HybridPlan:
    """The leading rows of one token, if any, and what is launched for all that follow."""

    decode: Plan
    prompts: list[Launch] | CapturedLaunch


class PromptAttention(FlashInferAttention):
    """FlashInfer with FA3 alone."""

    def _choose_kernels(self, hopper: bool) -> list[str]:
        if not hopper or self.kv_dtype != self.dtype:
            raise ConfigError(
                f"attention hybrid is for Hopper GPUs and caches of the activations' type, not {self.kv_dtype} for "
                f"{self.dtype}; say --plugins triton or flashinfer"
            )
        return ["fa3"]

    def capture_prompts(self, batch: Batch) -> CapturedLaunch | None:
        tokens, rows = len(batch.ids), len(batch.slots)
        size = fa3_plan_bytes((-(-tokens // FA3_TILE) + rows) * self.shape.query_heads, self._processors)
        return self._captured_launch(batch, "fa3", tokens, True, size) if size <= PLAN_BYTES else None


class HybridAttention(TritonAttention):
    """Serves what FlashInferAttention does on Hopper, but FP8 caches."""

    def set_up(self) -> None:
        super().set_up()
        self._prompts = PromptAttention(self.shape, self.page_size, self.device, self.dtype, self.kernels)

    def prepare(self, batch: Batch) -> Any:
        ones = leading_ones(batch.lengths)
        if not self._prompts.fills_device(batch.lengths[ones:]):
            return super().prepare(batch)
        prompts = [self._prompts.launch_rows(batch, ones, len(batch.lengths))]
        return HybridPlan(Plan(batch.page_table, self.decode_rows(batch, np.arange(ones)), None), prompts)

    def capture_prompts(self, batch: Batch) -> Any:
        tokens = len(batch.ids)
        large = tokens > TRITON_TOKENS and self._prompts.fills_device(np.array([tokens]))
        prompts = self._prompts.capture_prompts(batch) if large else None
        if prompts is None:
            return super().capture_prompts(batch)
        rows = len(batch.slots) - 1  # the last one is always empty
        numbers = Mirror(2 * rows, self.device)
        decode = self._decode(batch.slots[:-1], *numbers.device.split(rows))
        return HybridPlan(Plan(batch.page_table, decode, None, numbers), prompts)

    def refill_prompts(self, plan: Any, starts: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> None:
        if not isinstance(plan, HybridPlan):
            return super().refill_prompts(plan, starts, lengths, offsets)
        assert isinstance(plan.prompts, CapturedLaunch) and plan.decode.numbers is not None
        ones = leading_ones(lengths)
        positions, tokens = plan.decode.numbers.host().reshape(2, -1)
        positions[:ones], positions[ones:], tokens[:ones] = starts[:ones], -1, offsets[:ones]
        plan.decode.numbers.send()
        offsets = np.maximum(offsets, ones)  # to FA3 the leading rows are empty
        self._prompts.refill_prompts(plan.prompts, starts, np.diff(offsets), offsets)

    def attend(self, query: Tensor, cache: Tensor, plan: Any) -> Tensor:
        if not isinstance(plan, HybridPlan):
            return super().attend(query, cache, plan)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        self._prompts.attend_into(out, query, cache, plan.prompts)
        self.attend_into(out, query, cache, plan.decode)
        return out.view(len(out), -1)
