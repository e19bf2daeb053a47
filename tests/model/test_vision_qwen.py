"""Qwen2.5-VL and Qwen3-VL against transformers on seeded tiny models, in float32: pixels, places, towers, replies."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from plain_attention import PlainAttention, captured
from seeing import (
    END,
    IMAGE,
    START,
    VIDEO,
    Seen,
    ask_all,
    begin,
    broken,
    picture,
    pixels_of,
    prepared,
    processor_of,
    qwen2_5_vl,
    qwen3_vl,
    qwen3_vl_moe,
    saved,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from engine import Engine, RequestError
from engine.layers.vision import flash_takes, patches_of
from engine.messages.assets import Load, Loaded
from engine.messages.media import MEDIA, packed, unpacked
from engine.messages.step import TOKEN
from engine.plugin import Terms
from engine.worker.steps import graphs
from engine.worker.steps.graphs import DecodeGraphs, PromptGraphs
from engine.worker.steps.rows import Rows
from engine_plugins.media.qwen2_5_vl import Qwen25VL as Processor25
from engine_plugins.media.qwen3_vl import Qwen3VL as Processor3
from engine_plugins.models.qwen2_5_vl import Qwen25VL
from engine_plugins.models.qwen3_vl import Qwen3VL, Qwen3VLMoe

SIZE = {"size": {"shortest_edge": 64, "longest_edge": 2048}}
PROCESSORS = {"image_processor": SIZE, "video_processor": {**SIZE, "cap_pixels_per_frame": False}}
FAMILIES = {
    "2.5": (qwen2_5_vl, Qwen25VL, Processor25),
    "3": (qwen3_vl, Qwen3VL, Processor3),
    "3, experts": (qwen3_vl_moe, Qwen3VLMoe, Processor3),
}
ONE, OTHER, STRIP = picture(1, 40, 52), picture(2, 70, 33), picture(3, 9, 90)
CLIP = picture(4, 30, 26, frames=5, fps=2.0)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    make, ours, processor = FAMILIES[request.param]
    theirs = make()
    return SimpleNamespace(theirs=theirs, seen=Seen(theirs, ours, processor, **PROCESSORS), name=request.param)


def prompt(family: Any, *shown: Any) -> tuple[list[int], list[Any]]:
    """Text between pictures and clips, which are Frames."""
    media = [family.seen.processor.prepare(each) for each in shown]
    ids = [1, 2, 3]
    for index, medium in enumerate(media):
        ids += [START, IMAGE if medium.kind == "image" else VIDEO, END, 5 + index, 7, 11]
    return ids, media


def patches(family: Any, medium: Any) -> torch.Tensor:
    return patches_of(pixels_of(medium), 4, 2, 2, torch.device("cpu"))


def told(family: Any, ids: Any, media: Any) -> dict[str, Any]:
    """What transformers takes of a prompt whose placeholders have grown."""
    found: dict[str, Any] = {"input_ids": torch.tensor([list(ids)])}
    found["mm_token_type_ids"] = (found["input_ids"] == IMAGE).int() + 2 * (found["input_ids"] == VIDEO).int()
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if own := [medium for medium in media if medium.kind == kind]:
            found[pixels] = torch.cat([patches(family, medium) for medium in own])
            found[grid] = torch.tensor([medium.grid for medium in own])
            if kind == "video" and family.name == "2.5":
                found["second_per_grid_ts"] = torch.tensor([medium.interval for medium in own])
    return found


@torch.inference_mode()
def their_logits(family: Any, ids: Any, media: Any) -> torch.Tensor:
    family.theirs.model.rope_deltas = None
    return family.theirs(**told(family, ids, media)).logits[0]


@torch.inference_mode()
def their_reply(family: Any, ids: Any, media: Any, count: int = 12) -> list[int]:
    family.theirs.model.rope_deltas = None
    given = told(family, ids, media)
    out = family.theirs.generate(**given, min_new_tokens=count, max_new_tokens=count, do_sample=False)
    return out[0, len(ids) :].tolist()


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert theirs.abs().max() > 1.0


# ── pixels ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(40, 52), (41, 53), (9, 90), (200, 310), (8, 8), (56, 8)])
def test_pixels_are_those_of_transformers_slow_processor(family: Any, shape: tuple[int, int]) -> None:
    image = picture(7, *shape)
    medium = family.seen.processor.prepare(image)
    mean, std = type(family.seen.processor).usual
    usual = {"image_mean": list(mean), "image_std": list(std)}
    theirs = Qwen2VLImageProcessorPil(patch_size=4, **SIZE, **usual)(images=[image.pixels[0]], return_tensors="pt")
    assert list(medium.grid) == theirs["image_grid_thw"][0].tolist()
    torch.testing.assert_close(patches(family, medium), theirs["pixel_values"], atol=1e-6, rtol=0)
    assert medium.tokens == int(np.prod(medium.grid)) // 4


def test_a_coarse_picture_is_one_of_256_tokens_at_most(family: Any) -> None:
    def prepared_of(shape: tuple[int, int], fewest: int = 64) -> list[Any]:
        size = {"size": {"shortest_edge": fewest, "longest_edge": 1 << 20}}
        config, described = Terms(family.theirs.config.to_dict()), Terms({"image_processor": size})
        processor = type(family.seen.processor)(config, described)
        return [processor.prepare(replace(picture(7, *shape), coarse=coarse)) for coarse in (True, False)]

    coarse, fine = prepared_of((200, 310))
    assert (coarse.tokens, fine.tokens) == (228, 975) and coarse.digest != fine.digest
    size = {"shortest_edge": 64, "longest_edge": 256 * 8 * 8}
    mean, std = type(family.seen.processor).usual
    usual = {"patch_size": 4, "image_mean": list(mean), "image_std": list(std)}
    theirs = Qwen2VLImageProcessorPil(size=size, **usual)(images=[picture(7, 200, 310).pixels[0]], return_tensors="pt")
    torch.testing.assert_close(patches(family, coarse), theirs["pixel_values"], atol=1e-6, rtol=0)
    coarse, fine = prepared_of((40, 52))
    assert coarse.digest == fine.digest and coarse.tokens == fine.tokens == 30
    assert prepared_of((200, 310), 60_000)[0].tokens == 912  # not below what the checkpoint says


def test_a_strip_that_is_too_narrow_is_refused(family: Any) -> None:
    with pytest.raises(RequestError, match=r"^is 900 × 4 pixels, and its longer side may have 200 times its shorter"):
        family.seen.processor.prepare(picture(7, 4, 900))


# Count, height, width, and the grid of transformers 5.24.0 with torchvision 0.28.0, which the test environment lacks.
SHAPES = [(8, 300, 200), (6, 700, 900), (5, 33, 60), (11, 480, 640)]
GRIDS = {
    ("2.5", True): [(28, 20), (48, 62), (18, 32), (34, 46)],
    ("2.5", False): [(28, 20), (48, 62), (18, 32), (34, 46)],
    ("3", True): [(18, 12), (20, 26), (8, 14), (20, 26)],
    ("3", False): [(18, 12), (18, 24), (8, 14), (14, 18)],
}


@pytest.mark.parametrize(("name", "capped"), GRIDS)
def test_clips_have_the_sizes_of_transformers(name: str, capped: bool) -> None:
    patch = 14 if name == "2.5" else 16
    terms = Terms({"cap_pixels_per_frame": capped})
    processor = FAMILIES[name][2](Terms({"vision_config": {"patch_size": patch}}), Terms({"video_processor": terms}))
    sizes = [processor.size(*shape, terms) for shape in SHAPES]
    assert [(high // patch, wide // patch) for high, wide in sizes] == GRIDS[name, capped]


def test_frames_are_chosen_as_transformers_does() -> None:
    one, other = Processor25(Terms(), Terms()), Processor3(Terms(), Terms())
    assert one.choose_frames(100, 25.0, 4.0) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert one.choose_frames(7, 30.0, 7 / 30) == [0, 1, 3, 5]
    assert one.choose_frames(3, 1.0, 3.0) == [0, 1]
    assert len(one.choose_frames(5000, 24.0, 5000 / 24)) == 416 and len(one.choose_frames(90_000, 24.0, 3750.0)) == 768
    assert other.choose_frames(100, 25.0, 4.0) == [0, 14, 28, 42, 57, 71, 85, 99]
    assert other.choose_frames(7, 30.0, 7 / 30) == [0, 2, 4, 6]
    assert other.choose_frames(3, 1.0, 3.0) == [0, 1, 2]
    for count, fps in ((367, 24.0), (670, 24.0), (1313, 24.0), (17, 2.4)):  # where steps are rounded beyond the end
        chosen = one.choose_frames(count, fps, count / fps)
        assert len(chosen) == count / fps * 2 // 2 * 2 and chosen[-1] < count
    for each in (one, other):
        with pytest.raises(
            RequestError, match=r"^has too few frames \(1\) for the model, which takes at least 2; send"
        ):
            each.choose_frames(1, 24.0, 1 / 24)


# ── the tower ────────────────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def test_the_tower_sees_pictures_and_clips_together_as_transformers_does(family: Any) -> None:
    shown = [family.seen.processor.prepare(each) for each in (ONE, CLIP, STRIP, OTHER)]
    pixels, grids = torch.cat([patches(family, each) for each in shown]), torch.tensor([each.grid for each in shown])
    theirs = family.theirs.model.visual(pixels, grid_thw=grids)
    wanted = [theirs.pooler_output, *getattr(theirs, "deepstack_features", [])]
    ours = family.seen.embeddings(shown)
    assert [len(each) for each in ours] == [each.tokens for each in shown]
    assert_near(torch.cat(ours), torch.cat(wanted, dim=1))


# ── prompts ──────────────────────────────────────────────────────────────────────────────────

SHOWN = {
    "one": (ONE,),
    "two and a strip": (ONE, OTHER, STRIP),
    "the same twice": (ONE, ONE),
    "a clip": (OTHER, CLIP, ONE),
}


@pytest.mark.parametrize("shown", SHOWN)
@torch.inference_mode()
def test_positions_and_logits_are_transformers(family: Any, shown: str) -> None:
    ids, media = prompt(family, *SHOWN[shown])
    placed = family.seen.processor.placed(ids, media)
    given = told(family, placed.ids, media)
    given = {name: given[name] for name in given if not name.startswith("pixel")}
    positions, _ = family.theirs.model.get_rope_index(**given)
    assert np.array_equal(np.frombuffer(placed.positions, "<i4").reshape(3, -1), positions[:, 0])
    assert_near(family.seen.logits((ids, media)), their_logits(family, placed.ids, media))


def test_a_prompt_may_be_cut_anywhere(family: Any) -> None:
    (placed,), media = family.seen.admit([shown := prompt(family, STRIP, CLIP)]), shown[1]
    wanted = their_logits(family, placed.ids, media)
    for cut in range(1, len(wanted)):
        assert_near(family.seen.cut(placed, [cut]), wanted)
    assert_near(family.seen.cut(placed, range(1, len(wanted))), wanted)


def test_rows_with_and_without_pictures_share_a_step(family: Any) -> None:
    prompts = [prompt(family, ONE), prompt(family), prompt(family, OTHER, STRIP)]
    placed = family.seen.admit(prompts)
    rows = [(slot, 0, len(each.ids)) for slot, each in enumerate(placed)]
    for ours, each, (_, media) in zip(family.seen.harness.logits(rows[::-1])[::-1], placed, prompts, strict=True):
        assert_near(ours, their_logits(family, each.ids, media))


def test_pages_that_end_within_a_picture_serve_another_prompt(family: Any) -> None:
    first, second = prompt(family, ONE, OTHER), prompt(family, ONE, STRIP)
    placed = family.seen.admit([first, second], cached={1: (0, 3)})  # of four tokens each
    family.seen.harness.logits([(0, 0, len(placed[0].ids))])
    (ours,) = family.seen.harness.logits([(1, 12, len(placed[1].ids) - 12)])
    assert_near(ours, their_logits(family, placed[1].ids, second[1])[12:])


@torch.inference_mode()
def test_captured_steps_turn_by_the_positions_behind_what_was_shown(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins for graphs compute anew from what a replay put in place."""
    monkeypatch.setattr(graphs, "captured", captured)
    _, ours, processor = FAMILIES[family.name]
    seen = Seen(family.theirs, ours, processor, PlainAttention, **PROCESSORS)
    prompts = [prompt(family, ONE), prompt(family), prompt(family, CLIP, OTHER)]
    placed, runner = seen.admit(prompts), seen.harness.runner
    seen.harness.logits([(slot, 0, len(each.ids) - 1) for slot, each in enumerate(placed)])
    tables = runner.shared_graphs._tables
    decode, prompts_too = DecodeGraphs(tables), PromptGraphs(tables, 5, (32,))
    assert decode.capture(4, None) and prompts_too.capture(32, None)
    rows = Rows.of(np.array([[slot, len(each.ids) - 1, 1, TOKEN] for slot, each in enumerate(placed)]))
    assert runner.media is not None and not runner.media.shows(rows)
    wanted = torch.stack(
        [their_logits(family, each.ids, media)[-1] for each, (_, media) in zip(placed, prompts, strict=True)]
    )
    shown = runner.media.shown(rows)
    assert shown.embeddings is None
    for hidden in (decode.replay(rows)[0], prompts_too.replay(rows, shown=shown)[0], runner.compute(rows)[0]):
        assert_near(seen.model.logits(hidden), wanted)
    assert runner.media.shows(Rows.of(np.array([[0, 4, 1, TOKEN], [1, 0, 3, TOKEN]])))


@torch.inference_mode()
def test_captured_steps_show_what_prompts_show(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole prompts and parts of them, beside each other, after a step that left other embeddings behind; of whatever
    type the tower's are."""
    monkeypatch.setattr(graphs, "captured", captured)
    _, ours, processor = FAMILIES[family.name]
    seen = Seen(family.theirs, ours, processor, PlainAttention, **PROCESSORS)
    prompts = [prompt(family, ONE), prompt(family), prompt(family, CLIP, OTHER)]
    placed, runner = seen.admit(prompts), seen.harness.runner
    some = PromptGraphs(runner.shared_graphs._tables, 5, (32, 256))
    assert some.capture(256, None) and runner.media is not None
    runner.prompt_graphs = some, some
    runner.media._held = {number: made.double() for number, made in runner.media._held.items()}
    whole = [(slot, 0, len(each.ids)) for slot, each in enumerate(placed)]
    for cut in (whole, [whole[2], (1, 0, 3)], [(0, 0, 7), (2, 0, 30)], [(0, 7, whole[0][2] - 7), (2, 30, 5)]):
        rows = Rows.of(np.array([[*row, TOKEN] for row in cut]))
        forward = runner.forward(rows)
        assert forward.batch is None, "it was replayed"
        for (slot, start, length), ours_ in zip(cut, forward.hidden.split([row[2] for row in cut]), strict=True):
            wanted = their_logits(family, placed[slot].ids, prompts[slot][1])[start : start + length]
            assert_near(seen.model.logits(ours_), wanted)


@torch.inference_mode()
def test_graphs_of_all_sizes_share_the_lines_that_the_plan_of_memory_counts(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(graphs, "FEW_ROWS_TOKENS", (8, 16))
    monkeypatch.setattr(graphs, "ALL_ROWS_TOKENS", (24, 32, 64))
    _, ours, processor = FAMILIES[family.name]
    seen = Seen(family.theirs, ours, processor, PlainAttention, **PROCESSORS)
    tables, slots = seen.harness.runner.shared_graphs._tables, seen.harness.slots
    for most, sizes, lines in ((40, (16, 40), 40), (20, (16, 0), 16), (12, (12, 0), 12)):
        few, others = made = graphs.prompt_graphs(tables)
        graphs.capture_prompts(made, most, None)
        assert (few.most, others.most) == sizes
        assert few._shown.shape == (lines, tables.shown_size) and lines == graphs.most_captured(slots, most)
        assert others._shown is few._shown or not others.most


@torch.inference_mode()
def test_steps_that_cannot_be_captured_have_no_lines_for_what_is_shown(family: Any) -> None:
    some = PromptGraphs(family.seen.harness.runner.shared_graphs._tables, 5, (32,))
    assert some._tables.shown_size and not some.capture(32, None)
    assert not some._shown.numel()


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "taken"),
    [
        ((9, 0), torch.bfloat16, 80, True),
        ((8, 0), torch.float16, 64, True),
        ((7, 5), torch.float16, 64, False),
        ((9, 0), torch.float32, 64, False),
        ((9, 0), torch.bfloat16, 36, False),
    ],
)
def test_runs_of_several_lengths_are_for_flash_attention_where_it_knows_gpu_type_and_heads(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, dim: int, taken: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=dtype, shape=(9, 2, dim))
    assert flash_takes(query) == taken


def test_times_of_a_clip_are_text_in_qwen3_vl() -> None:
    encode = lambda text: [ord(letter) for letter in text]  # noqa: E731
    processor = Processor3(Terms({"vision_config": {"patch_size": 4}}), Terms(PROCESSORS), encode)
    medium = processor.prepare(picture(4, 16, 16, frames=5, fps=2.0))
    assert medium.times == (0.25, 1.25, 2.0)
    placed = processor.placed([1, processor.ids["video"], 2], [medium])
    assert len(placed.spans[0]) == 3 and sum(count for _, count in placed.spans[0]) == medium.tokens
    text = [id for id in placed.ids if id < 128]
    assert "".join(map(chr, text[1:-1])) == "<0.2 seconds><1.2 seconds><2.0 seconds>"


@pytest.mark.parametrize(
    ("ids", "count", "said"),
    [
        ([1, 2], 1, r"0 places for media \(none\), and 1 medium came"),
        ([1, IMAGE, IMAGE], 1, "2 places"),
        ([1, VIDEO], 1, r"\(video\), and 1 medium came with it \(image\)"),
    ],
)
def test_as_many_places_as_media(family: Any, ids: list[int], count: int, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        family.seen.processor.placed(ids, [family.seen.processor.prepare(ONE)] * count)


def test_pixels_that_cannot_be_read_are_told_when_they_come(family: Any) -> None:
    told: list[Loaded] = []
    loader = family.seen.harness.runner.loaders[MEDIA]
    medium = family.seen.processor.prepare(ONE)
    loader.load(Load(MEDIA, 900, b"no pixels"), told.append)
    loader.load(Load(MEDIA, 901, packed(replace(unpacked(medium.payload), data=b"short"))), told.append)
    loader.load(Load(MEDIA, 902, medium.payload), told.append)
    assert [bool(each.cause) for each in told] == [True, True, False]
    assert "5 bytes for numbers of shape" in told[1].cause


# ── through all rooms ────────────────────────────────────────────────────────────────────────


def test_replies_are_transformers_whole_cut_cached_and_together(family: Any, tmp_path: Any) -> None:
    shown = [(ONE,), (OTHER, STRIP), (), (ONE, OTHER), (CLIP, ONE)]
    asked = [(prompt(family, *each)[0], each) for each in shown]
    # Steps of few tokens, an encoder of less a step than all need, and pages that end anywhere.
    options = {"max_step_tokens": 23, "encoder_tokens": 60, "page_size": 4, "device": "cpu"}
    with Engine(model=str(saved(family.theirs, tmp_path, **PROCESSORS)), **options) as engine:
        media = [prepared(engine, each) for each in shown]
        placed = [processor_of(engine).placed(ids, each) for (ids, _), each in zip(asked, media, strict=True)]
        wanted = [their_reply(family, each.ids, own) for each, own in zip(placed, media, strict=True)]
        assert len({tuple(reply) for reply in wanted}) == len(wanted)
        assert [reply.ids for reply in ask_all(engine, asked)] == wanted
        again = ask_all(engine, asked)
        assert [reply.ids for reply in again] == wanted
        assert all(reply.cached_tokens >= reply.prompt_tokens - 4 for reply in again)
        # What cannot be encoded ends who shows it, each time, and nobody else.
        bad = broken(processor_of(engine).prepare(picture(9, 40, 40)))
        ids = asked[0][0]
        for _ in range(2):
            failing, other, beside = (begin(engine, ids, shown) for shown in ([bad], media[0], [bad]))
            for future in (failing, beside):
                with pytest.raises(RequestError, match="cannot be encoded: RuntimeError") as failed:
                    future.result()
                assert (failed.value.status, failed.value.code) == (500, "media_failed")
            assert other.result().ids == wanted[0]
