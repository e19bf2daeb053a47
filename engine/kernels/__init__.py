"""Kernels of our own, and the one place that chooses among their implementations.

A folder a subject. Its reference.py defines in torch what the subject's operations compute; other files compute the
same faster on some device, and are tested against it. `choose` is called once for a model, where it is built: layers
and the worker then call what they are given, and ask no tensor where it lies.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec

import torch

from engine.errors import ConfigError
from engine.kernels.cpu import calls as cpu
from engine.kernels.delta.reference import DeltaOps
from engine.kernels.dense.reference import Ops
from engine.kernels.experts.reference import MoeOps
from engine.kernels.fp8.reference import Fp8Ops
from engine.kernels.logits.host import HostLogitOps
from engine.kernels.logits.reference import LogitOps


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSet:
    """The operations that one model computes with; by default their definitions, which run anywhere."""

    dense: Ops = field(default_factory=Ops)  # between matrices and attention
    experts: MoeOps = field(default_factory=MoeOps)
    fp8: Fp8Ops = field(default_factory=Fp8Ops)
    logits: LogitOps = field(default_factory=LogitOps)  # from logits to tokens
    delta: DeltaOps = field(default_factory=DeltaOps)  # of layers with a memory in the place of keys and values


def has_triton() -> bool:
    """Whether the package triton is installed."""
    return find_spec("triton") is not None


def choose(device: torch.device, dtype: torch.dtype, *, invariant: bool = False) -> KernelSet:
    """The fastest operations for activations of `dtype` on `device`: C for float32 on a CPU, Triton on a GPU, torch
    elsewhere.

    `invariant` asks for results that do not depend on what else is in a step. Raises ConfigError where there are no
    such kernels, which is everywhere so far."""
    if invariant:
        raise ConfigError(
            f"there are no batch-invariant kernels for {str(dtype).removeprefix('torch.')} on {device.type}: what a "
            "row computes depends in its last bits on the rows beside it; build the model with invariant=False"
        )
    if device.type == "cpu":
        dense = (cpu.kernels() if dtype is torch.float32 else None) or Ops()
        return KernelSet(dense=dense, fp8=Fp8Ops(dense), logits=HostLogitOps())
    if device.type != "cuda" or not has_triton():
        return KernelSet()
    from engine.kernels.delta.triton import TritonDeltaOps
    from engine.kernels.dense.triton import TritonOps
    from engine.kernels.experts.triton import TritonMoeOps
    from engine.kernels.fp8.triton import TritonFp8Ops, multiplies_fp8
    from engine.kernels.logits.triton import TritonLogitOps

    dense = TritonOps()
    return KernelSet(
        dense=dense,
        experts=TritonMoeOps(dense),
        fp8=TritonFp8Ops(dense) if multiplies_fp8(device) else Fp8Ops(dense),
        logits=TritonLogitOps(),
        delta=TritonDeltaOps(),
    )
