"""The kernels over the peers' memory pass Triton's compiler for a Hopper GPU that is not here, with wide accesses."""

import re

import pytest
from hopper import MARKS, SHARED_MEMORY, bytes_spilled, compile_for_hopper

from engine.kernels.collectives import draw, exchange

pytestmark = MARKS
KINDS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
NUMBERS = dict.fromkeys(("part", "stream", "out", "flags", "epochs", "control", "failed"), "*i32")


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "sum"])
@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_by_words(kind: str, ranks: int, norm: bool) -> None:
    made = compiled(kind, ranks, norm, by_words=True)
    assert "st.global.v2.b64" in made.asm["ptx"] and "ld.volatile.global.v2.b64" in made.asm["ptx"]
    assert "griddepcontrol.wait" in made.asm["ptx"]
    assert made.metadata.shared <= SHARED_MEMORY and bytes_spilled(made) == 0


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "sum"])
@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_by_rows(kind: str, ranks: int, norm: bool) -> None:
    made = compiled(kind, ranks, norm, by_words=False)
    assert re.search(r"atom\.global\.sys\.release\.exch", made.asm["ptx"])
    assert re.search(r"(ld|atom)\.global\.(sys\.acquire|acquire\.sys)", made.asm["ptx"])
    assert "st.global.v4.b32" in made.asm["ptx"] and bytes_spilled(made) == 0


def compiled(kind: str, ranks: int, norm: bool, by_words: bool):
    import triton.language as tl

    box = "*i64" if by_words else "*i32"
    types = NUMBERS | {"weight": f"*{kind}", "epsilon": "fp32", "boxes": (box,) * ranks, "flags": ("*i32",) * ranks}
    constants = {
        "ME": ranks - 1,
        "RANKS": ranks,
        "KIND": getattr(tl, KINDS[kind]),
        "EACH": 1 if kind == "fp32" else 2,
        "NORM": norm,
        "WORDS": by_words,
    }
    constants |= {"BLOCK": 2048, "SENDS": True, "TAKES": True, "DEPENDS": True}
    return compile_for_hopper(
        exchange.exchange_kernel, constants, types, multiples=("words", "box_words"), num_warps=16 if by_words else 8
    )


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_over_ranks(kind: str, masks: bool) -> None:
    types = NUMBERS | {"best": "*fp32", "where": "*i32", "logits": f"*{kind}", "temperatures": "*fp32", "seeds": "*i64"}
    types |= {"slots": "*i64", "lasts": "*i64", "tokens": "*i32", "lengths": "*i64", "out": "*i64", "masks": "*i32"}
    types |= {"lines": "*i64", "boxes": ("*i64",) * 2}
    constants = {"MASKS": masks, "BLOCK": 4096, "FAST": True}
    assert bytes_spilled(compile_for_hopper(draw._best_kernel, constants, types, num_warps=8)) == 0
    constants = {"ME": 1, "RANKS": 2, "BLOCK": 16, "SENDS": True, "TAKES": True}
    compile_for_hopper(draw._choose_kernel, constants, types, num_warps=1)
