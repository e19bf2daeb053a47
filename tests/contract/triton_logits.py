"""Triton's kernels on logits against their definitions in torch: on a GPU (tests/gpu/test_logits_kernels.py), or
interpreted on a CPU (test_triton_logits.py, which runs this in a process of its own)."""

import numpy as np
import pytest
import torch

from engine.kernels.bitmask import apply_bitmask_reference, mask_words, pack_ids
from engine.kernels.triton_bitmask import apply_bitmask

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [32000, 151936, 128256] if GPU else [70, 4100])
def test_bitmasks_leave_what_has_a_bit(size: int, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(size)
    allowed = [np.flatnonzero(generator.random(size) < share) for share in (0.5, 0.001, 1.0, 0.0)]
    mask = torch.from_numpy(np.stack([pack_ids(ids, size) for ids in allowed])).to(DEVICE)
    assert mask.shape == (4, mask_words(size))
    rows = torch.tensor([5, 0, 3, 2], device=DEVICE)
    logits = random(6, size + 3, dtype=dtype)[:, :size]  # of rows that do not follow each other
    for lines in (None, torch.tensor([3, 2, 0, 0], device=DEVICE)):
        got, wanted = logits.clone(), logits.clone()
        apply_bitmask(got, mask, rows, lines)
        apply_bitmask_reference(wanted, mask, rows, lines)
        assert torch.equal(got, wanted)
        for i, row in enumerate(rows.tolist()):
            ids = allowed[i if lines is None else int(lines[i])]
            assert np.array_equal(np.flatnonzero(~got[row].isneginf().cpu().numpy()), ids)
        assert torch.equal(got[[1, 4]], logits[[1, 4]])
