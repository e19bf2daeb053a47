"""Qwen2.5-VL: the Qwen2 decoder, and a tower that sees pictures and clips at their own resolution.

    patches of 14 x 14 x 2 ─ matrix ─ blocks, most of them within windows of 8 x 8 patches ─ squares of 2 x 2 merged ─>

A frame pair of a clip is a picture of its own to the tower: patches of one see none of another. Module paths are the
weights' names in published checkpoints; those that transformers names otherwise are renamed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.plugin import Terms, language_terms
from engine.plugin.layers import (
    Build,
    CausalLM,
    Elsewhere,
    GatedVisionMLP,
    PatchEmbedding,
    ReplicatedLinear,
    RMSNorm,
    Segments,
    VisionAttention,
    VisionBlock,
    grid_places,
    patches_of,
    runs_of,
    turned_by,
)
from engine.plugin.media import Pixels
from engine_plugins.models.qwen import Qwen

BLOCK_NAMES = ("norm1", "norm2", "attn", "mlp")
THETA = 10000.0


class Merger(nn.Module):
    """Patches of a square become one embedding of the decoder's size."""

    def __init__(self, build: Build, size: int, squared: int, out: int) -> None:
        super().__init__()
        self.ln_q = RMSNorm(build, size, 1e-6)
        self.inner = size * squared
        layers = [ReplicatedLinear(build, self.inner, self.inner, bias=True), nn.GELU()]
        self.mlp = nn.Sequential(*layers, ReplicatedLinear(build, self.inner, out, bias=True))

    def forward(self, hidden: Tensor, stream: Tensor | None) -> Tensor:
        """Of the sum of both."""
        merged: Tensor = self.mlp(self.ln_q.add(hidden, stream)[0].reshape(-1, self.inner))
        return merged


class Tower(nn.Module):
    """`visual` of Qwen2.5-VL."""

    def __init__(self, vision: Terms, build: Build, out: int) -> None:
        super().__init__()
        size, heads = vision.integer("hidden_size"), vision.integer("num_heads")
        if size % heads or (size // heads) % 4:
            raise vision.wrong("num_heads", f"a divisor of hidden_size, which is {size}, into heads of a multiple of 4")
        self.patch, self.steps = vision.integer("patch_size", 14), vision.integer("temporal_patch_size", 2)
        self.merge, self.head_dim = vision.integer("spatial_merge_size", 2), size // heads
        self.window = vision.integer("window_size", 112) // self.merge // self.patch
        depth = vision.integer("depth", high=4096)
        self.full = frozenset(vision.integers("fullatt_block_indexes", high=depth) or (7, 15, 23, 31))
        self.device, self.dtype = build.device, build.dtype
        patch = PatchEmbedding(build, size, (3, self.steps, self.patch, self.patch), bias=False)
        self.patch_embed = nn.ModuleDict({"proj": patch})
        inner, activation = vision.integer("intermediate_size"), vision.word("hidden_act", "silu")
        self.blocks = nn.ModuleList(
            VisionBlock(
                (RMSNorm(build, size, 1e-6), RMSNorm(build, size, 1e-6)),
                VisionAttention(build, size, heads),
                GatedVisionMLP(build, size, inner, activation),
                BLOCK_NAMES,
            )
            for _ in range(depth)
        )
        self.merger = Merger(build, size, self.merge**2, out)

    def forward(self, media: Sequence[Pixels]) -> Tensor:
        """The embeddings of all `media`, one after the other: [tokens, out]."""
        patches = patches_of(media, self.patch, self.steps, self.merge, self.device)
        grids = runs_of(media)
        order, windows = windowed(grids, self.merge, self.window)
        squares = torch.from_numpy(order).to(self.device, non_blocking=True)
        back = torch.from_numpy(np.argsort(order)).to(self.device, non_blocking=True)
        places = grid_places(grids, self.merge).reshape(len(order), -1, 2)[order].reshape(-1, 2)
        hidden = self.patch_embed["proj"](patches)
        hidden = hidden.unflatten(0, (len(order), -1))[squares].flatten(0, 1)
        by = turned_by(places, self.head_dim, THETA, self.device)
        # Windows do not cross pictures, so that the patches of a picture stay together.
        whole = Segments.of_frames(grids, self.device)
        parts = Segments(windows, self.device)
        stream: Any = None
        for index, block in enumerate(self.blocks):
            hidden, stream = block(hidden, stream, whole if index in self.full else parts, by)
        merged: Tensor = self.merger(hidden, stream)[back]
        return merged


def windowed(grids: Sequence[tuple[int, ...]], merge: int, window: int) -> tuple[np.ndarray, list[int]]:
    """The squares of `merge` x `merge` patches of all grids (steps, high, wide), in the order of windows of `window` x
    `window` squares; and how many patches each window has."""
    orders, lengths, begun = [], [], 0
    for steps, high, wide in grids:
        rows, columns = high // merge, wide // merge
        numbers = np.arange(rows * columns).reshape(rows, columns)
        cuts = [
            numbers[top : top + window, left : left + window].ravel()
            for top in range(0, rows, window)
            for left in range(0, columns, window)
        ]
        for _ in range(steps):
            orders += [cut + begun for cut in cuts]
            lengths += [len(cut) * merge**2 for cut in cuts]
            begun += rows * columns
    return np.concatenate(orders), lengths


class SeesPatches(CausalLM):
    """A decoder with a tower: `visual` in checkpoints. A family names its `tower`, and what says how the decoder's part
    of config.json reads."""

    turns = True
    sees = True
    tower: type[Any]
    renamed = (("model.language_model.", "model."), ("model.visual.", "visual."))

    def __init__(self, config: dict[str, Any], build: Build) -> None:
        terms = Terms.of(config)
        super().__init__(self.language(terms), build)
        self.visual: Any = (
            self.tower(terms.section("vision_config"), build, self.width) if 0 in self.held else Elsewhere()
        )

    @staticmethod
    def language(terms: Terms) -> Terms:
        """What it says of the decoder, as if there were nothing else."""
        return language_terms(terms)

    def encode(self, media: Sequence[Pixels]) -> list[Tensor]:
        merged = self.visual(media)
        sizes = [int(np.prod(each.grid)) // self.visual.merge**2 for each in media]
        return list(merged.split(sizes))

    def largest_medium(self, tokens: int) -> Pixels:
        side = self.visual.merge * self.visual.patch
        high = max(1, int(tokens**0.5))
        shape = (self.visual.steps, high * side, tokens // high * side, 3)
        grid = (1, high * self.visual.merge, tokens // high * self.visual.merge)
        return Pixels(bytes(int(np.prod(shape))), shape, grid, 1 / 255, (0.5,) * 3, (0.5,) * 3)


class Qwen25VL(SeesPatches, Qwen):
    """`Qwen2_5_VLForConditionalGeneration` of Hugging Face."""

    tower = Tower

    @staticmethod
    def language(terms: Terms) -> Terms:
        text = language_terms(terms)
        return Terms({**text, "model_type": "qwen2"}, text.source, text.within)
