"""The kernels over the peers' memory pass Triton's compiler for a Hopper GPU that is not here, with wide accesses."""

import re

import pytest
from hopper import MARKS, SHARED_MEMORY, bytes_spilled, compile_for_hopper

from engine.kernels.collectives import draw, exchange

pytestmark = MARKS
NUMBERS = dict.fromkeys(("part", "stream", "out", "flags", "epochs", "control", "failed"), "*i32")


@pytest.mark.parametrize("by_words", [True, False])
def test_sums_of_float32(by_words: bool) -> None:
    made = compiled(2, norm=True, by_words=by_words, whole=True)
    assert bytes_spilled(made) == 0


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "sum"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_sums_by_words(ranks: int, norm: bool) -> None:
    made = compiled(ranks, norm, by_words=True)
    assert "st.global.v2.b64" in made.asm["ptx"] and "ld.volatile.global.v2.b64" in made.asm["ptx"]
    assert "griddepcontrol.wait" in made.asm["ptx"]
    assert made.metadata.shared <= SHARED_MEMORY and bytes_spilled(made) == 0


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "sum"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_sums_by_rows(ranks: int, norm: bool) -> None:
    made = compiled(ranks, norm, by_words=False)
    assert re.search(r"atom\.global\.sys\.release\.exch", made.asm["ptx"])
    assert re.search(r"(ld|atom)\.global\.(sys\.acquire|acquire\.sys)", made.asm["ptx"])
    assert "st.global.v4.b32" in made.asm["ptx"] and bytes_spilled(made) == 0


def compiled(ranks: int, norm: bool, by_words: bool, whole: bool = False):
    """`whole`: of numbers that are a word each, float32; else of bfloat16."""
    from triton.language import bfloat16, float32

    box = "*i64" if by_words else "*i32"
    types = NUMBERS | {
        "weight": "*fp32" if whole else "*bf16",
        "epsilon": "fp32",
        "boxes": (box,) * ranks,
        "flags": ("*i32",) * ranks,
    }
    constants = {"ME": ranks - 1, "RANKS": ranks, "NORM": norm, "WORDS": by_words}
    constants |= {"KIND": float32, "EACH": 1} if whole else {"KIND": bfloat16, "EACH": 2}
    constants |= {"BLOCK": 2048, "SENDS": True, "TAKES": True, "DEPENDS": True}
    return compile_for_hopper(
        exchange.exchange_kernel, constants, types, multiples=("words", "box_words"), num_warps=16 if by_words else 8
    )


@pytest.mark.parametrize("masks", [True, False])
def test_draws_over_ranks(masks: bool) -> None:
    types = NUMBERS | {"best": "*fp32", "where": "*i32", "logits": "*bf16", "temperatures": "*fp32", "seeds": "*i64"}
    types |= {"slots": "*i64", "lasts": "*i64", "tokens": "*i32", "lengths": "*i64", "out": "*i64", "masks": "*i32"}
    types |= {"lines": "*i64", "boxes": ("*i64",) * 2}
    constants = {"MASKS": masks, "BLOCK": 4096, "FAST": True}
    assert bytes_spilled(compile_for_hopper(draw._best_kernel, constants, types, num_warps=8)) == 0
    constants = {"ME": 1, "RANKS": 2, "BLOCK": 16, "SENDS": True, "TAKES": True}
    compile_for_hopper(draw._choose_kernel, constants, types, num_warps=1)
