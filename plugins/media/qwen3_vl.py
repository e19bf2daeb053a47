"""Pictures and clips of Qwen3-VL: as Qwen2.5-VL's, but that a clip's steps stand apart in the prompt, each behind its
time as text.

    <0.3 seconds> [start] embeddings of a step [end] <0.8 seconds> [start] …

Each step is placed as a picture is. Frames are spread evenly from the first to the last, two a second, and all frames
of a clip together have a budget of pixels.
"""

from collections.abc import Iterable

import numpy as np

from engine.plugin import RequestError, Terms
from engine.plugin.media import Encode, Piece, Prepared
from engine_plugins.media.pictures import STANDARD
from engine_plugins.media.qwen2_5_vl import FPS, Qwen25VL, pixel_range


class Qwen3VL(Qwen25VL):
    """The processor of `Qwen3VLForConditionalGeneration`."""

    usual = STANDARD
    patch = 16
    image_pixels = (56 * 56, 28 * 28 * 1280)
    clip_pixels = (128 * 32 * 32, 32 * 32 * 768)  # of all frames together

    def __init__(self, config: Terms, processor: Terms, encode: Encode | None = None) -> None:
        super().__init__(config, processor, encode)
        self.start = config.integer("vision_start_token_id", 151652)
        self.end = config.integer("vision_end_token_id", 151653)

    def choose_frames(self, count: int, fps: float, duration: float, /) -> list[int]:
        wanted = self.video.number("fps", None) or FPS
        low, high = self.video.integer("min_frames", 4), self.video.integer("max_frames", 768)
        number = min(max(int(count / fps * wanted), low), high, count)
        if number < self.step:
            raise RequestError(
                f"has too few frames ({count}) for the model, which takes at least {self.step}; send a longer video"
            )
        return [int(index) for index in np.linspace(0, count - 1, number).round()]

    def size(self, count: int, height: int, width: int, terms: Terms) -> tuple[int, int]:
        factor = self.patch * self.merge
        fewest, most = pixel_range(self.video if self.video is not self.image else Terms(), self.clip_pixels)
        if terms.flag("cap_pixels_per_frame", True):
            frame = terms.integer("max_video_tokens", 768) * factor * factor
            most = max(min(frame, most // count), int(fewest * 1.05)) * count
        if min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        return self.smart_size(height, width, fewest, most, count)

    def pieces(self, medium: Prepared) -> Iterable[Piece]:
        if medium.kind == "image":
            yield from super().pieces(medium)
            return
        assert self.encode is not None, "a processor that places media encodes text"
        count = medium.tokens // medium.grid[0]
        for seconds in medium.times:
            yield Piece([*self.encode(f"<{seconds:.1f} seconds>"), self.start])
            yield Piece([self.ids["video"]], count)
            yield Piece([self.end])

    def grids(self, medium: Prepared) -> list[tuple[int, int, int]]:
        steps, high, wide = medium.grid
        return [(1, high // self.merge, wide // self.merge)] * steps

    def place(self, step: int, interval: float) -> bytes:
        return b""  # each step is placed as a picture is
