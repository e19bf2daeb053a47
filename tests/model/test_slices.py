"""Slices of clips: what the towers encode apart, how often they do, and which keys their tokens have."""

import itertools
import time
from array import array
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from seeing import (
    IMAGE,
    VIDEO,
    Seen,
    ask,
    gemma3,
    llava_onevision,
    picture,
    pixels_of,
    prepared,
    processor_of,
    qwen2_5_vl,
    qwen3_vl,
    saved,
)
from test_vision_qwen import their_reply

from engine import Engine
from engine.cache.keys import keys_with
from engine.conversation.media import cut_spans, needs_of
from engine.media.frames import Frames
from engine.messages.assets import Bound
from engine.messages.media import MEDIA, MediaUse, Prepared, media_use, slices_of
from engine.plugin import Terms
from engine.plugin.testing import check_processor
from engine_plugins.media.gemma3 import Gemma3 as ProcessorGemma
from engine_plugins.media.llava_onevision import LlavaOnevision as ProcessorLlava
from engine_plugins.media.qwen2_5_vl import Qwen25VL as Processor25
from engine_plugins.media.qwen3_vl import Qwen3VL as Processor3
from engine_plugins.models.llava_onevision import LlavaOnevision
from engine_plugins.models.qwen2_5_vl import Qwen25VL
from engine_plugins.models.qwen3_vl import Qwen3VL

FAMILIES: dict[str, tuple[Callable[[], Any], type[Any], type[Any]]] = {
    "2.5": (qwen2_5_vl, Qwen25VL, Processor25),
    "3": (qwen3_vl, Qwen3VL, Processor3),
    "llava": (llava_onevision, LlavaOnevision, ProcessorLlava),
}
SIZE = {"size": {"shortest_edge": 64, "longest_edge": 1 << 16}}
PROCESSORS = {"image_processor": SIZE, "video_processor": {**SIZE, "cap_pixels_per_frame": False}}
FEW_PIXELS = {name: {"size": {"shortest_edge": 64, "longest_edge": 1 << 12}} for name in PROCESSORS}
SCENES = picture(1, 32, 24, frames=12, fps=2.0).pixels  # of which clips are made, in the size that they are seen in


def clip(*scenes: int) -> Frames:
    """A clip of these scenes, two a second."""
    pixels = SCENES[list(scenes)]
    return Frames(pixels, tuple(at / 2 for at in range(len(scenes))), bytes(32), len(scenes) / 2)


def still(scene: int) -> Frames:
    return Frames(SCENES[[scene]], (), bytes(32))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    make, ours, processor = FAMILIES[request.param]
    theirs = make()
    described = {} if request.param == "llava" else PROCESSORS
    return SimpleNamespace(theirs=theirs, seen=Seen(theirs, ours, processor, **described), name=request.param)


def digests(medium: Prepared) -> list[bytes]:
    return [each.digest for each in slices_of(medium)]


# ── what is encoded apart ────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def their_clip(family: Any, medium: Prepared) -> torch.Tensor:
    """The embeddings that transformers makes of a clip as a whole."""
    if family.name == "llava":
        from test_vision_llava import pixels

        found = family.theirs.model.get_video_features(pixels(medium)[None])
        return found.pooler_output[0]
    from test_vision_qwen import patches

    grids = torch.tensor([medium.grid])
    found = family.theirs.model.visual(patches(family, medium), grid_thw=grids)
    return torch.cat([found.pooler_output, *getattr(found, "deepstack_features", [])], dim=1)


@torch.inference_mode()
def test_slices_that_are_encoded_apart_are_transformers_whole_clip(family: Any) -> None:
    """Windows and attention end at a slice, in a size of several windows, whatever is encoded with it."""
    medium = family.seen.processor.prepare(picture(3, 72, 56, frames=5, fps=2.0))
    apart = [family.seen.model.encode([each])[0] for each in pixels_of(medium)]
    assert [len(each) for each in apart] == [each.tokens for each in slices_of(medium)] and len(apart) > 2
    wanted = their_clip(family, medium)
    torch.testing.assert_close(torch.cat(apart), wanted, atol=2e-4, rtol=0)
    mixed = pixels_of(family.seen.processor.prepare(picture(5, 40, 52))) + pixels_of(medium)[::-1]
    back = family.seen.model.encode(mixed)[:0:-1]
    torch.testing.assert_close(torch.cat(back), wanted, atol=2e-4, rtol=0)
    assert wanted.abs().max() > 1.0


@torch.inference_mode()
def test_as_many_embeddings_are_made_as_the_processor_says(family: Any) -> None:
    config, described = family.theirs.config.to_dict(), {} if family.name == "llava" else FEW_PIXELS
    places: dict[str, Any] = {"image": IMAGE, "video": VIDEO}
    places |= {"encode": lambda text: [ord(letter) % 80 for letter in text], "tower": family.seen.model.encode}
    check_processor(type(family.seen.processor), config, described, **places)


def test_a_slice_that_is_dropped_frees_its_memory(family: Any) -> None:
    medium = family.seen.processor.prepare(clip(0, 1, 2, 3))
    family.seen.admit([([1, VIDEO, 2], [medium])])
    held = list(family.seen.harness.runner.media._held.values())[-len(slices_of(medium)) :]
    assert [len(each) for each in held] == [each.tokens for each in slices_of(medium)]
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in held)


def test_what_was_seen_before_is_the_same_slice(family: Any) -> None:
    """Pairs of frames of Qwen, of which a picture is one, too; frames of LLaVA-OneVision, and what ends a clip."""
    known: set[bytes] = set()
    new = []
    for medium in (clip(0, 1, 2, 3, 4, 5), clip(2, 3, 4, 5, 6, 7), clip(0, 1, 2, 3), clip(8, 8, 8, 8), still(8)):
        own = digests(family.seen.processor.prepare(medium))
        new.append(len(set(own) - known))
        known.update(own)
    assert new == ([7, 2, 0, 1, 1] if family.name == "llava" else [3, 1, 0, 1, 0])


def test_a_picture_is_the_slice_whose_frame_is_shown_twice_for_want_of_another() -> None:
    processor = Processor25(Terms(qwen2_5_vl().config.to_dict()), Terms(PROCESSORS))
    assert digests(processor.prepare(clip(1, 2, 3)))[1:] == digests(processor.prepare(still(3)))


def test_a_crop_of_gemma_3_is_the_slice_that_it_is_as_a_picture() -> None:
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_min_ratio_to_activate": 1.5}
    processor = ProcessorGemma(Terms(gemma3().config.to_dict()), Terms({"image_processor": crops}))
    long = picture(3, 24, 100)
    whole, *parts = digests(processor.prepare(long))
    assert len({whole, *parts}) == 5
    assert [
        digests(processor.prepare(replace(long, pixels=each[None]))) for each in np.split(long.pixels[0], 4, 1)
    ] == [[each] for each in parts]


def test_other_normalising_is_another_slice() -> None:
    said = {**PROCESSORS, "video_processor": {**PROCESSORS["video_processor"], "image_mean": [0.1, 0.2, 0.3]}}
    processor = Processor25(Terms(qwen2_5_vl().config.to_dict()), Terms(said))
    assert digests(processor.prepare(still(3))) != digests(processor.prepare(clip(3, 3)))


# ── where they stand in prompts ──────────────────────────────────────────────────────────────

PLACES = {"2.5": Processor25, "3": Processor3, "llava": ProcessorLlava}
SHOWN = [
    *(still(scene) for scene in (0, 1)),
    *(clip(*scenes) for scenes in ((0, 0), (0, 0, 1, 1), (0, 0, 1, 1, 2, 3), (0, 0, 0, 0), (1, 1, 0, 0))),
    replace(clip(0, 0, 1, 1), times=(0.0, 0.01, 0.02, 0.03), duration=0.04),  # so fast that no position is between
    replace(clip(0, 0, 1, 1), times=(0.0, 2.0, 4.0, 6.0), duration=8.0),
    picture(7, 24, 32),
]
PIECES = st.lists(st.integers(-2, len(SHOWN) - 1), min_size=1, max_size=5)  # texts are below 0


class Placing:
    """The processor of a family, and what it makes of SHOWN."""

    def __init__(self, name: str) -> None:
        config = {"image_token_index": IMAGE, "video_token_index": VIDEO} | FAMILIES[name][0]().config.to_dict()
        described = {} if name == "llava" else PROCESSORS
        encode = lambda text: [ord(letter) % 80 for letter in text]  # noqa: E731
        self.processor = PLACES[name](Terms(config), Terms(described), encode)
        self.media = [self.processor.prepare(each) for each in SHOWN]

    def prompt(self, pieces: list[int]) -> tuple[list[int], list[Any]]:
        """Keys, and what the hidden state of each token follows from: an id or an embedding, and where it is placed."""
        media = [self.media[piece] for piece in pieces if piece >= 0]
        ids = [
            id for piece in pieces for id in ([3, 4] if piece == -2 else [5] if piece == -1 else [self.place(piece)])
        ]
        placed = self.processor.placed(ids, media)
        said: list[Any] = list(placed.ids)
        needs = needs_of(media, placed)
        assert len({need.content for need in needs}) == len(needs)
        for need in needs:
            for (begin, count), at in shown_in(media_use(Bound(MEDIA, 1, need.use))):
                said[begin : begin + count] = [(need.content, at + index) for index in range(count)]
        turned = np.frombuffer(placed.positions, "<i4").reshape(-1, len(said)) if placed.positions else []
        places = np.array([*turned] or [range(len(said))] * 3).T.tolist()
        return keys_with(array("i", placed.ids), placed.runs).tolist(), list(zip(said, places, strict=True))

    def place(self, piece: int) -> int:
        return IMAGE if self.media[piece].kind == "image" else VIDEO


def shown_in(use: MediaUse) -> Iterator[tuple[tuple[int, int], int]]:
    """The spans of a slice, and which of its embeddings is the first of each."""
    at = 0
    for begin, count in use.spans:
        yield (begin, count), at
        at = (at + count) % use.tokens


@pytest.fixture(scope="module", params=PLACES)
def placing(request: pytest.FixtureRequest) -> Placing:
    return Placing(request.param)


@settings(max_examples=100, deadline=None)
@given(common=PIECES, one=PIECES, other=PIECES)
def test_equal_keys_are_equal_embeddings_at_equal_positions(
    placing: Placing, common: list[int], one: list[int], other: list[int]
) -> None:
    (keys, said), (others, also) = placing.prompt(common + one), placing.prompt(common + other)
    same = next(
        (at for at, (a, b) in enumerate(zip(keys, others, strict=False)) if a != b), min(len(keys), len(others))
    )
    assert said[:same] == also[:same]


def test_clips_that_begin_alike_have_the_keys_of_it_in_common(placing: Placing) -> None:
    def common(one: int, other: int) -> int:
        """Tokens of the slices that two of SHOWN begin with alike."""
        pairs = zip(*(placing.prompt([-1, piece])[0] for piece in (one, other)), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)) - 1

    first, _, *_ = slices_of(placing.media[3])
    assert common(3, 4) >= 2 * first.tokens
    if isinstance(placing.processor, Processor25) and not isinstance(placing.processor, Processor3):
        assert common(3, 7) == common(3, 8) == first.tokens  # the second is placed elsewhere, as its time is another


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_spans_are_cut_where_slices_end(counts: list[int], sizes: list[int]) -> None:
    whole = sum(counts)
    sizes = [min(size, whole - sum(sizes[:at])) for at, size in enumerate(sizes) if sum(sizes[:at]) < whole]
    sizes.append(whole - sum(sizes))
    spans = tuple((100 * at, count) for at, count in enumerate(counts))
    cut = list(cut_spans(spans, sizes))
    assert [sum(count for _, count in own) for own in cut] == sizes
    places = [begin + at for own in cut for begin, count in own for at in range(count)]
    assert places == [begin + at for begin, count in spans for at in range(count)]


# ── through all rooms ────────────────────────────────────────────────────────────────────────


class Counted:
    """An engine, whose slices are counted."""

    def __init__(self, engine: Engine, family: Any) -> None:
        self.engine, self.family = engine, family
        self.made = self.shown = 0

    def ask(self, text: int, *shown: Frames) -> tuple[int, int]:
        """Shows media behind a text of that id: how many slices were encoded for it, and how many tokens cached."""
        ids = [1, text, 2, *[id for each in shown for id in (VIDEO if each.times else IMAGE, 7)]]
        media = prepared(self.engine, shown)
        placed = processor_of(self.engine).placed(ids, media)
        reply = ask(self.engine, ids, shown, max_tokens=2)
        assert reply.ids == their_reply(self.family, placed.ids, media, 2)
        deadline = time.monotonic() + 20
        while (stats := self.engine.stats()).running or stats.slices_shown_total == self.shown:
            assert time.monotonic() < deadline, "the last figures have not come"
            time.sleep(0.01)
        made, self.made, self.shown = (
            stats.slices_made_total - self.made,
            stats.slices_made_total,
            stats.slices_shown_total,
        )
        return made, reply.cached_tokens


@pytest.mark.parametrize("family", ["2.5"], indirect=True)
def test_each_slice_is_encoded_once_whatever_it_is_a_part_of(family: Any, tmp_path: Any) -> None:
    # Steps end within slices; a step encodes one, and there is room for some.
    tokens = 12
    options = {"max_step_tokens": 17, "encoder_tokens": tokens, "page_size": 4, "device": "cpu"}
    with Engine(model=str(saved(family.theirs, tmp_path, **PROCESSORS)), **options) as engine:
        counted = Counted(engine, family)
        assert {each.tokens for each in slices_of(prepared(engine, [clip(0, 1)])[0])} == {tokens}
        assert counted.ask(10, clip(0, 1, 2, 3, 4, 5)) == (3, 0)
        assert counted.ask(11, clip(0, 1, 2, 3, 4, 5))[0] == 0  # the same
        assert counted.ask(12, clip(2, 3, 4, 5, 6, 7))[0] == 1  # overlaps it
        assert counted.ask(13, clip(8, 8, 8, 8, 8, 8), clip(8, 8))[0] == 1  # stands still
        assert counted.ask(14, still(8), clip(0, 1, 8, 8), still(8))[0] == 0  # a key frame
        made, cached = counted.ask(10, clip(0, 1, 2, 3, 9, 9))  # begins as the first one does
        assert made == 1 and cached >= 2 * tokens
