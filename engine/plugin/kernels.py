"""Kernels, for plugins: what engine.kernels offers to models, attention backends and quantization schemes."""

from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.kernels import KernelSet
from engine.kernels.cpu.calls import MOST_QUERIES, Kernels, attention_tasks
from engine.kernels.dense.reference import HeadNorms, Heads, Ops, Rotation
from engine.kernels.fp8.reference import (
    BLOCK,
    E4M3,
    Fp8Weight,
    dequantize,
    quantize_blocks,
    quantize_rows,
)

if TYPE_CHECKING:
    from engine.kernels.attention.decode import DecodeRows, Scratch, SharedRows
    from engine.kernels.attention.expanded import ExpandedRows
    from engine.kernels.attention.extend import ExtendRows
    from engine.kernels.attention.mla import MlaDecodeRows, MlaExtendRows, MlaScratch

__all__ = [
    "BLOCK",
    "E4M3",
    "MOST_QUERIES",
    "DecodeRows",
    "ExpandedRows",
    "ExtendRows",
    "Fp8Weight",
    "HeadNorms",
    "Heads",
    "KernelSet",
    "Kernels",
    "MlaDecodeRows",
    "MlaExtendRows",
    "MlaScratch",
    "Ops",
    "Rotation",
    "Scratch",
    "SharedRows",
    "attention_tasks",
    "dequantize",
    "page_lists",
    "quantize_blocks",
    "quantize_rows",
    "triton_attention",
    "triton_decode",
    "triton_expanded",
    "triton_mla",
]


def triton_attention() -> ModuleType:
    """The module engine.kernels.attention.extend. Raises ConfigError where Triton is not installed."""
    if find_spec("triton") is None:
        raise ConfigError("attention triton needs the package triton: pip install triton")
    from engine.kernels.attention import extend as triton_attention

    return triton_attention


def triton_decode() -> ModuleType:
    """The module engine.kernels.attention.decode. Raises ConfigError where Triton is not installed."""
    triton_attention()
    from engine.kernels.attention import decode as triton_decode

    return triton_decode


def page_lists() -> ModuleType:
    """The module engine.kernels.attention.page_lists. Raises ConfigError where Triton is not installed."""
    if find_spec("triton") is None:
        raise ConfigError("lists of pages are made by the package triton: pip install triton")
    from engine.kernels.attention import page_lists

    return page_lists


def triton_mla() -> ModuleType:
    """The module engine.kernels.attention.mla. Raises ConfigError where Triton is not installed."""
    triton_attention()
    from engine.kernels.attention import mla as triton_mla

    return triton_mla


def triton_expanded() -> ModuleType:
    """The module engine.kernels.attention.expanded. Raises ConfigError where Triton is not installed."""
    triton_attention()
    from engine.kernels.attention import expanded as triton_expanded

    return triton_expanded
