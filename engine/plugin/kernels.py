"""Kernels, for plugins: what engine.kernels offers to models, attention backends and quantization schemes.

A layer computes with its build's `KernelSet`; what is chosen there needs no plugin's help. The rest is for backends of
attention. What is in Triton is imported when it is first asked for, as `kernels.attend_decode` of this module: then
there is a ConfigError where Triton is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from engine.kernels import KernelSet, has_triton
from engine.kernels.cpu.calls import MOST_QUERIES, Kernels, attention_tasks
from engine.kernels.dense.reference import HeadNorms, Heads, Ops, Rotation
from engine.kernels.fp8.reference import BLOCK, E4M3, Fp8Weight, dequantize, quantize_blocks, quantize_rows

if TYPE_CHECKING:
    from engine.kernels.attention.decode import (
        DecodeRows,
        SharedRows,
        attend_decode,
        decode_teams,
        list_shared,
        plan_decode,
    )
    from engine.kernels.attention.expanded import (
        ExpandedRows,
        attend_expanded,
        expanded_cut,
        join_keys,
        list_expanded,
    )
    from engine.kernels.attention.extend import (
        ExtendRows,
        attend_extend,
        extend_blocks,
        extend_scratch,
        extend_teams,
        list_extend_tasks,
        most_extend_tasks,
    )
    from engine.kernels.attention.mla import (
        MlaDecodeRows,
        MlaExtendRows,
        MlaScratch,
        MlaShape,
        attend_mla_decode,
        attend_mla_extend,
        list_mla_blocks,
        mla_decode_teams,
        mla_extend_cut,
    )
    from engine.kernels.attention.page_lists import list_pages
    from engine.kernels.attention.paged import PagedShape, interpreted
    from engine.kernels.attention.pieces import Scratch

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
    "MlaShape",
    "Ops",
    "PagedShape",
    "Rotation",
    "Scratch",
    "SharedRows",
    "attend_decode",
    "attend_expanded",
    "attend_extend",
    "attend_mla_decode",
    "attend_mla_extend",
    "attention_tasks",
    "decode_teams",
    "dequantize",
    "expanded_cut",
    "extend_blocks",
    "extend_scratch",
    "extend_teams",
    "interpreted",
    "join_keys",
    "list_expanded",
    "list_extend_tasks",
    "list_mla_blocks",
    "list_pages",
    "list_shared",
    "mla_decode_teams",
    "mla_extend_cut",
    "most_extend_tasks",
    "plan_decode",
    "quantize_blocks",
    "quantize_rows",
]

_IN_TRITON = {  # modules of engine.kernels.attention
    "decode": ("DecodeRows", "SharedRows", "attend_decode", "decode_teams", "list_shared", "plan_decode"),
    "expanded": ("ExpandedRows", "attend_expanded", "expanded_cut", "join_keys", "list_expanded"),
    "extend": (
        *("ExtendRows", "attend_extend", "extend_blocks", "extend_scratch", "extend_teams", "list_extend_tasks"),
        "most_extend_tasks",
    ),
    "mla": (
        *("MlaDecodeRows", "MlaExtendRows", "MlaScratch", "MlaShape", "attend_mla_decode", "attend_mla_extend"),
        *("list_mla_blocks", "mla_decode_teams", "mla_extend_cut"),
    ),
    "page_lists": ("list_pages",),
    "paged": ("PagedShape", "interpreted"),
    "pieces": ("Scratch",),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _IN_TRITON.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not has_triton():
        raise ConfigError(f"the attention kernel {name} needs the package triton: pip install triton")
    found = getattr(import_module(f"engine.kernels.attention.{home}"), name)
    globals()[name] = found  # from now on there is nothing to look up
    return found
