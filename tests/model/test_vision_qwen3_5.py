"""Qwen3.5 with its tower against transformers on seeded tiny models, and through all rooms: what a model that keeps
states of requests does with prefixes and requests that end early."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from seeing import Seen, ask_all, begin, prepared, processor_of, qwen3_5, saved
from test_vision_qwen import CLIP, ONE, OTHER, PROCESSORS, STRIP, assert_near, prompt, their_logits

from engine import Engine
from engine.errors import ConfigError
from engine.plugin.testing import ModelHarness
from engine_plugins.media.qwen3_vl import Qwen3VL
from engine_plugins.models.qwen3_5 import Qwen35VL

EXPERTS = {
    **{"num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
}


def made(**text: Any) -> Any:
    theirs = qwen3_5(**text)
    return SimpleNamespace(theirs=theirs, seen=Seen(theirs, Qwen35VL, Qwen3VL, **PROCESSORS), name="3")


@pytest.fixture(scope="module")
def family() -> Any:
    return made()


@pytest.mark.parametrize("text", [{}, EXPERTS], ids=["dense", "a mixture"])
@torch.inference_mode()
def test_pictures_and_clips_are_transformers_whole_and_cut(text: Any) -> None:
    family = made(**text)
    ids, media = prompt(family, OTHER, CLIP, STRIP)
    (placed,) = family.seen.admit([(ids, media)])
    wanted = their_logits(family, placed.ids, media)
    assert_near(family.seen.cut(placed), wanted)
    family.seen.admit([(ids, media)])
    assert_near(family.seen.cut(placed, [1, 9, 30, 31]), wanted)


def test_rows_with_and_without_pictures_share_a_step(family: Any) -> None:
    prompts = [prompt(family, ONE), prompt(family), prompt(family, OTHER, STRIP)]
    placed = family.seen.admit(prompts)
    rows = [(slot, 0, len(each.ids)) for slot, each in enumerate(placed)]
    for ours, each, (_, media) in zip(family.seen.harness.logits(rows[::-1])[::-1], placed, prompts, strict=True):
        assert_near(ours, their_logits(family, each.ids, media))


def test_replies_through_all_rooms(family: Any, tmp_path: Any) -> None:
    """Prompts in chunks and together, three times: states behind pictures are kept the second time at last, and
    found the third. Requests that end early leave nothing to those that have their slots next."""
    shown = [(ONE,), (), (CLIP, ONE)]
    asked = [(prompt(family, *each)[0] + [7, 8, 9] * 12, each) for each in shown]
    options = {"max_step_tokens": 23, "page_size": 4, "device": "cpu", "max_running": 3}
    with Engine(model=str(saved(family.theirs, tmp_path, **PROCESSORS)), **options) as engine:
        media = [prepared(engine, each) for each in shown]
        placed = [processor_of(engine).placed(ids, each) for (ids, _), each in zip(asked, media, strict=True)]
        leaving = [begin(engine, asked[2][0], media[2], max_tokens=150) for _ in range(2)]
        first = ask_all(engine, asked, max_tokens=6)
        for future in leaving:
            future.cancel()
        second, third = ask_all(engine, asked, max_tokens=6), ask_all(engine, asked, max_tokens=6)
    lengths = [len(each.ids) for each in placed]
    assert [reply.cached_tokens for reply in third] == [(length - 1) // 4 * 4 * (length > 64) for length in lengths]
    assert sorted(length > 64 for length in lengths) == [False, True, True]
    assert [reply.ids for reply in first] == [reply.ids for reply in second] == [reply.ids for reply in third]
    assert len({tuple(reply.ids) for reply in first}) == len(first)
    for reply, each, own in zip(first, placed, media, strict=True):
        scores = their_logits(family, [*each.ids, *reply.ids], own)[len(each.ids) - 1 : -1]
        assert reply.ids == scores.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_config": {"deepstack_visual_indexes": [1]}}, "deepstack_visual_indexes is .* empty"),
        ({"text_config": {"rope_parameters": {"mrope_interleaved": False}}}, "mrope_interleaved is False .* true"),
        ({"text_config": {"rope_parameters": {"mrope_section": [1, 1, 1]}}}, "mrope_section is .* whose sum is"),
    ],
)
def test_what_would_run_and_be_wrong_is_refused(family: Any, changes: Any, said: str) -> None:
    config = family.theirs.config.to_dict()
    for section, terms in changes.items():
        for name, value in terms.items():
            config[section][name] = {**config[section][name], **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=said):
        ModelHarness(Qwen35VL, config, {})
