"""E4M3 numbers with scales, in torch: the definition of how weights and activations become them, and back.

A weight [rows, columns] has a float32 scale for each block of 128 x 128, [row blocks, column blocks] (the scheme of
DeepSeek-V3, arXiv:2412.19437), or one for each row, [rows]; what it stands for is number times scale. Weights may come
stacked, with more dimensions before these. Activations [T, K] have a scale for each 128 numbers of a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels.dense.reference import Ops

BLOCK = 128
LARGEST = 448.0  # of E4M3
E4M3 = torch.float8_e4m3fn


def blocks(size: int) -> int:
    """How many blocks that many rows or columns take."""
    return -(-size // BLOCK)


def _scaled(values: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """`values` over scales at which `largest` is the largest E4M3 number; and these scales."""
    scale = largest.to(torch.float32).clamp(min=1e-12) / LARGEST
    return (values.to(torch.float32) / scale).clamp(-LARGEST, LARGEST), scale


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [rows, columns] as E4M3 and its scales [row blocks, column blocks]."""
    rows, columns = weight.shape
    padded = torch.zeros(blocks(rows) * BLOCK, blocks(columns) * BLOCK, dtype=weight.dtype, device=weight.device)
    padded[:rows, :columns] = weight
    tiles = padded.view(blocks(rows), BLOCK, blocks(columns), BLOCK)
    numbers, scale = _scaled(tiles, tiles.abs().amax((1, 3), keepdim=True))
    return numbers.view(padded.shape)[:rows, :columns].to(E4M3), scale[:, 0, :, 0]


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [rows, columns] as E4M3 and its scales [rows]."""
    numbers, scale = _scaled(weight, weight.abs().amax(-1, keepdim=True))
    return numbers.to(E4M3), scale[:, 0]


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `weight` with scales of blocks or of rows stands for."""
    if scale.shape == weight.shape[:-1]:
        return (weight.to(torch.float32) * scale[..., None]).to(dtype)
    rows, columns = weight.shape[-2:]
    each = scale.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
    return (weight.to(torch.float32) * each).to(dtype)


def quantize_tokens(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """`inputs` [T, K] as E4M3 and its scales [T, blocks of K], of which those of one block lie together."""
    tokens, size = inputs.shape
    padded = torch.zeros(tokens, blocks(size) * BLOCK, dtype=inputs.dtype, device=inputs.device)
    padded[:, :size] = inputs
    parts = padded.view(tokens, -1, BLOCK)
    numbers, scale = _scaled(parts, parts.abs().amax(-1, keepdim=True))
    return numbers.view(tokens, -1)[:, :size].to(E4M3), scale[:, :, 0].t().contiguous().t()


def dequantize_tokens(numbers: Tensor, scale: Tensor) -> Tensor:
    """What `numbers` [T, K] with `scale` [T, blocks of K] stand for, in float32."""
    return numbers.to(torch.float32) * scale.repeat_interleave(BLOCK, -1)[:, : numbers.shape[1]]


def quantize_lines(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """`inputs` [T, K] as E4M3 with one scale for each token, [T, 1]."""
    numbers, scale = _scaled(inputs, inputs.abs().amax(-1, keepdim=True))
    return numbers.to(E4M3), scale


# ── a layer's product ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """E4M3 `numbers` [rows, columns] and their `scale`, of blocks or of rows. `padded_scale` is that of blocks with
    columns up to a multiple of 4, where a library is to multiply."""

    numbers: Tensor
    scale: Tensor
    padded_scale: Tensor | None = None

    @property
    def rowwise(self) -> bool:
        return self.scale.dim() == 1


class Fp8Ops:
    """What can be done with such a weight, in torch. `dense` activates what is gated.

    `pays` says whether a product is faster by FP8 weights than by what they stand for: if not, a model had better keep
    that."""

    pays = False

    def __init__(self, dense: Ops | None = None) -> None:
        self.dense = dense or Ops()

    def weight(self, numbers: Tensor, scale: Tensor) -> Fp8Weight:
        """The weight as `linear` takes it."""
        return Fp8Weight(numbers, scale)

    def linear(self, inputs: Tensor, weight: Fp8Weight, bias: Tensor | None, gated: bool = False) -> Tensor:
        """y = x Wᵀ + b: `inputs` [T, K] to [T, N] of their type, by what the weight stands for. With `gated`, inputs
        are [T, 2 * K], a gate and an up, and x is silu(gate) * up.

        An implementation may make FP8 of activations, with a scale for each token or each 128 of its numbers.
        """
        if gated:
            inputs = self.dense.silu_and_mul(inputs)
        dense = dequantize(weight.numbers, weight.scale)
        product = functional.linear(inputs.to(torch.float32), dense, None if bias is None else bias.to(torch.float32))
        return product.to(inputs.dtype)
