"""Programmatic dependent launch: a kernel's programs are on the device before the kernel in front of it is over.

    kernel n     |-- waits --|------ works ------|
    kernel n+1         | starts, reads what does not depend on n |-- waits --|------ works ------|

Between two dependent kernels a device stands still for a microsecond or more, which is what a decode step of a small
model is made of. A kernel launched with `launch_dependents` may begin while the one before runs; it says itself where
it needs that one's results (`wait_for_previous`), and may touch nothing that depends on it before. Whoever waits, waits
for all that came before, so every kernel of a chain must wait, also one that finds nothing to do. See "Programmatic
Dependent Launch" in NVIDIA's CUDA C++ Programming Guide. From compute capability 9.0 on.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@functools.cache
def _dependent(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch_dependents(tensor: Tensor) -> dict[str, Any]:
    """The keywords of such a launch, for kernels with a constant DEPENDS, on the device of `tensor`."""
    depends = tensor.is_cuda and _dependent(tensor.get_device())
    return {"DEPENDS": depends, "launch_pdl": True} if depends else {"DEPENDS": False}


@triton.jit
def wait_for_previous(DEPENDS: tl.constexpr):
    """Lets the next kernel's programs start, and waits until all kernels before this one are over."""
    if DEPENDS:
        gdc_launch_dependents()
        gdc_wait()
