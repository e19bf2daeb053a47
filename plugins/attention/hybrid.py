"""The faster of two for each part of a step on Hopper: FlashInfer's FA3 for prompts, Triton for rows of one token.

Both read the same pages. FA3 reaches 1.5 times the rate of the Triton kernel in prompts that fill the device; in decode
steps Triton's needs no plan from the host and reads shared prefixes once (bench/kernels_attention.py). Captured steps
are Triton's, so are prompts too small for FA3. Left out: FP8 caches, which FA3 does not read.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.plugin import ConfigError
from engine.plugin.layers import AttentionShape, Batch
from engine_plugins.attention.flashinfer import FlashInferAttention, Launch, leading_ones
from engine_plugins.attention.triton import Plan, TritonAttention


@dataclass(frozen=True, slots=True)
class HybridPlan:
    """The leading rows of one token, if any, and a launch for all that follow."""

    decode: Plan
    prompts: Launch


class PromptAttention(FlashInferAttention):
    """FlashInfer with FA3 alone."""

    def _choose_kernels(self, hopper: bool) -> list[str]:
        if not hopper or self.kv_dtype != self.dtype:
            raise ConfigError(
                f"attention hybrid is for Hopper GPUs and caches of the activations' type, not {self.kv_dtype} for "
                f"{self.dtype}; say --plugins triton or flashinfer"
            )
        return ["fa3"]


class HybridAttention(TritonAttention):
    """Serves what FlashInferAttention does on Hopper, but FP8 caches."""

    def __init__(self, shape: AttentionShape, page_size: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(shape, page_size, device, dtype)
        self._prompts = PromptAttention(shape, page_size, device, dtype)

    def prepare(self, batch: Batch) -> Any:
        decode = leading_ones(batch.lengths)
        if not self._prompts.fills_device(batch.lengths[decode:]):
            return super().prepare(batch)
        prompts = self._prompts.launch_rows(batch, decode, len(batch.lengths))
        return HybridPlan(Plan(batch.page_table, self.decode_rows(batch, np.arange(decode)), None), prompts)

    def attend(self, query: Tensor, cache: Tensor, plan: Any) -> Tensor:
        if not isinstance(plan, HybridPlan):
            return super().attend(query, cache, plan)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        self._prompts.attend_into(out, query, cache, [plan.prompts])
        self.attend_into(out, query, cache, plan.decode)
        return out.view(len(out), -1)
