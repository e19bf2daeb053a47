"""Pictures and clips of Qwen2.5-VL: any resolution, and rotary positions in time, height and width.

    frames ─ resize to multiples of 28 ─> patches of 14 x 14 x 2 frames ─ tower ─> one embedding for 2 x 2 patches

    positions    text 0 1 2 │ image of 2 x 3: time 3 3 3 3 3 3, height 3 3 3 4 4 4, width 3 4 5 3 4 5 │ text 6 7 …

Text after a medium goes on at one more than the largest position within. Frames of a clip are two a second, at least 4
and at most 768, and each has its share of a budget of pixels (qwen-vl-utils, and transformers' processor with
`cap_pixels_per_frame`, which it will have by default). A pair of frames is a slice: the tower sees it apart from the
others, as it sees a picture, which is a pair of the same frame.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.plugin import RequestError, Terms
from engine.plugin.media import Encode, Frames, Piece, Placed, Prepared, Slice, grow, slice_of, sliced
from engine_plugins.media.pictures import BICUBIC, CLIP, pixels_of, resized

COARSE = 256  # tokens of a picture of which the client wants few: 448 x 448 pixels, of Qwen3-VL 512 x 512
MOST_ASPECT = 200  # of the longer side to the shorter
FPS = 2.0


class Qwen25VL:
    """The processor of `Qwen2_5_VLForConditionalGeneration`."""

    usual = CLIP
    patch = 14
    image_pixels = (56 * 56, 28 * 28 * 1280)  # the fewest and the most that a picture is resized to
    clip_pixels = (128 * 28 * 28, 28 * 28 * 768)  # of a frame

    def __init__(self, config: Terms, processor: Terms, encode: Encode | None = None) -> None:
        self.image, self.video = processor.section("image_processor"), processor.section("video_processor")
        self.video = self.video or self.image  # older checkpoints say it once
        vision = config.section("vision_config")
        self.patch = vision.integer("patch_size", type(self).patch)
        self.step = vision.integer("temporal_patch_size", 2)  # frames that a patch holds
        self.merge = vision.integer("spatial_merge_size", 2)  # patches, along each side, that become one embedding
        self.per_second = vision.number("tokens_per_second", 4)
        image, video = config.integer("image_token_id", 151655), config.integer("video_token_id", 151656)
        self.ids = {"image": image, "video": video}
        self.encode = encode

    # ── from frames to pixels ────────────────────────────────────────────────────────────────

    def choose_frames(self, count: int, fps: float, duration: float, /) -> list[int]:
        wanted = self.video.number("fps", None) or FPS
        low, high = self.video.integer("min_frames", 4), self.video.integer("max_frames", 768)
        high = min(high, count) // self.step * self.step
        number = math.floor(min(max(count / fps * wanted, low), high, count) / self.step) * self.step
        if not number:
            raise RequestError(
                f"has too few frames ({count}) for the model, which takes at least {self.step}; send a longer video"
            )
        import torch  # as in transformers: others round some frames otherwise

        # rounding may add one that is just behind the last frame
        return [index for index in torch.arange(0, count, count / number).int().tolist() if index < count]

    def prepare(self, frames: Frames, /) -> Prepared:
        clip = bool(frames.times)
        terms = self.video if clip else self.image
        count, height, width = frames.pixels.shape[:3]
        sized = (
            self.size(count, height, width, terms) if clip else self.picture_size(height, width, terms, frames.coarse)
        )
        pixels = frames.pixels
        if terms.flag("do_resize", True):
            pixels = resized(pixels, *sized, terms.integer("resample", BICUBIC, low=0), clip=clip)
        if clip and (missing := -count % self.step):
            pixels = np.concatenate((pixels, np.repeat(pixels[-1:], missing, axis=0)))
        steps = max(1, len(pixels) // self.step)
        grid = (steps, pixels.shape[1] // self.patch, pixels.shape[2] // self.patch)
        if not clip:
            return sliced([self.slice(pixels, grid, terms)], grid)
        interval, groups = self.interval(frames), np.split(pixels, steps)
        slices = [self.slice(each, grid, terms, self.place(step, interval)) for step, each in enumerate(groups)]
        return sliced(slices, grid, "video", self.times(frames), interval)

    def slice(self, frames: NDArray[np.uint8], grid: tuple[int, ...], terms: Terms, place: bytes = b"") -> Slice:
        """A step of `grid`. Where all of its frames are the same, it is that picture."""
        if len(frames) > 1 and (frames[1:] == frames[0]).all():
            frames = frames[:1]
        made = pixels_of(frames, (1, *grid[1:]), terms, self.usual)
        return slice_of(made, math.prod(grid[1:]) // self.merge**2, place)

    def picture_size(self, height: int, width: int, terms: Terms, coarse: bool = False) -> tuple[int, int]:
        fewest, most = pixel_range(terms, self.image_pixels)
        if coarse:
            most = max(fewest, min(most, COARSE * (self.patch * self.merge) ** 2))
        return self.smart_size(height, width, fewest, most)

    def size(self, count: int, height: int, width: int, terms: Terms) -> tuple[int, int]:
        """Height and width that each of `count` frames is resized to."""
        fewest, most = pixel_range(self.video if self.video is not self.image else Terms(), self.clip_pixels)
        if terms.flag("cap_pixels_per_frame", True):
            factor = self.patch * self.merge
            budget = int(terms.integer("max_video_tokens", 128000) * factor * factor * 0.9)
            most = max(min(most, budget * self.step // count), int(fewest * 1.05))
        return self.smart_size(height, width, fewest, most)

    def smart_size(self, height: int, width: int, fewest: int, most: int, frames: int = 1) -> tuple[int, int]:
        """The multiples of a merged patch's side that are nearest to `height` and `width`, in the proportion of these,
        so that `frames` of them have `fewest` to `most` pixels. RequestError for a strip that is too narrow."""
        factor = self.patch * self.merge
        if max(height, width) > MOST_ASPECT * min(height, width):
            raise RequestError(
                f"is {width} × {height} pixels, and its longer side may have {MOST_ASPECT} times its shorter; cut it"
            )
        high, wide = (round(side / factor) * factor for side in (height, width))
        steps = round(frames / self.step) * self.step if frames > 1 else 1
        if steps * high * wide > most:
            shrink = math.sqrt(frames * height * width / most)
            high, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
        elif steps * high * wide < fewest:
            stretch = math.sqrt(fewest / (frames * height * width))
            high, wide = (math.ceil(side * stretch / factor) * factor for side in (height, width))
        return high, wide

    def times(self, frames: Frames) -> tuple[float, ...]:
        """The middle of each step, in seconds."""
        times = frames.times + frames.times[-1:] * (-len(frames.times) % self.step)
        return tuple((times[at] + times[at + self.step - 1]) / 2 for at in range(0, len(times), self.step))

    def interval(self, frames: Frames) -> float:
        """Seconds from one step to the next."""
        times = frames.times
        if frames.duration:
            return self.step * frames.duration / len(times)
        return self.step * (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else self.step / FPS

    # ── into a prompt ────────────────────────────────────────────────────────────────────────

    def placed(self, ids: list[int], media: Sequence[Prepared], /) -> Placed:
        made = grow(ids, media, {id: kind for kind, id in self.ids.items()}, self.pieces)
        if not media:
            return made
        spans = [(begin, count, grid, each) for each, own in zip(media, made.spans, strict=True)
                 for (begin, count), grid in zip(own, self.grids(each), strict=True)]  # fmt: skip
        positions = np.zeros((3, len(made.ids)), "<i4")
        at, place = 0, 0  # the first token without a position, and the next position
        for begin, count, (steps, high, wide), medium in spans:
            positions[:, at:begin] = np.arange(begin - at) + place
            place += begin - at
            within = np.indices((steps, high, wide)).reshape(3, -1)
            moments = np.array([self.moment(step, medium.interval) for step in range(steps)])
            within[0] = moments[within[0]]
            positions[:, begin : begin + count] = within + place
            place = self.after(place, positions[:, begin : begin + count], (steps, high, wide))
            at = begin + count
        positions[:, at:] = np.arange(len(made.ids) - at) + place
        return Placed(made.ids, made.runs, made.spans, positions.tobytes())

    def pieces(self, medium: Prepared) -> Iterable[Piece]:
        """What takes the place of a medium's placeholder."""
        return [Piece([self.ids[medium.kind]], medium.tokens)]

    def grids(self, medium: Prepared) -> list[tuple[int, int, int]]:
        """The embeddings of each of its spans, in time, height and width."""
        steps, high, wide = medium.grid
        return [(steps, high // self.merge, wide // self.merge)]

    def place(self, step: int, interval: float) -> bytes:
        """What the positions of a step follow from, beside what is before it. The first is placed as a picture is."""
        return self.moment(step, interval).to_bytes(8, "little") if step else b""

    def moment(self, step: int, interval: float) -> int:
        """How far a step of a clip is from the first one, in positions."""
        return int(step * (self.per_second * interval))

    def after(self, place: int, positions: np.ndarray, grid: tuple[int, int, int]) -> int:
        """The position of what comes after a span that begins at `place`."""
        return place + max(grid[1:])


def pixel_range(terms: Terms, usual: tuple[int, int]) -> tuple[int, int]:
    """The fewest and the most pixels: `size`, or the older `min_pixels` and `max_pixels`."""
    size = terms.section("size")
    low, high = (
        size.integer(name, each, high=1 << 40)
        for name, each in zip(("shortest_edge", "longest_edge"), usual, strict=True)
    )
    return terms.integer("min_pixels", low, high=1 << 40), terms.integer("max_pixels", high, high=1 << 40)
