"""Bit masks in numpy and torch; Triton's are held against these in tests/contract."""

import numpy as np
import pytest
import torch

from engine.kernels.logits.host import HostLogitOps
from engine.kernels.logits.reference import LogitOps, mask_words, pack_ids

apply_bitmask = HostLogitOps().apply_bitmask


def test_the_bits_are_those_of_little_endian_words():
    assert pack_ids(np.array([0, 5, 31]), 33).tolist() == [1 + 32 - 2**31, 0]
    assert pack_ids(np.array([32]), 33).tolist() == [0, 1]
    assert mask_words(64) == 2 and mask_words(65) == 3


def test_only_entries_with_a_bit_are_left_and_other_rows_stay():
    logits = torch.arange(120.0).view(3, 40)
    before = logits.clone()
    mask = torch.from_numpy(np.stack([pack_ids(np.array([1, 33, 39]), 40), pack_ids(np.array([], int), 40)]))
    apply_bitmask(logits, mask, torch.tensor([2, 0]))
    assert (~logits[2].isneginf()).nonzero()[:, 0].tolist() == [1, 33, 39]
    assert logits[0].isneginf().all() and torch.equal(logits[1], before[1])
    assert torch.equal(logits[2, [1, 33, 39]], before[2, [1, 33, 39]])
    apply_bitmask(before, mask, torch.tensor([1, 2]), torch.tensor([1, 0]))
    assert before[1].isneginf().all() and torch.equal(before[2], logits[2])
    apply_bitmask(before, mask, torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("size", [1, 31, 32, 33, 257])
@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 2, 0], [0, 1, 2]])
def test_a_bit_bars_or_lets_through(size: int, rows: list[int]) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(3, size, generator=generator)
    masks = torch.randint(-(2**31), 2**31, (len(rows), mask_words(size)), generator=generator).to(torch.int32)
    wanted = logits.clone()
    for line, row in enumerate(rows):
        for token in range(size):
            if not int(masks[line, token // 32]) >> (token % 32) & 1:
                wanted[row, token] = -torch.inf
    for apply in (apply_bitmask, LogitOps().apply_bitmask):
        got = logits.clone()
        apply(got, masks, torch.tensor(rows))
        assert torch.equal(got, wanted)
