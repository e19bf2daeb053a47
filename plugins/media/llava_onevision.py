"""Pictures and clips of LLaVA-OneVision: a picture whole and in tiles of the tower's size, a clip as pooled frames.

    picture ─┬─ squeezed into a square ──────────────────────────────────────> 27 x 27 embeddings
             └─ resized into the grid of tiles that fits it best, padded ─ cut ─> rows of what is not padding,
                                                                                each ended by one for a new line

Of a large picture the rows are resampled, so that they are at most those of nine tiles (`anyres_max_9`). A coarse one
is the square alone, ended by one embedding for a new line, as transformers has one of several where images are given in
nested lists. A clip's frame is a slice, and so is the embedding that ends a clip; a picture, whose tiles are joined, is
one. Left out: to see others so; to have the tower look once at a picture that is a frame, too, which is not pooled.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.plugin import ConfigError, RequestError, Terms
from engine.plugin.media import Encode, Frames, Piece, Placed, Prepared, grow, slice_of, sliced
from engine_plugins.media.pictures import BICUBIC, CLIP, pixels_of, resized

FRAMES = 32  # of a clip, if the processor does not say how many
# Grids of what is no picture in tiles, as the model knows them: a clip's frame, what ends a clip, one tile alone.
FRAME, END, ALONE = (1, 0), (), (1, 1)
Grid = tuple[int, int]


class LlavaOnevision:
    """The processor of `LlavaOnevisionForConditionalGeneration`."""

    def __init__(self, config: Terms, processor: Terms, encode: Encode | None = None) -> None:
        self.image, self.video = processor.section("image_processor"), processor.section("video_processor")
        vision = config.section("vision_config")
        self.size = vision.integer("image_size", 384)
        self.side = self.size // vision.integer("patch_size", 14)
        self.tiles = int(config.word("vision_aspect_ratio", "anyres_max_9").removeprefix("anyres_max_"))
        self.grids = pinpoints(config, self.size)
        self.ids = {"image": config.integer("image_token_index", 151646)}
        self.ids["video"] = config.integer("video_token_index", 151647)

    def choose_frames(self, count: int, fps: float, duration: float, /) -> list[int]:
        number = min(self.video.integer("num_frames", FRAMES), count)
        return [index * count // number for index in range(number)]

    def prepare(self, frames: Frames, /) -> Prepared:
        clip = bool(frames.times)
        terms = self.video if clip else self.image
        resample = terms.integer("resample", BICUBIC, low=0)
        height, width = frames.pixels.shape[1:3]
        tiles = resized(frames.pixels, self.size, self.size, resample, clip=clip)
        if clip:
            made = [pixels_of(tile[None], FRAME, terms, CLIP) for tile in tiles]
            slices = [slice_of(each, math.ceil(self.side / 2) ** 2) for each in made]
            end = slice_of(pixels_of(tiles[:0], END, terms, CLIP), 1)
            return sliced([*slices, end], (len(tiles),), "video")
        grid: tuple[int, ...] = ALONE
        tokens = self.side**2 + 1
        if not frames.coarse:
            rows, columns = best_grid(height, width, self.grids)
            tiles = np.concatenate((tiles, self.cut(frames.pixels, rows, columns, resample)))
            rows, columns = rows // self.size, columns // self.size
            part = unpadded(rows * self.side, columns * self.side, height, width)
            high, wide = fewer(*part[2:], self.side, self.tiles)
            grid = (rows, columns, *part, high, wide)
            tokens = self.side**2 + high * (wide + 1)
        return sliced([slice_of(pixels_of(tiles, grid, terms, CLIP), tokens)], grid)

    def cut(self, pixels: NDArray[np.uint8], height: int, width: int, resample: int) -> NDArray[np.uint8]:
        """The tiles [n, size, size, 3] of a picture that is resized into `height` x `width`, in the middle of black."""
        high, wide = pixels.shape[1:3]
        across, down = width / wide, height / high
        if across < down:
            new = min(math.ceil(high * across), height), width
        else:
            new = height, min(math.ceil(wide * down), width)
        canvas = np.zeros((height, width, 3), np.uint8)
        top, left = (height - new[0]) // 2, (width - new[1]) // 2
        canvas[top : top + new[0], left : left + new[1]] = resized(pixels, *new, resample)[0]
        tiles = canvas.reshape(height // self.size, self.size, width // self.size, self.size, 3)
        return tiles.transpose(0, 2, 1, 3, 4).reshape(-1, self.size, self.size, 3)

    def placed(self, ids: list[int], media: Sequence[Prepared], /) -> Placed:
        return grow(ids, media, {id: kind for kind, id in self.ids.items()}, self.pieces)

    def pieces(self, medium: Prepared) -> Iterable[Piece]:
        return [Piece([self.ids[medium.kind]], medium.tokens)]


def pinpoints(config: Terms, size: int) -> list[Grid]:
    """The sizes, in pixels, that a picture may be resized into. Raises ConfigError for what are no whole tiles."""
    found = config.get("image_grid_pinpoints")
    if found is None:
        return [(high * size, wide * size) for high in range(1, 7) for wide in range(1, 7)]
    if not all(isinstance(each, list | tuple) and len(each) == 2 for each in found):
        raise config.wrong("image_grid_pinpoints", "a list of pairs, height and width in pixels")
    for high, wide in found:
        if type(high) is not int or type(wide) is not int or high % size or wide % size or not high * wide:
            raise ConfigError(
                f"image_grid_pinpoints has {[high, wide]} in {config.source}; it must have multiples of the tower's "
                f"image_size, which is {size}"
            )
    return [(high, wide) for high, wide in found]


def best_grid(height: int, width: int, grids: Sequence[Grid]) -> Grid:
    """That of `grids` in which a picture keeps most of its pixels, and of those the one with the least padding."""

    def worth(grid: Grid) -> tuple[int, int]:
        high, wide = grid
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - high * wide

    best = max(grids, key=worth)
    if not worth(best)[0]:
        raise RequestError(f"is {width} × {height} pixels, which is too narrow for the model; cut it")
    return best


def unpadded(high: int, wide: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Of `high` x `wide` patches, in which a picture of `height` x `width` pixels lies in the middle: its first row and
    column, and how many it has."""
    if width / height > wide / high:
        top = (high - int(round(height * (wide / width), 7))) // 2
        return top, 0, high - 2 * top, wide
    left = (wide - int(round(width * (high / height), 7))) // 2
    return 0, left, high, wide - 2 * left


def fewer(high: int, wide: int, side: int, tiles: int) -> Grid:
    """Rows and columns of patches, so that they are about those of so many tiles at most."""
    ratio = math.sqrt(high * wide / (tiles * side**2))
    return (int(high // ratio), int(wide // ratio)) if ratio > 1.1 else (high, wide)
