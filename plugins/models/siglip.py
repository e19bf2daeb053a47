"""SigLIP's tower (arXiv:2303.15343): square pictures of one size, whose patches all see each other.

Module paths are the weights' names in checkpoints, below `vision_tower`. Left out: the head that pools a picture into
one vector, other sizes than the one that it was trained on.
"""

from typing import Any

from torch import Tensor, nn

from engine.plugin import Terms
from engine.plugin.layers import (
    Build,
    Embedding,
    LayerNorm,
    PatchEmbedding,
    Segments,
    VisionAttention,
    VisionBlock,
    VisionMLP,
    merged_patches,
)

BLOCK_NAMES = ("layer_norm1", "layer_norm2", "self_attn", "mlp")
# What checkpoints of language models with this tower call their parts, and what these are called here.
SIGLIP_NAMES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.", "vision_tower."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


class SiglipTower(nn.Module):
    """From pictures [n, size, size, 3], normalised, to [n, patches, hidden_size]."""

    def __init__(self, vision: Terms, build: Build) -> None:
        super().__init__()
        size, heads = vision.integer("hidden_size"), vision.integer("num_attention_heads")
        if size % heads:
            raise vision.wrong("num_attention_heads", f"a divisor of hidden_size, which is {size}")
        self.image_size, self.patch = vision.integer("image_size"), vision.integer("patch_size")
        self.side, self.width, self.device = self.image_size // self.patch, size, build.device
        epsilon = vision.number("layer_norm_eps", 1e-6)
        patch = PatchEmbedding(build, size, (3, self.patch, self.patch), bias=True)
        places = Embedding(build, self.side**2, size, divided=False)
        self.embeddings = nn.ModuleDict({"patch_embedding": patch, "position_embedding": places})
        inner, activation = vision.integer("intermediate_size"), vision.word("hidden_act", "gelu_pytorch_tanh")
        blocks = (
            VisionBlock(
                (LayerNorm(build, size, epsilon), LayerNorm(build, size, epsilon)),
                VisionAttention(build, size, heads, ("q_proj", "k_proj", "v_proj"), "out_proj"),
                VisionMLP(build, size, inner, activation, ("fc1", "fc2")),
                BLOCK_NAMES,
            )
            for _ in range(vision.integer("num_hidden_layers", high=4096))
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.post_layernorm = LayerNorm(build, size, epsilon)

    def forward(self, pictures: Tensor, normed: bool = True) -> Tensor:
        """With `normed` what the last norm makes of the last block's."""
        count = self.side**2
        hidden = self.embeddings["patch_embedding"](merged_patches(pictures, self.patch, 1, 1))
        places = self.embeddings["position_embedding"].weight
        hidden = (hidden.unflatten(0, (-1, count)) + places).flatten(0, 1)
        segments = Segments([count] * len(pictures), self.device)
        stream: Any = None
        for block in self.encoder["layers"].children():
            hidden, stream = block(hidden, stream, segments)
        hidden = self.post_layernorm.add(hidden, stream)[0] if normed else hidden + stream
        return hidden.unflatten(0, (-1, count))
