"""LLaVA-OneVision: the Qwen2 decoder, and SigLIP's tower over tiles of a picture, or frames of a clip.

    tiles ─ tower ─> 27 x 27 patches each ─ two matrices ─┬─ the first one, the whole picture
                                                          └─ the others, joined, padding cut off, each row ended
    frames ─ tower, two matrices ─> pooled to 14 x 14, each by itself; what ends a clip is a slice of its own

Left out: decoders of other families, features of several layers of the tower.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.plugin import Terms, language_terms
from engine.plugin.layers import Build, Elsewhere, Layer, VisionMLP, empty_weight, pictures_of
from engine.plugin.media import Pixels
from engine_plugins.models.qwen import Qwen
from engine_plugins.models.siglip import SIGLIP_NAMES, SiglipTower

# What stands second in the grid of what is no picture in tiles: of frames of a clip, and of a picture that is one tile
# alone. What ends a clip has no grid.
FRAMES, ALONE = 0, 1


class Newline(Layer):
    """What ends a row of a picture's patches."""

    def __init__(self, build: Build, size: int) -> None:
        super().__init__()
        self.weight = empty_weight(build, size)

    def names(self, path: str, parameter: str) -> list[tuple[str, str]]:
        return [(path, "")]


class LlavaOnevision(Qwen):
    """`LlavaOnevisionForConditionalGeneration` of Hugging Face."""

    sees = True
    vision_tower: Any
    multi_modal_projector: Any
    image_newline: Any
    renamed = (*SIGLIP_NAMES, ("model.image_newline", "image_newline"))

    def __init__(self, config: dict[str, Any], build: Build) -> None:
        terms = Terms.of(config)
        super().__init__(language_terms(terms), build)
        for name, known in (("vision_feature_layer", -1), ("vision_feature_select_strategy", "full")):
            if terms.get(name, known) != known:
                raise terms.wrong(name, f"{known}, which is all that this model class knows")
        activation = terms.word("projector_hidden_act", "gelu")
        parts: tuple[nn.Module, ...] = (Elsewhere(), Elsewhere(), Elsewhere())
        if 0 not in self.held:
            self.ignored = (*Qwen.ignored, "image_newline")
        if 0 in self.held:
            tower = SiglipTower(terms.section("vision_config"), build)
            names = ("linear_1", "linear_2")
            mlp = VisionMLP(build, tower.width, self.width, activation, names, self.width)
            parts = tower, mlp, Newline(build, self.width)
        self.vision_tower, self.multi_modal_projector, self.image_newline = parts

    def encode(self, media: Sequence[Pixels]) -> list[Tensor]:
        seen = [each for each in media if each.grid]
        parts: Iterator[Tensor] = iter(())
        if seen:
            patches = self.vision_tower(pictures_of(seen, self.device), normed=False)
            made = self.multi_modal_projector(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
            parts = iter(made.split([each.shape[0] for each in seen]))
        return [self._joined(next(parts), each.grid) if each.grid else self._newline[None] for each in media]

    @property
    def _newline(self) -> Tensor:
        """[H]"""
        newline: Tensor = self.image_newline.weight.to(self.dtype)
        return newline

    def _joined(self, tiles: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The embeddings [tokens, H] of one medium, from [tiles, patches, H]."""
        side, newline = self.vision_tower.side, self._newline
        if grid[1:] == (ALONE,):
            return torch.cat((tiles[0], newline[None]))
        squares = tiles.unflatten(1, (side, side))
        if grid[1:] == (FRAMES,):
            return _resampled(squares, self.pooled, self.pooled).flatten(0, 2)
        rows, columns, top, left, high, wide, *size = grid
        plane = squares[1:].unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        plane = plane[top : top + high, left : left + wide]
        if size != [high, wide]:
            plane = _resampled(plane[None], *size)[0]
        ended = torch.cat((plane, newline.expand(len(plane), 1, -1)), dim=1)
        return torch.cat((tiles[0], ended.flatten(0, 1)))

    @property
    def pooled(self) -> int:
        """Rows of the embeddings of a clip's frame."""
        return -(-int(self.vision_tower.side) // 2)

    def largest_medium(self, tokens: int) -> Pixels:
        """A clip: its frames are more tiles for as many embeddings than those of any picture."""
        size = self.vision_tower.image_size
        count = max(1, tokens // self.pooled**2)
        shape = (count, size, size, 3)
        return Pixels(bytes(count * size * size * 3), shape, (count, FRAMES), 1 / 255, (0.5,) * 3, (0.5,) * 3)


def _resampled(planes: Tensor, high: int, wide: int) -> Tensor:
    """[n, rows, columns, H] to [n, high, wide, H]."""
    return functional.interpolate(planes.permute(0, 3, 1, 2), (high, wide), mode="bilinear").permute(0, 2, 3, 1)
