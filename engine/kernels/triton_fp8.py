"""Activations become E4M3 with a scale for each 128 numbers of a token, in Triton: what fp8.py defines.

Left out: scales of whole tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.fp8 import BLOCK, E4M3, LARGEST, blocks


@triton.jit(do_not_specialize=["tokens"])
def quantize_kernel(
    inputs, numbers, scales, tokens, input_stride, SIZE: tl.constexpr, GATED: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """TOGETHER blocks of one token. GATED: `inputs` are gate and up, and silu(gate) * up becomes FP8."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < SIZE
    x = tl.load(inputs + token * input_stride + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(inputs + token * input_stride + SIZE + at, mask=inside, other=0.0).to(tl.float32)
        x = x / (1.0 + tl.exp(-x)) * up
    scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-12) / LARGEST
    x = tl.minimum(tl.maximum(x / scale[:, None], -LARGEST), LARGEST)
    tl.store(numbers + token * SIZE + at, x.to(numbers.dtype.element_ty), mask=inside)
    tl.store(scales + block.to(tl.int64) * tokens + token, scale, mask=block * BLOCK < SIZE)


def quantize_tokens(inputs: Tensor, gated: bool = False) -> tuple[Tensor, Tensor]:
    """As `fp8.quantize_tokens`, of `inputs` [T, K], or of silu(gate) * up of [T, 2 * K]."""
    tokens, size = inputs.shape
    size = size // 2 if gated else size
    if inputs.stride(1) != 1:
        inputs = inputs.contiguous()
    numbers = torch.empty(tokens, size, dtype=E4M3, device=inputs.device)
    scales = torch.empty(blocks(size), tokens, dtype=torch.float32, device=inputs.device)
    if tokens:
        together = min(8, triton.next_power_of_2(blocks(size)))
        quantize_kernel[(tokens, triton.cdiv(blocks(size), together))](
            inputs, numbers, scales, tokens, inputs.stride(0), SIZE=size, GATED=gated, LARGEST=LARGEST, BLOCK=BLOCK,
            TOGETHER=together, num_warps=4,
        )  # fmt: skip
    return numbers, scales.t()
