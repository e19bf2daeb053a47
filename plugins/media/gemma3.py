"""Pictures of Gemma 3: squares of one size, each of 256 tokens between two marks and empty lines.

    … \n\n [begin] 256 embeddings that see each other [end] \n\n …

A long picture may be shown in crops as well (pan and scan), if the checkpoint's processor says so and the client does
not want it coarse. Empty lines and those of the text around them are one token, as they are where the whole text is
tokenized at once. Left out: clips, which the family does not take.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.plugin import RequestError, Terms
from engine.plugin.media import Encode, Frames, Placed, Prepared, check_places, keys_of, slice_of, sliced
from engine_plugins.media.pictures import BILINEAR, STANDARD, pixels_of, resized

MOST_LINES = 32  # of a run of empty lines that may be one token


class Gemma3:
    """The processor of `Gemma3ForConditionalGeneration`."""

    def __init__(self, config: Terms, processor: Terms, encode: Encode | None = None) -> None:
        self.terms = processor.section("image_processor")
        size, usual = self.terms.section("size"), config.section("vision_config").integer("image_size", 896)
        self.size = size.integer("height", usual), size.integer("width", usual)
        self.tokens = config.integer("mm_tokens_per_image", 256)
        ids = (("image_token", 262144), ("boi_token", 255999), ("eoi_token", 256000))
        self.image, self.begin, self.end = (
            config.integer(f"{name}_id", None) or config.integer(f"{name}_index", usual) for name, usual in ids
        )
        self.encode = encode
        self._lines: Lines | None = None  # once they are asked for

    def choose_frames(self, count: int, fps: float, duration: float, /) -> list[int]:
        raise RequestError("is a video, and the model takes images alone; send some of its frames")

    def prepare(self, frames: Frames, /) -> Prepared:
        if frames.times:
            self.choose_frames(len(frames.times), 1.0, 1.0)
        scans = self.terms.flag("do_pan_and_scan") and not frames.coarse
        crops = [frames.pixels, *(self.crops(frames.pixels) if scans else [])]
        resample = self.terms.integer("resample", BILINEAR, low=0)
        squares = np.concatenate([resized(crop, *self.size, resample) for crop in crops])
        made = [pixels_of(square[None], (1,), self.terms, STANDARD) for square in squares]
        return sliced([slice_of(each, self.tokens) for each in made], (len(made),))

    def crops(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Parts of a long picture, in which it is shown once more; none of one that is nearly square."""
        height, width = pixels.shape[1:3]
        least = self.terms.integer("pan_and_scan_min_crop_size", 256)
        most = self.terms.integer("pan_and_scan_max_num_crops", 4)
        long, short = max(height, width), min(height, width)
        if long / short < self.terms.number("pan_and_scan_min_ratio_to_activate", 1.2):
            return []
        count = min(most, max(2, min(long // least, math.floor(long / short + 0.5))))
        size = math.ceil(long / count)
        if min(size, short) < least:
            return []
        cuts = [slice(size * index, size * (index + 1)) for index in range(count)]
        return [pixels[:, :, cut] if width >= height else pixels[:, cut] for cut in cuts]

    # ── into a prompt ────────────────────────────────────────────────────────────────────────

    def placed(self, ids: list[int], media: Sequence[Prepared], /) -> Placed:
        if not media:
            return Placed(ids)
        check_places(ids, media, {self.begin: "image"})
        text, left = Text(self.lines), iter(media)
        for id in ids:
            if id == self.begin:
                self._show(text, next(left).grid[0])
            else:
                text.add(id)
        starts = iter([at + 1 for at, id in enumerate(text.ids) if id == self.begin])
        runs, spans = [], []
        for medium in media:
            keys = keys_of(medium)
            begins = [next(starts) for _ in range(medium.grid[0])]
            spans.append(tuple((begin, self.tokens) for begin in begins))
            runs += [(begin, keys[self.tokens * crop : self.tokens * (crop + 1)]) for crop, begin in enumerate(begins)]
        return Placed(text.ids, runs, tuple(spans), whole=True)

    def _show(self, text: "Text", squares: int) -> None:
        """Write a picture, and its crops if there are `squares` but one."""
        square = [self.begin, *[self.image] * self.tokens, self.end]
        if squares > 1:
            text.write("Here is the original image ")
        for index in range(squares):
            if index:
                text.write(" and here are some crops to help you see better " if index == 1 else " ")
            text.write("\n\n")
            text.ids += square
            text.write("\n\n")

    @property
    def lines(self) -> "Lines":
        assert self.encode is not None, "a processor that places media encodes text"
        if self._lines is None:
            self._lines = Lines(self.encode)
        return self._lines


class Lines:
    """How runs of line ends are tokenized: of many, as one token."""

    def __init__(self, encode: Encode) -> None:
        self.encode = encode
        self.counts = {ids[0]: count for count in range(1, MOST_LINES) if len(ids := encode("\n" * count)) == 1}


class Text:
    """A prompt while it is put together. Line ends that are written beside others become what they are together."""

    def __init__(self, lines: Lines) -> None:
        self.ids: list[int] = []
        self._lines = lines
        self._written = False  # whether the last thing was written here, and not by the template

    def add(self, id: int) -> None:
        """A token of the template's."""
        count = self._lines.counts.get(id, 0)
        if count and self._written:
            self._end_lines(count)
        else:
            self.ids.append(id)
            self._written = False

    def write(self, text: str) -> None:
        if text.strip("\n"):
            self.ids += self._lines.encode(text)
        else:
            self._end_lines(len(text))
        self._written = True

    def _end_lines(self, count: int) -> None:
        """`count` line ends, and those that the text ends with already."""
        while self.ids and self.ids[-1] in self._lines.counts:
            count += self._lines.counts[self.ids.pop()]
        self.ids += self._lines.encode("\n" * count)
