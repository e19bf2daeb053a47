"""The kernels of few tokens times a matrix, also gated, pass Triton's compiler for a Hopper GPU that is not here."""

import pytest
from hopper import MARKS, SHARED_MEMORY, compile_for_hopper

from engine.kernels.dense import linear as triton_linear
from engine.kernels.dense import triton as ops

pytestmark = MARKS
TYPES = dict.fromkeys(("inputs", "weight", "bias", "out"), "*bf16")


@pytest.mark.parametrize("depends", [False, True], ids=["alone", "dependent"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_products_of_few_tokens(gated: bool, depends: bool) -> None:
    flags = {"BIASED": True, "GATED": gated, "DEPENDS": depends}
    cut = {"ROWS": 2 if gated else 4, "COLUMNS": 1024}
    made = compile_for_hopper(ops._vector_kernel, flags | cut, TYPES, num_warps=4, num_stages=2)
    assert ("griddepcontrol.wait" in made.asm["ptx"]) == depends
    for tokens, rows in ((64, 4096), (64, 6144), (128, 4096)):
        chosen = triton_linear.skinny_cut(tokens, rows, 1024)
        assert chosen is not None
        cut = {"TOKENS": 64, "ROWS": chosen.rows // 2 if gated else chosen.rows, "COLUMNS": chosen.columns}
        constants = flags | cut | {"EVEN": True, "PRECISION": None}
        options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
        made = compile_for_hopper(triton_linear.skinny_kernel, constants, TYPES, **options)
        assert made.metadata.shared <= SHARED_MEMORY
