"""How numbers of the host reach a device: in copies that CUDA takes along with the call, or in one over the bus."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.layers import batch


@pytest.mark.parametrize("count", [0, 1, 4, 5, 15, 16, 17, 40])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_few_numbers_go_in_parts_that_are_taken_at_once(
    monkeypatch: pytest.MonkeyPatch, count: int, dtype: type[np.generic]
) -> None:
    copied: list[tuple[int, bool]] = []
    copy, pinned = Tensor.copy_, set[int]()

    def pin(tensor: Tensor) -> Tensor:
        other = tensor.clone()
        pinned.add(other.data_ptr())
        return other

    def spied(there: Tensor, host: Tensor, **how: Any) -> Tensor:
        assert how == {"non_blocking": True}
        copied.append((host.nbytes, host.data_ptr() in pinned))
        return copy(there, host)

    monkeypatch.setattr(batch, "AT_ONCE", 32)
    monkeypatch.setattr(batch, "MOST_PARTS", 4)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "copy_", spied)
    numbers = np.arange(2 * count, dtype=dtype).reshape(count, 2)
    there = torch.zeros(count, 2, dtype=torch.from_numpy(numbers).dtype)
    batch.fill(there, torch.from_numpy(numbers))
    assert np.array_equal(there.numpy(), numbers)
    assert sum(size for size, _ in copied) == numbers.nbytes
    if numbers.nbytes > 4 * 32:
        assert copied == [(numbers.nbytes, True)]
    else:
        assert all(size <= 32 and not pinned for size, pinned in copied)
