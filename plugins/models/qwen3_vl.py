"""Qwen3-VL: the Qwen3 decoder, dense or a mixture of experts, and a tower whose middle layers speak to its first layers
(DeepStack).

    patches ─ matrix ─(+ learned positions, resampled)─ blocks ─────────────────────> merged ─> embeddings
                                                          └ after some of them ──> merged ─> added behind a layer each

Every block sees whole pictures. The learned positions are a square grid, resampled to each picture's. Checkpoints of
the mixtures have the matrices of all experts of a layer in one tensor.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.plugin import ConfigError, LazyTensor, Terms, language_terms
from engine.plugin.layers import (
    Build,
    DecoderShape,
    Embedding,
    LayerNorm,
    PatchEmbedding,
    ReplicatedLinear,
    Segments,
    VisionAttention,
    VisionBlock,
    VisionMLP,
    block_places,
    experts_apart,
    grid_places,
    patches_of,
    runs_of,
    turned_by,
)
from engine.plugin.media import Pixels
from engine_plugins.models.qwen2_5_vl import BLOCK_NAMES, THETA, Qwen25VL
from engine_plugins.models.qwen3_moe import Qwen3Moe


class Merger(nn.Module):
    """Patches of a square become one embedding: normed apart, or `together`."""

    def __init__(self, build: Build, size: int, squared: int, out: int, *, together: bool) -> None:
        super().__init__()
        self.inner = size * squared
        self.together = together
        self.norm = LayerNorm(build, self.inner if together else size, 1e-6)
        self.linear_fc1 = ReplicatedLinear(build, self.inner, self.inner, bias=True)
        self.linear_fc2 = ReplicatedLinear(build, self.inner, out, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.norm(hidden.reshape(-1, self.inner) if self.together else hidden).reshape(-1, self.inner)
        return self.linear_fc2(nn.functional.gelu(self.linear_fc1(hidden)))


class Tower(nn.Module):
    """`visual` of Qwen3-VL."""

    def __init__(self, vision: Terms, build: Build, out: int) -> None:
        super().__init__()
        size, heads = vision.integer("hidden_size"), vision.integer("num_heads")
        if size % heads or (size // heads) % 4:
            raise vision.wrong("num_heads", f"a divisor of hidden_size, which is {size}, into heads of a multiple of 4")
        self.patch, self.steps = vision.integer("patch_size", 16), vision.integer("temporal_patch_size", 2)
        self.merge, self.head_dim = vision.integer("spatial_merge_size", 2), size // heads
        depth, places = vision.integer("depth", high=4096), vision.integer("num_position_embeddings", 2304)
        self.side = int(places**0.5)
        self.tapped = vision.integers("deepstack_visual_indexes", high=depth - 1)
        self.device, self.dtype = build.device, build.dtype
        patch = PatchEmbedding(build, size, (3, self.steps, self.patch, self.patch), bias=True)
        self.patch_embed = nn.ModuleDict({"proj": patch})
        self.pos_embed = Embedding(build, places, size, divided=False)
        inner, activation = vision.integer("intermediate_size"), vision.word("hidden_act", "gelu_pytorch_tanh")
        self.blocks = nn.ModuleList(
            VisionBlock(
                (LayerNorm(build, size, 1e-6), LayerNorm(build, size, 1e-6)),
                VisionAttention(build, size, heads),
                VisionMLP(build, size, inner, activation, ("linear_fc1", "linear_fc2")),
                BLOCK_NAMES,
            )
            for _ in range(depth)
        )
        merged = (build, size, self.merge**2, out)
        self.merger = Merger(*merged, together=False)
        self.deepstack_merger_list = nn.ModuleList(Merger(*merged, together=True) for _ in self.tapped)

    def forward(self, media: Sequence[Pixels]) -> Tensor:
        """The embeddings of all `media`, one after the other, those for later layers beside the first: [tokens, (1 +
        levels) * out]."""
        patches = patches_of(media, self.patch, self.steps, self.merge, self.device)
        grids = runs_of(media)
        hidden = self.patch_embed["proj"](patches)
        hidden = hidden + torch.cat([self.positions(*grid) for grid in grids]).to(hidden.dtype)
        by = turned_by(grid_places(grids, self.merge), self.head_dim, THETA, self.device)
        segments = Segments.of_frames(grids, self.device)
        levels: dict[int, Tensor] = {}
        stream: Any = None
        for index, block in enumerate(self.blocks):
            hidden, stream = block(hidden, stream, segments, by)
            if index in self.tapped:
                level = self.tapped.index(index)
                levels[level] = self.deepstack_merger_list[level](hidden + stream)
        return torch.cat([self.merger(hidden + stream), *(levels[level] for level in sorted(levels))], dim=1)

    def positions(self, steps: int, high: int, wide: int) -> Tensor:
        """The learned positions of the patches of a grid, in its order: [steps * high * wide, size] float32."""
        places = block_places(high, wide, self.merge)
        index = np.zeros((2, len(places), 2), np.int64)  # by axis: the two nearest of the learned ones, and
        weight = np.zeros((2, len(places), 2), np.float32)  # how much each counts
        for axis, size in enumerate((high, wide)):
            at = places[:, axis].astype(np.float32) * np.float32(self.side - 1) / np.float32(max(size - 1, 1))
            floor = np.floor(at)
            index[axis] = np.minimum(floor[:, None] + np.arange(2), self.side - 1)
            weight[axis] = np.maximum(1 - np.abs(at[:, None] - floor[:, None] - np.arange(2)), 0)
        four = torch.from_numpy(index[0][:, :, None] * self.side + index[1][:, None, :]).flatten(1).to(self.device)
        shares = torch.from_numpy(weight[0][:, :, None] * weight[1][:, None, :]).flatten(1).to(self.device)
        learned = self.pos_embed(four.flatten()).unflatten(0, four.shape)
        return (learned * shares[:, :, None]).sum(1).repeat(steps, 1)


class Qwen3VL(Qwen25VL):
    """`Qwen3VLForConditionalGeneration` of Hugging Face."""

    tower = Tower

    def __init__(self, config: dict[str, Any], build: Build) -> None:
        super().__init__(config, build)
        self.levels = len(Terms.of(config).section("vision_config").integers("deepstack_visual_indexes"))
        if 0 in self.held and self.held.stop < self.levels:
            raise ConfigError(
                f"the first stage of the pipeline has {self.held.stop} layers, and what is seen is added behind the "
                f"first {self.levels}; say a smaller --pp"
            )

    @staticmethod
    def language(terms: Terms) -> Terms:
        text = language_terms(terms)
        return Terms({**text, "model_type": "qwen3"}, text.source, text.within)


class Qwen3VLMoe(Qwen3VL):
    """`Qwen3VLMoeForConditionalGeneration` of Hugging Face, whose routers always weigh so that it sums to one."""

    def __init__(self, config: dict[str, Any], build: Build) -> None:
        super().__init__(config, build)
        self.shape = self.shape_of(Terms.of(config))

    @staticmethod
    def language(terms: Terms) -> Terms:
        text = language_terms(terms)
        return Terms({**text, "model_type": "qwen3_moe", "norm_topk_prob": True}, text.source, text.within)

    @staticmethod
    def shape_of(config: Terms) -> DecoderShape:
        return Qwen3Moe.shape_of(Qwen3VLMoe.language(config))

    def load(self, tensors: Iterable[tuple[str, LazyTensor]]) -> None:
        assert self.shape.mixture is not None, "a mixture of experts"
        mixture = self.shape.mixture
        super().load(experts_apart(tensors, mixture.routing.experts, self.shape.hidden_size, mixture.inner))
