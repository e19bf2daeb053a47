"""What models are built from. A model states its sharding through these layers and holds no rank arithmetic."""

from engine.kernels.experts.reference import ExpertWeights, Routed, Routing
from engine.layers.activation import gated_activation
from engine.layers.attention import Attention, AttentionBackend, AttentionShape, Backend, PagedAttention, Prefix
from engine.layers.batch import Batch, Mirror
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
from engine.layers.embedding import Embedding, LMHead
from engine.layers.encoder import Encoder
from engine.layers.latent import LatentBackend, LatentShape
from engine.layers.linear import ColumnLinear, QKVLinear, ReplicatedLinear, RowLinear
from engine.layers.mla import LatentAttention
from engine.layers.model import Elsewhere, Layer, Model, check_shape, empty_weight, put
from engine.layers.moe import Experts, Mixture, Router, SparseMLP
from engine.layers.norm import RMSNorm
from engine.layers.quantization import Quantized, QuantizedExperts, QuantizedLinear, Shard
from engine.layers.rotary import Rotary, rope_terms, rope_type, yarn_scale
from engine.layers.spread import over_copies

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
    "Elsewhere",
    "Embedding",
    "Encoder",
    "ExpertWeights",
    "Experts",
    "GatedMLP",
    "LMHead",
    "LatentAttention",
    "LatentBackend",
    "LatentShape",
    "Layer",
    "Mirror",
    "Mixture",
    "Model",
    "PagedAttention",
    "Prefix",
    "QKVLinear",
    "Quantized",
    "QuantizedExperts",
    "QuantizedLinear",
    "RMSNorm",
    "ReplicatedLinear",
    "Rotary",
    "Rotations",
    "Routed",
    "Router",
    "Routing",
    "RowLinear",
    "Scheme",
    "SelfAttention",
    "Shard",
    "SparseMLP",
    "check_shape",
    "empty_weight",
    "gated_activation",
    "over_copies",
    "put",
    "rope_terms",
    "rope_type",
    "yarn_scale",
]
