"""What models are built from. A model states its sharding through these layers and holds no rank arithmetic."""

from engine.kernels.experts.reference import ExpertWeights, Routed, Routing
from engine.layers.activation import gated_activation
from engine.layers.apart import experts_apart
from engine.layers.attention import (
    Attention,
    AttentionBackend,
    AttentionShape,
    Backend,
    PagedAttention,
    Prefix,
    check_layout,
)
from engine.layers.batch import Batch, Media, Mirror, WholeSpan
from engine.layers.build import Build, Scheme
from engine.layers.decoder import (
    AttentionKind,
    Block,
    CausalLM,
    Decoder,
    DecoderShape,
    GatedMLP,
    Rotations,
    SelfAttention,
)
from engine.layers.delta import DeltaShape, GatedDeltaNet
from engine.layers.embedding import Embedding, LMHead
from engine.layers.encoder import Encoder
from engine.layers.latent import LatentBackend, LatentShape
from engine.layers.linear import ColumnLinear, QKVLinear, ReplicatedLinear, RowLinear
from engine.layers.mla import LatentAttention
from engine.layers.model import Elsewhere, Layer, Model, check_shape, empty_weight, put
from engine.layers.moe import Experts, Mixture, Router, SparseMLP
from engine.layers.norm import LayerNorm, RMSNorm
from engine.layers.pieces import Ranges, Rows, Stacks, beside, divided, one_after_the_other, rows_of
from engine.layers.quantization import Quantized, QuantizedExperts, QuantizedLinear, Shard
from engine.layers.rotary import Rotary, rope_terms, rope_type, yarn_scale
from engine.layers.spread import over_copies
from engine.layers.vision import (
    GatedVisionMLP,
    PatchEmbedding,
    Segments,
    Turn,
    VisionAttention,
    VisionBlock,
    VisionMLP,
    block_places,
    grid_places,
    merged_patches,
    normalised,
    patches_of,
    pictures_of,
    runs_of,
    turned_by,
    vision_activation,
)

__all__ = [
    "Attention",
    "AttentionBackend",
    "AttentionKind",
    "AttentionShape",
    "Backend",
    "Batch",
    "Block",
    "Build",
    "CausalLM",
    "ColumnLinear",
    "Decoder",
    "DecoderShape",
    "DeltaShape",
    "Elsewhere",
    "Embedding",
    "Encoder",
    "ExpertWeights",
    "Experts",
    "GatedDeltaNet",
    "GatedMLP",
    "GatedVisionMLP",
    "LMHead",
    "LatentAttention",
    "LatentBackend",
    "LatentShape",
    "Layer",
    "LayerNorm",
    "Media",
    "Mirror",
    "Mixture",
    "Model",
    "PagedAttention",
    "PatchEmbedding",
    "Prefix",
    "QKVLinear",
    "Quantized",
    "QuantizedExperts",
    "QuantizedLinear",
    "RMSNorm",
    "Ranges",
    "ReplicatedLinear",
    "Rotary",
    "Rotations",
    "Routed",
    "Router",
    "Routing",
    "RowLinear",
    "Rows",
    "Scheme",
    "Segments",
    "SelfAttention",
    "Shard",
    "SparseMLP",
    "Stacks",
    "Turn",
    "VisionAttention",
    "VisionBlock",
    "VisionMLP",
    "WholeSpan",
    "beside",
    "block_places",
    "check_layout",
    "check_shape",
    "divided",
    "empty_weight",
    "experts_apart",
    "gated_activation",
    "grid_places",
    "merged_patches",
    "normalised",
    "one_after_the_other",
    "over_copies",
    "patches_of",
    "pictures_of",
    "put",
    "rope_terms",
    "rope_type",
    "rows_of",
    "runs_of",
    "turned_by",
    "vision_activation",
    "yarn_scale",
]
