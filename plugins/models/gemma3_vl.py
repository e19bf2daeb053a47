"""Gemma 3 that sees: its decoder, and SigLIP's tower.

    picture ─ tower ─> 64 x 64 patches ─ mean of squares ─> 16 x 16 ─ norm ─ matrix ─> 256 embeddings

The tokens of a picture see each other. What published checkpoints call `language_model.model` is `model` here, as in
the models that read text alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.plugin import Terms, language_terms
from engine.plugin.layers import Build, Elsewhere, Layer, RMSNorm, check_layout, empty_weight, pictures_of
from engine.plugin.media import Pixels
from engine_plugins.models.gemma import Gemma3
from engine_plugins.models.siglip import SIGLIP_NAMES, SiglipTower


class Projector(Layer):
    """Patches of a picture become embeddings."""

    def __init__(self, config: Terms, vision: Terms, build: Build, side: int, out: int) -> None:
        super().__init__()
        size, tokens = vision.integer("hidden_size"), config.integer("mm_tokens_per_image", 256)
        self.side, self.kernel = side, side // int(tokens**0.5)
        self.mm_input_projection_weight = empty_weight(build, size, out)
        self.mm_soft_emb_norm = RMSNorm(build, size, vision.number("layer_norm_eps", 1e-6), 1.0)

    def forward(self, patches: Tensor) -> Tensor:
        """[n, side * side, size] to [n, tokens, out]."""
        plane = patches.transpose(1, 2).unflatten(2, (self.side, self.side))
        pooled = functional.avg_pool2d(plane, self.kernel, self.kernel).flatten(2).transpose(1, 2)
        return torch.matmul(self.mm_soft_emb_norm(pooled.contiguous()), self.mm_input_projection_weight)


class Gemma3VL(Gemma3):
    """`Gemma3ForConditionalGeneration` of Hugging Face."""

    sees = True
    vision_tower: Any
    multi_modal_projector: Any
    renamed = SIGLIP_NAMES

    def __init__(self, config: dict[str, Any], build: Build) -> None:
        terms = Terms.of(config)
        super().__init__(language_terms(terms), build)
        vision = terms.section("vision_config")
        self.tokens = terms.integer("mm_tokens_per_image", 256)
        parts: tuple[nn.Module, ...] = (Elsewhere(), Elsewhere())
        if 0 in self.held:
            tower = SiglipTower(vision, build)
            parts = tower, Projector(terms, vision, build, tower.side, self.width)
        self.vision_tower, self.multi_modal_projector = parts
        for backend in self.backends:
            check_layout(backend)

    def encode(self, media: Sequence[Pixels]) -> list[Tensor]:
        pictures = pictures_of(media, self.device)
        made = self.multi_modal_projector(self.vision_tower(pictures))
        return [each.flatten(0, 1) for each in made.split([each.shape[0] for each in media])]

    def largest_medium(self, tokens: int) -> Pixels:
        count, size = max(1, tokens // self.tokens), self.vision_tower.image_size
        shape = (count, size, size, 3)
        return Pixels(bytes(count * size * size * 3), shape, (count,), 1 / 255, (0.5,) * 3, (0.5,) * 3)
