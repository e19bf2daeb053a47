"""Models that see on two ranks, through all rooms: towers are whole on each, or on the first stage alone."""

from pathlib import Path
from typing import Any

import pytest
from seeing import (
    END,
    IMAGE,
    START,
    ask_all,
    begin,
    broken,
    gemma3,
    picture,
    prepared,
    processor_of,
    qwen3_vl,
    qwen3_vl_moe,
    saved,
)
from tiny_checkpoint import assert_same

from engine import Engine, RequestError

SIZE = {"size": {"shortest_edge": 64, "longest_edge": 2048}}
ONE, OTHER = picture(1, 40, 52), picture(2, 70, 33)


@pytest.mark.parametrize(
    ("make", "mark", "ranks"),
    [
        pytest.param(qwen3_vl, IMAGE, {"tp": 2}, marks=pytest.mark.matrix),
        pytest.param(qwen3_vl_moe, IMAGE, {"tp": 2, "ep": 2}, marks=pytest.mark.matrix),
        pytest.param(gemma3, START, {"pp": 2}, marks=pytest.mark.matrix),
    ],
)
def test_two_ranks_say_what_one_does(make: Any, mark: int, ranks: dict[str, int], tmp_path: Path) -> None:
    """What Qwen3-VL's tower adds to the stream is no part of a sum over ranks; Gemma's second stage has spans alone."""
    folder = saved(make(), tmp_path, image_processor={} if make is gemma3 else SIZE)
    asked = [([1, 2, mark, END, 5, 6], [ONE]), ([1, mark, 7, mark, 3], [OTHER, ONE]), ([4, 5, 6], [])]
    told = []
    for options in ({}, ranks):
        with Engine(model=str(folder), device="cpu", page_size=4, max_step_tokens=40, **options) as engine:
            told.append(ask_all(engine, asked, logprobs=0))
    assert_same(told[1], told[0], tolerance=1e-3)
    assert len({str([step.logprob for step in reply.logprobs]) for reply in told[0]}) == 3


@pytest.mark.parametrize(
    ("make", "mark"), [(qwen3_vl_moe, IMAGE), pytest.param(gemma3, START, marks=pytest.mark.matrix)]
)
def test_copies_of_attention_say_what_one_does(make: Any, mark: int, tmp_path: Path) -> None:
    """And experts divide over the two, so that each copy's tokens, with what the tower adds to them, go to both."""
    folder = saved(make(), tmp_path, image_processor={} if make is gemma3 else SIZE)
    asked = [([1, 2, mark, END, 5, 6], [ONE]), ([1, mark, 7, mark, 3], [OTHER, ONE]), ([4, 5, 6], [])]
    asked += [([9, mark, 3, 4], [OTHER]), ([1, 2, mark, END, 5, 6, 8], [ONE])]
    told = []
    for options in ({}, {"dp_attention": 2, "ep": 1 if make is gemma3 else 2}):
        with Engine(model=str(folder), device="cpu", page_size=4, max_step_tokens=80, **options) as engine:
            told.append(ask_all(engine, asked, logprobs=0))
            told[-1] += (again := ask_all(engine, asked, logprobs=0))
            assert sum(reply.cached_tokens for reply in again) > 60  # where the copy is that computed it
            copies = engine.stats().copies
            if make is qwen3_vl_moe:  # what one copy cannot encode ends who shows it there
                bad, good = broken(processor_of(engine).prepare(picture(9, 40, 40))), prepared(engine, [ONE])
                failing, other = begin(engine, asked[0][0], [bad]), begin(engine, asked[0][0], good, logprobs=0)
                with pytest.raises(RequestError, match="cannot be encoded: RuntimeError"):
                    failing.result()
                told[-1].append(other.result())
    assert_same(told[1], told[0], tolerance=1e-3)
    assert len(copies) == 2 and all(copy.tokens_total > 20 for copy in copies)
