"""Masks over logits, as engine/kernels/mask.py defines them, bit by bit."""

import pytest
import torch

from engine.kernels.mask import apply_masks


@pytest.mark.parametrize("size", [1, 31, 32, 33, 257])
@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 2, 0], [0, 1, 2]])
def test_a_bit_bars_or_lets_through(size: int, rows: list[int]) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(3, size, generator=generator)
    masks = torch.randint(-(2**31), 2**31, (len(rows), -(-size // 32)), generator=generator).to(torch.int32)
    wanted = logits.clone()
    for line, row in enumerate(rows):
        for token in range(size):
            if not int(masks[line, token // 32]) >> (token % 32) & 1:
                wanted[row, token] = -torch.inf
    apply_masks(logits, masks, torch.tensor(rows))
    assert torch.equal(logits, wanted)
