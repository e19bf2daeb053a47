"""The kernels on logits pass Triton's compiler for a Hopper GPU that is not here."""

from typing import Any

import pytest
from hopper import MARKS, compile_for_hopper

from engine.kernels.logits import adjustments as triton_adjustments
from engine.kernels.logits import bitmask as triton_bitmask
from engine.kernels.logits import draw as sampling
from engine.kernels.logits import filters, scores

pytestmark = MARKS
CHUNKS = {"CHUNKS": 64, "GROUPS": 8192}
PARAMETERS = "*i64 *fp32 *fp32 *fp32 *i32"
SCANNED = "*fp32 *fp32 *fp32"
CASES: list[tuple[Any, str, dict[str, Any]]] = [
    (filters._scan_kernel, f"LOGITS {PARAMETERS} {SCANNED} *fp32 i32 i32 i32", {"GROUP": 32, "BLOCK": 4096}),
    (
        filters._cut_kernel,
        f"LOGITS {PARAMETERS} {SCANNED} *fp32 *i32 *fp32 *i32 i32 i32 i32 i32",
        CHUNKS | {"GROUP": 32, "CHUNK_GROUPS": 128, "HALVINGS": 14, "BLOCK": 2048, "PIVOTS": 8, "SHIFT": "SHIFT"},
    ),
    *(
        (
            sampling._draw_kernel,
            "LOGITS *i64 *i64 *fp32 *i64 *fp32 *i32 *i32 *i64 *fp32 *i32 i32 i32 i32 i32",
            {"CUTS": cuts, "MASKS": masks, "BLOCK": 4096, "FAST": True},
        )
        for cuts, masks in ((False, False), (True, False), (False, True))
    ),
    (sampling._choose_kernel, "*fp32 *i32 *i64 *i64 *i32 *i64 *i64 i32 i32", {"BLOCK": 64}),
    (
        scores._scan_kernel,
        f"LOGITS *i64 *i64 {SCANNED} *i32 i32 i32 i32",
        {"ROWS": True, "GROUP": 32, "BLOCK": 4096},
    ),
    (
        scores._score_kernel,
        f"LOGITS *i64 *i64 {SCANNED} *i32 *fp32 *i32 *i32 *fp32 i32 i32 i32 i32",
        CHUNKS | {"ROWS": True, "GROUP": 32, "COUNT": 20, "COUNTS": 32},
    ),
    (triton_bitmask._bitmask_kernel, "LOGITS *i32 *i64 *i64 i32 i32 i32", {"LINES": True, "BLOCK": 4096}),
    (triton_adjustments._count_kernel, "*i64 *i64 *i32 *i32 *i32 i32 i32 i32", {"BLOCK": 1024}),
    (
        triton_adjustments._penalize_kernel,
        "*fp32 *i64 *i64 *i64 *i32 *i32 *i32 i32 i32 i32 i32",
        {"BLOCK": 1024},
    ),
    (
        triton_adjustments._edit_kernel,
        "*fp32 *i64 *i64 *i64 *i32 *i32 *i32 *i32 i32 i32 i32 i32",
        {"BLOCK": 256},
    ),
]


@pytest.mark.parametrize(("kernel", "types", "constants"), CASES, ids=[case[0].__name__ for case in CASES])
@pytest.mark.parametrize(("logits", "shift"), [("*bf16", 16), ("*fp32", 0)], ids=["bf16", "fp32"])
def test_it_compiles_for_hopper(kernel: Any, types: str, constants: dict[str, Any], logits: str, shift: int) -> None:
    if logits == "*bf16" and "LOGITS" not in types:
        pytest.skip("has float32 logits alone")
    values = {name: shift if value == "SHIFT" else value for name, value in constants.items()}
    given = iter(types.replace("LOGITS", logits).split())
    kinds = {name: next(given, "none") for name in kernel.arg_names if name not in values}
    assert "none" not in kinds.values(), "the kernel has arguments that are not among these"
    compiled = compile_for_hopper(kernel, values, kinds, num_warps=8)
    assert compiled.asm["cubin"]
    assert not next(given, None)
