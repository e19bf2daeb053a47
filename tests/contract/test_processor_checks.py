"""Our processors of media keep their contract, and the check finds those that do not."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from engine.conversation.media import Encode, Piece, Placed, grow
from engine.media.frames import Frames
from engine.messages.media import Pixels, Prepared, packed
from engine.plugin import RequestError, Terms
from engine.plugin.testing import check_processor
from engine_plugins.media.gemma3 import Gemma3
from engine_plugins.media.llava_onevision import LlavaOnevision
from engine_plugins.media.qwen2_5_vl import Qwen25VL
from engine_plugins.media.qwen3_vl import Qwen3VL

IMAGE, VIDEO, BEGIN, END = 90, 91, 92, 93
QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
QWEN |= {"vision_config": {"patch_size": 4}}  # type: ignore[dict-item]
QWEN_SIZES = {
    "image_processor": {"min_pixels": 64, "max_pixels": 6400},
    "video_processor": {"size": {"shortest_edge": 64, "longest_edge": 6400}},
}
GEMMA = {"image_token_id": IMAGE, "boi_token_id": BEGIN, "eoi_token_id": END, "mm_tokens_per_image": 4}
GEMMA |= {"vision_config": {"image_size": 16}}  # type: ignore[dict-item]
SCANS = {"image_processor": {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}}
LLAVA = {
    "image_token_index": IMAGE,
    "video_token_index": VIDEO,
    "vision_config": {"image_size": 20, "patch_size": 4},
    "image_grid_pinpoints": [[20 * high, 20 * wide] for high in (1, 2, 3) for wide in (1, 2, 3)],
}


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize(
    ("kind", "config", "described", "places"),
    [
        (Qwen25VL, QWEN, QWEN_SIZES, {"image": IMAGE, "video": VIDEO}),
        (Qwen3VL, QWEN, QWEN_SIZES, {"image": IMAGE, "video": VIDEO}),
        (Gemma3, GEMMA, {}, {"image": BEGIN}),
        (Gemma3, GEMMA, SCANS, {"image": BEGIN}),
        (LlavaOnevision, LLAVA, {}, {"image": IMAGE, "video": VIDEO}),
    ],
    ids=["qwen2.5", "qwen3", "gemma3", "gemma3 with crops", "llava"],
)
def test_ours(kind: Any, config: Any, described: Any, places: dict[str, int]) -> None:
    check_processor(kind, config, described, encode=encode, **places)


# ── others ───────────────────────────────────────────────────────────────────────────────────


class Right:
    """An embedding for each started 32 rows of a picture, or one if it is coarse; for each frame of a clip, one."""

    def __init__(self, config: Terms, processor: Terms, encode: Encode | None = None) -> None:
        self.encode = encode

    def choose_frames(self, count: int, fps: float, duration: float, /) -> list[int]:
        if count < 3:
            raise RequestError(f"has too few frames ({count}); send a longer video")
        return list(range(0, count, 2))

    def prepare(self, frames: Frames, /) -> Prepared:
        tokens = len(frames.pixels) if frames.times else 1 if frames.coarse else -(-frames.pixels.shape[1] // 32)
        small = np.ascontiguousarray(frames.pixels[:, ::16, ::16])
        pixels = Pixels(small.tobytes(), small.shape, (tokens,), 1 / 255, (0.5,) * 3, (0.5,) * 3)
        kind = "video" if frames.times else "image"
        return Prepared(packed(pixels), (tokens,), tokens, self.digest(frames), kind, frames.times)

    def digest(self, frames: Frames) -> bytes:
        return hashlib.sha256(frames.digest + bytes([frames.coarse])).digest()

    def placed(self, ids: list[int], media: Sequence[Prepared], /) -> Placed:
        if len([id for id in ids if id in (IMAGE, VIDEO)]) != len(media):
            raise RequestError("the prompt has other places")
        return grow(ids, media, {IMAGE: "image", VIDEO: "video"}, self.pieces)

    def pieces(self, medium: Prepared) -> Iterable[Piece]:
        return [Piece([BEGIN]), Piece([IMAGE], medium.tokens), Piece([END])]


def tower(media: list[Pixels]) -> list[list[float]]:
    return [[0.0] * each.grid[0] for each in media]


def test_a_right_one_passes() -> None:
    check_processor(Right, {}, {}, image=IMAGE, video=VIDEO, tower=tower)


class Careless(Right):
    def digest(self, frames: Frames) -> bytes:
        return frames.digest  # coarse or not


class Drifting(Right):
    def prepare(self, frames: Frames, /) -> Prepared:
        self.calls = getattr(self, "calls", 0) + 1
        return replace(super().prepare(frames), interval=float(self.calls))


class Generous(Right):
    """To coarse pictures."""

    def prepare(self, frames: Frames, /) -> Prepared:
        return super().prepare(replace(frames, coarse=not frames.coarse))


class Painting(Right):
    def prepare(self, frames: Frames, /) -> Prepared:
        frames.pixels[0, 0, 0, 0] ^= 1
        return super().prepare(frames)


class Rigid(Right):
    def prepare(self, frames: Frames, /) -> Prepared:
        if frames.pixels.shape[1] % 2:
            raise ValueError("an odd height")
        return super().prepare(frames)


class Cut(Right):
    def prepare(self, frames: Frames, /) -> Prepared:
        medium = super().prepare(frames)
        pixels = Pixels(b"\0" * 10, (1, 2, 2, 3), medium.grid, 1.0, (0.0,) * 3, (1.0,) * 3)
        return replace(medium, payload=packed(pixels))


class Blind(Right):
    def prepare(self, frames: Frames, /) -> Prepared:
        return replace(super().prepare(frames), kind="image")


class Beyond(Right):
    def choose_frames(self, count: int, fps: float, duration: float, /) -> list[int]:
        return [0, count]


class Narrow(Right):
    """Spans of one embedding less than there are."""

    def placed(self, ids: list[int], media: Sequence[Prepared], /) -> Placed:
        made = super().placed(ids, media)
        return replace(made, spans=tuple(((own[0][0], own[0][1] - 1),) for own in made.spans))


class Keyless(Right):
    """A picture is known by its placeholders."""

    def placed(self, ids: list[int], media: Sequence[Prepared], /) -> Placed:
        return replace(super().placed(ids, media), runs=())


class Lenient(Right):
    """Shows what it has a place for."""

    def placed(self, ids: list[int], media: Sequence[Prepared], /) -> Placed:
        return super().placed(ids, media[: sum(id in (IMAGE, VIDEO) for id in ids)])


class Reversed(Right):
    """Positions count from the end."""

    def placed(self, ids: list[int], media: Sequence[Prepared], /) -> Placed:
        made = super().placed(ids, media)
        places = np.broadcast_to(np.arange(len(made.ids), 0, -1, "<i4"), (3, len(made.ids)))
        return replace(made, positions=places.tobytes())


class Short(Reversed):
    def placed(self, ids: list[int], media: Sequence[Prepared], /) -> Placed:
        made = super().placed(ids, media)
        return replace(made, positions=made.positions[4:])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Careless, "two media with different pixels, grids or tokens have the digest"),
        (Drifting, "prepare of .1, 224, 224, 3. differs from one call to the next"),
        (Generous, "a picture of .224, 224. takes 1 tokens, and 7 where it is coarse"),
        (Painting, "prepare of .1, 224, 224, 3. writes into the frames"),
        (Rigid, "prepare of .1, 1, 1, 3. raises ValueError: an odd height; only RequestError refuses"),
        (Cut, "has 10 bytes of pixels of .1, 2, 2, 3.: 12"),
        (Blind, "has the kind 'image', and is of a video"),
        (Beyond, r"choose_frames of 48 frames gives \[0, 48\]; it gives numbers below 48"),
        (Narrow, r"spans have room for \[\[6\]\] embeddings, and the media have \[7\]"),
        (Keyless, "runs have keys for 0 tokens, and spans have 7 tokens"),
        (Lenient, r"placed puts 1 media into \[1000, 1001\]"),
        (Reversed, "the positions of text differ by axis, or do not ascend"),
        (Short, "positions have .* bytes; 3 numbers of 4 bytes for .* ids are"),
    ],
)
def test_a_wrong_one_is_found(wrong: Any, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_processor(wrong, {}, {}, image=IMAGE, video=VIDEO)


def test_a_tower_that_makes_others_than_are_said_is_found() -> None:
    with pytest.raises(AssertionError, match=r"encode makes .* embeddings of slices that are said to have"):
        check_processor(Right, {}, {}, image=IMAGE, video=VIDEO, tower=lambda media: [[0.0] for _ in media])


def test_one_without_clips_refuses_them() -> None:
    with pytest.raises(AssertionError, match=r"choose_frames gives .*; a processor without clips"):
        check_processor(Right, {}, {}, image=IMAGE)
