"""Kernels of our own, each with its torch reference beside it (ops.py). `ops_for` chooses."""

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from engine.kernels.cpu import calls as cpu
from engine.kernels.dense.reference import Ops

_REFERENCE = Ops()


def ops_for(tensor: Tensor) -> Ops:
    """The operations that work best on what `tensor` is: float32 on a CPU in C, a GPU's in Triton, else torch."""
    if tensor.is_cpu:
        return (cpu.kernels() or _REFERENCE) if tensor.dtype is torch.float32 else _REFERENCE
    return gpu_ops() if tensor.is_cuda else _REFERENCE


@functools.cache
def gpu_ops() -> Ops:
    """Triton's, where it is installed."""
    if find_spec("triton") is None:
        return _REFERENCE
    from engine.kernels.dense.triton import TritonOps

    return TritonOps()
