"""LLaVA-OneVision against transformers on a seeded tiny model, in float32: tiles, padding, new lines, pooled clips."""

from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from seeing import IMAGE, VIDEO, Seen, ask_all, llava_onevision, picture, pixels_of, prepared, processor_of, saved
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from engine import Engine
from engine.layers.vision import normalised
from engine_plugins.media.llava_onevision import LlavaOnevision as Processor
from engine_plugins.models.llava_onevision import LlavaOnevision

SHAPES = [(40, 52), (61, 20), (9, 90), (20, 20), (200, 310), (33, 47), (90, 14)]
SHOWN = [picture(index, *shape) for index, shape in enumerate(SHAPES)]
CLIP = picture(4, 30, 26, frames=3, fps=2.0)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return llava_onevision()


@pytest.fixture(scope="module")
def seen(theirs: Any) -> Seen:
    return Seen(theirs, LlavaOnevision, Processor)


def reference(theirs: Any) -> LlavaOnevisionImageProcessorPil:
    grids = theirs.config.image_grid_pinpoints
    return LlavaOnevisionImageProcessorPil(size={"height": 20, "width": 20}, image_grid_pinpoints=grids, do_pad=False)


def pixels(medium: Any) -> torch.Tensor:
    return torch.cat([normalised(each, torch.device("cpu")) for each in pixels_of(medium)]).permute(0, 3, 1, 2)


def told(ids: Any, media: Any, shapes: Any) -> dict[str, Any]:
    """What transformers takes: pixels of pictures are padded to the most tiles."""
    given: dict[str, Any] = {"input_ids": torch.tensor([list(ids)])}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    if pictures := [medium for medium in media if medium.kind == "image"]:
        tiles = [pixels(medium) for medium in pictures]
        most = max(map(len, tiles))
        padded = [torch.cat((each, each.new_zeros(most - len(each), *each.shape[1:]))) for each in tiles]
        given |= {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(shapes)}
    if clips := [medium for medium in media if medium.kind == "video"]:
        given["pixel_values_videos"] = torch.stack([pixels(medium) for medium in clips])
    return given


def assert_near(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(ours, wanted, atol=2e-4, rtol=0)
    assert wanted.abs().max() > 1.0


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_tiles_and_counts_are_those_of_transformers_slow_processor(theirs: Any, seen: Seen, index: int) -> None:
    medium = seen.processor.prepare(SHOWN[index])
    wanted = reference(theirs)(images=[SHOWN[index].pixels[0]], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels(medium), wanted, atol=1e-6, rtol=0)
    counting = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    counting.image_processor, counting.num_image_tokens = reference(theirs), 25
    counting.vision_aspect_ratio = theirs.config.vision_aspect_ratio
    assert medium.tokens == counting._get_number_of_features(*SHAPES[index], 20, 20)


@torch.inference_mode()
def test_embeddings_of_pictures_and_clips(theirs: Any, seen: Seen) -> None:
    media = [seen.processor.prepare(each) for each in SHOWN]
    given = told([], media, SHAPES)
    wanted = theirs.model.get_image_features(
        given["pixel_values"], given["image_sizes"], vision_aspect_ratio="anyres_max_2"
    )
    ours = seen.embeddings([*media, clip := seen.processor.prepare(CLIP)])
    assert [len(each) for each in ours] == [each.tokens for each in (*media, clip)]
    for one, other in zip(ours[:-1], wanted.pooler_output, strict=True):
        assert_near(one, other)
    assert_near(ours[-1], theirs.model.get_video_features(pixels(clip)[None]).pooler_output[0])


@torch.inference_mode()
def test_a_coarse_picture_is_one_tile_as_one_of_several_is_in_transformers(theirs: Any, seen: Seen) -> None:
    media = [seen.processor.prepare(replace(each, coarse=True)) for each in SHOWN[:2]]
    tiles = torch.stack([pixels(medium) for medium in media])  # [2, 1, 3, 20, 20]
    for tile, each in zip(tiles, SHOWN, strict=False):
        whole = reference(theirs)(images=[each.pixels[0]], return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(tile, whole[:1], atol=1e-6, rtol=0)
    wanted = theirs.model.get_image_features(
        tiles, torch.tensor(SHAPES[:2]), vision_aspect_ratio="anyres_max_2", batch_num_images=torch.tensor([2])
    )
    ours = seen.embeddings(media)
    assert [len(each) for each in ours] == [medium.tokens for medium in media] == [26, 26]
    assert media[0].digest != seen.processor.prepare(SHOWN[0]).digest
    for one, other in zip(ours, wanted.pooler_output, strict=True):
        assert_near(one, other)


@torch.inference_mode()
def test_logits_of_prompts_cut_anywhere(theirs: Any, seen: Seen) -> None:
    shown, shapes = [SHOWN[0], CLIP, SHOWN[1]], [SHAPES[0], SHAPES[1]]
    media = [seen.processor.prepare(each) for each in shown]
    ids = [1, 2, IMAGE, 3, VIDEO, IMAGE, 5, 6]
    (placed,) = seen.admit([(ids, media)])
    assert [sum(count for _, count in spans) for spans in placed.spans] == [medium.tokens for medium in media]
    wanted = theirs(**told(placed.ids, media, shapes)).logits[0]
    for cut in range(1, len(wanted), 7):
        assert_near(seen.cut(placed, [cut]), wanted)
    assert_near(seen.cut(placed, range(1, len(wanted), 3)), wanted)


def test_frames_are_spread_evenly(seen: Seen) -> None:
    assert seen.processor.choose_frames(10, 24.0, 10 / 24) == list(range(10))
    assert seen.processor.choose_frames(100, 24.0, 100 / 24) == (np.arange(32) * 100 // 32).tolist()


@torch.inference_mode()
def test_replies_are_transformers(theirs: Any, tmp_path: Any) -> None:
    shown = [[0], [1, 2], [], [5]]
    options = {"max_step_tokens": 60, "page_size": 4, "device": "cpu"}
    with Engine(model=str(saved(theirs, tmp_path)), **options) as engine:
        wanted, asked = [], []
        for each in shown:
            ids, frames = [1, 2, *[IMAGE, 5, 6, 7] * len(each)], [SHOWN[index] for index in each]
            media = prepared(engine, frames)
            placed = processor_of(engine).placed(ids, media)
            given = told(placed.ids, media, [SHAPES[index] for index in each])
            out = theirs.generate(**given, min_new_tokens=10, max_new_tokens=10, do_sample=False)
            wanted.append(out[0, len(placed.ids) :].tolist())
            asked.append((ids, frames))
        assert len({tuple(reply) for reply in wanted}) >= 3
        assert [reply.ids for reply in ask_all(engine, asked, max_tokens=10)] == wanted
        again = ask_all(engine, asked, max_tokens=10)
        assert [reply.ids for reply in again] == wanted
        assert all(reply.cached_tokens >= reply.prompt_tokens - 4 for reply in again)
