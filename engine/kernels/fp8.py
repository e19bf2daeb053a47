"""E4M3 numbers with scales, in torch: the definition of how weights and activations become them, and back.

A weight [rows, columns] has a float32 scale for each block of 128 x 128, [row blocks, column blocks] (the scheme of
DeepSeek-V3, arXiv:2412.19437), or one for each row, [rows]; what it stands for is number times scale. Weights may come
stacked, with more dimensions before these. Activations [T, K] have a scale for each 128 numbers of a token.
"""

import torch
from torch import Tensor

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
