"""Gemma 3 with pictures against transformers on a seeded tiny model, in float32: squares, crops, spans that see each
other."""

from typing import Any

import pytest
import torch
from msgspec.structs import replace
from seeing import END, IMAGE, START, Seen, ask_all, gemma3, picture, pixels_of, prepared, processor_of, saved
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from engine import Engine, RequestError
from engine.layers.vision import normalised
from engine.plugin import Terms
from engine_plugins.media.gemma3 import Gemma3 as Processor
from engine_plugins.models.gemma3_vl import Gemma3VL

ONE, OTHER, LONG = picture(1, 40, 52), picture(2, 70, 66), picture(3, 24, 100)
CROPS = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 3}
CROPS["pan_and_scan_min_ratio_to_activate"] = 1.5


@pytest.fixture(scope="module")
def theirs() -> Any:
    return gemma3()


@pytest.fixture(scope="module")
def seen(theirs: Any) -> Seen:
    return Seen(theirs, Gemma3VL, Processor)


def prompt(seen: Seen, *shown: Any) -> tuple[list[int], list[Any]]:
    ids = [1, 2, 3]
    for index in range(len(shown)):
        ids += [START, 5 + index, 7, 11]
    return ids, [seen.processor.prepare(each) for each in shown]


def pixels(media: Any) -> torch.Tensor:
    every = [normalised(each, torch.device("cpu")) for medium in media for each in pixels_of(medium)]
    return torch.cat(every).permute(0, 3, 1, 2)


def told(ids: Any, media: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"input_ids": torch.tensor([list(ids)])}
    given["token_type_ids"] = (given["input_ids"] == IMAGE).int()
    return given | ({"pixel_values": pixels(media)} if media else {})


def assert_near(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(ours, wanted, atol=2e-4, rtol=0)
    assert wanted.abs().max() > 1.0


@pytest.mark.parametrize("options", [{}, CROPS], ids=["whole", "pan and scan"])
def test_pixels_are_those_of_transformers_slow_processor(theirs: Any, options: dict[str, Any]) -> None:
    said = {"image_processor": {"size": {"height": 24, "width": 24}, **options}}
    processor = Processor(Terms(theirs.config.to_dict()), Terms(said))
    reference = Gemma3ImageProcessorPil(size={"height": 24, "width": 24}, **options)
    assert processor.prepare(replace(LONG, coarse=True)).grid == (1,)
    for shown in (ONE, LONG, picture(4, 90, 20), picture(5, 17, 90), picture(6, 24, 24)):
        medium = processor.prepare(shown)
        wanted = reference(images=[shown.pixels[0]], return_tensors="pt")
        assert medium.grid == (1 + int(wanted["num_crops"][0]),) and medium.tokens == 9 * medium.grid[0]
        torch.testing.assert_close(pixels([medium]), wanted["pixel_values"], atol=1e-6, rtol=0)


@torch.inference_mode()
def test_the_tower_and_what_is_projected(theirs: Any, seen: Seen) -> None:
    media = [seen.processor.prepare(each) for each in (ONE, OTHER, LONG)]
    wanted = theirs.model.get_image_features(pixels(media)).pooler_output
    assert_near(torch.stack(seen.embeddings(media)), wanted)


SHOWN = {"one": (ONE,), "three": (ONE, OTHER, LONG), "the same twice": (ONE, ONE)}


@pytest.mark.parametrize("shown", SHOWN)
@torch.inference_mode()
def test_tokens_of_a_picture_see_each_other(theirs: Any, seen: Seen, shown: str) -> None:
    ids, media = prompt(seen, *SHOWN[shown])
    (placed,) = seen.admit([(ids, media)])
    assert placed.whole
    assert_near(seen.cut(placed), theirs(**told(placed.ids, media)).logits[0])


@torch.inference_mode()
def test_a_prompt_may_be_cut_anywhere_but_within_a_picture(theirs: Any, seen: Seen) -> None:
    ids, media = prompt(seen, ONE, OTHER)
    (placed,) = seen.admit([(ids, media)])
    wanted = theirs(**told(placed.ids, media)).logits[0]
    inside = {at for spans in placed.spans for begin, count in spans for at in range(begin + 1, begin + count)}
    cuts = [cut for cut in range(1, len(wanted)) if cut not in inside]
    for cut in cuts:
        assert_near(seen.cut(placed, [cut]), wanted)
    assert_near(seen.cut(placed, cuts), wanted)
    with pytest.raises(AssertionError):
        assert_near(seen.cut(placed, [placed.spans[0][0][0] + 4]), wanted)


@torch.inference_mode()
def test_the_rest_of_a_cached_picture_sees_all_of_it(theirs: Any, seen: Seen) -> None:
    """Pages of four tokens end within the picture, whose tokens begin at position 6."""
    first, second = prompt(seen, ONE, OTHER), prompt(seen, ONE, LONG)
    placed = seen.admit([first, second], cached={1: (0, 3)})
    seen.harness.logits([(0, 0, len(placed[0].ids))])
    (ours,) = seen.harness.logits([(1, 12, len(placed[1].ids) - 12)])
    assert placed[1].spans[0] == ((6, 9),)
    assert_near(ours, theirs(**told(placed[1].ids, second[1])).logits[0][12:])


def test_line_ends_beside_a_picture_are_one_token(theirs: Any) -> None:
    """As in Gemma's vocabulary, where a run of line ends is a token: 40 + their number."""

    def encode(text: str) -> list[int]:
        return [40 + len(text)] if not text.strip("\n") else [7] * len(text.split())

    processor = Processor(Terms(theirs.config.to_dict()), Terms(), encode)
    medium = processor.prepare(ONE)
    shown = [START, *[IMAGE] * 9, END]
    placed = processor.placed([1, 41, START, 2, 42], [medium])
    assert list(placed.ids) == [1, 43, *shown, 42, 2, 42]
    placed = processor.placed([1, START, START, 42, 3], [medium, medium])
    assert list(placed.ids) == [1, 42, *shown, 44, *shown, 44, 3]
    assert placed.spans == (((3, 9),), ((15, 9),))


def test_clips_are_refused(seen: Seen) -> None:
    with pytest.raises(RequestError, match=r"^is a video, and the model takes images alone"):
        seen.processor.prepare(picture(4, 30, 26, frames=5, fps=2.0))


@torch.inference_mode()
def test_replies_are_transformers_in_steps_that_cut_no_picture(theirs: Any, tmp_path: Any) -> None:
    shown = [(ONE,), (OTHER, LONG), (), (ONE, OTHER)]
    # A step takes little more than a picture, and encodes one.
    options = {"max_step_tokens": 11, "encoder_tokens": 9, "page_size": 4, "device": "cpu", "max_running": 2}
    with Engine(model=str(saved(theirs, tmp_path)), **options) as engine:
        media = [prepared(engine, each) for each in shown]
        ids = [[1, 2, *[START, 5, 6, 7] * len(each)] for each in shown]
        placed = [processor_of(engine).placed(one, own) for one, own in zip(ids, media, strict=True)]
        wanted = []
        for each, own in zip(placed, media, strict=True):
            given = told(each.ids, own)
            out = theirs.generate(**given, min_new_tokens=10, max_new_tokens=10, do_sample=False)
            wanted.append(out[0, len(each.ids) :].tolist())
        asked = list(zip(ids, shown, strict=True))
        assert len({tuple(reply) for reply in wanted}) >= 3
        assert [reply.ids for reply in ask_all(engine, asked, max_tokens=10)] == wanted
        assert [reply.ids for reply in ask_all(engine, asked, max_tokens=10)] == wanted
