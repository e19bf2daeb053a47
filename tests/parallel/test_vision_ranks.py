"""Models that see on two ranks, through all rooms: towers are whole on each, or on the first stage alone."""

from pathlib import Path
from typing import Any

import pytest
from seeing import END, IMAGE, START, ask_all, gemma3, picture, qwen3_vl, qwen3_vl_moe, saved
from tiny_checkpoint import assert_same

from engine import Engine

SIZE = {"size": {"shortest_edge": 64, "longest_edge": 2048}}
ONE, OTHER = picture(1, 40, 52), picture(2, 70, 33)


@pytest.mark.parametrize(
    ("make", "mark", "ranks"),
    [
        pytest.param(qwen3_vl, IMAGE, {"tp": 2}, marks=pytest.mark.matrix),
        (qwen3_vl_moe, IMAGE, {"tp": 2, "ep": 2}),
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
