"""What a sum over ranks with a norm behind it is, in torch: the definition that exchange.py is tested against.

Every rank adds the parts in the order of the ranks, in float32, and rounds once. So all ranks have the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.dense.reference import Ops


def sum_parts(parts: Sequence[Tensor]) -> Tensor:
    """The sum of the ranks' `parts`, in the order of the ranks, in their type."""
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part.to(torch.float32)
    return total.to(parts[0].dtype)


def sum_add_norm(
    parts: Sequence[Tensor], stream: Tensor, weight: Tensor, epsilon: float, ops: Ops | None = None
) -> tuple[Tensor, Tensor]:
    """(rms_norm of the new stream, the new stream): `stream` [T, size] plus the sum of the ranks' `parts`."""
    return (ops or Ops()).add_rms_norm(sum_parts(parts), stream.clone(), weight, epsilon)
