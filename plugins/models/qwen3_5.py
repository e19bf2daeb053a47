"""Qwen3.5, dense or a mixture of experts, with its tower or without, and Qwen3-Next, which came before it.

    ─┬─ norm ─ gated delta net, or in each fourth layer gated attention ─(+)─┬─ norm ─ MLP or mixture ─(+)─
     └───────────────────────────────────────────────────────────────────────┘  └─────────────────────┘

Norms multiply by 1 + weight. Attention rotates a quarter of a head, by three positions where the model sees. The tower
is Qwen3-VL's without DeepStack. Checkpoints stack what heads divide: each head's queries and gates, the projections of
the delta nets (Qwen3-Next stacks them head by head), and in some checkpoints all experts. Left out: the layer that
predicts further tokens (`mtp`), whose weights are passed over.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from engine.plugin import MANY, LazyTensor, Terms
from engine.plugin.layers import (
    AttentionKind,
    Build,
    CausalLM,
    DecoderShape,
    DeltaShape,
    GatedDeltaNet,
    Mixture,
    Ranges,
    Routing,
    Stacks,
    experts_apart,
    one_after_the_other,
    rope_terms,
)
from engine_plugins.models.qwen2_5_vl import SeesPatches
from engine_plugins.models.qwen3_vl import Tower

NEXT = "qwen3_next"  # the model_type of Qwen3-Next
LINEAR, FULL = "linear_attention", "full_attention"
SECTIONS = [11, 11, 10]  # of the rotated pairs of a head: by time, height and width


class Qwen35(CausalLM):
    """`Qwen3_5ForCausalLM`, `Qwen3_5MoeForCausalLM` and `Qwen3NextForCausalLM` of Hugging Face."""

    most_graph_tokens = 0  # a prompt is cut into chunks by what the host knows of it
    renamed = (("model.language_model.", "model."),)
    unused: tuple[str, ...] = ("mtp.", "model.visual.")

    def __init__(self, config: dict[str, Any], build: Build) -> None:
        super().__init__(config, build)
        terms = Terms.of(config)
        self.shape = self.shape_of(terms)
        self.stacked = stacked_parts(terms, self.shape)

    @staticmethod
    def shape_of(config: Terms) -> DecoderShape:
        if config.word("hidden_act", "silu") != "silu":
            raise config.wrong("hidden_act", "silu, which the gated delta net is written for")
        mixture = mixture_of(config)
        inner = config.integer("intermediate_size", mixture.inner if mixture else None)
        bias = config.flag("attention_bias")
        return DecoderShape.of(
            Terms({**config, "intermediate_size": inner}, config.source, config.within),
            head_dim=config.integer("head_dim", 256),
            kinds=(AttentionKind(rope=rope_of(config)),),
            layers=tuple(0 if kind == FULL else None for kind in layer_types(config)),
            qkv_bias=bias,
            output_bias=bias,
            head_norms=True,
            gated=True,
            norm_offset=1.0,
            mixture=mixture,
        )

    def attention(self, config: Terms, shape: DecoderShape, build: Build) -> dict[int, nn.Module]:
        made = super().attention(config, shape, build)
        delta = delta_shape(config)
        others = [layer for layer in self.held if layer not in made]
        self.states = delta.states(build, len(others))
        nets = {layer: GatedDeltaNet(delta, build, place, summed=shape.summed) for place, layer in enumerate(others)}
        return made | nets

    # ── loading ──────────────────────────────────────────────────────────────────────────────

    def load(self, tensors: Iterable[tuple[str, LazyTensor]]) -> None:
        used: Iterable[tuple[str, LazyTensor]] = (
            (name, tensor) for name, tensor in tensors if not name.startswith(self.unused)
        )
        if (mixture := self.shape.mixture) is not None:
            used = experts_apart(used, mixture.routing.experts, self.shape.hidden_size, mixture.inner)
        super().load(used)


class Qwen35VL(SeesPatches, Qwen35):
    """`Qwen3_5ForConditionalGeneration` and `Qwen3_5MoeForConditionalGeneration` of Hugging Face."""

    tower = Tower
    renamed = SeesPatches.renamed
    unused = ("mtp.",)

    def __init__(self, config: dict[str, Any], build: Build) -> None:
        vision = Terms.of(config).section("vision_config")
        if vision.integers("deepstack_visual_indexes"):
            raise vision.wrong("deepstack_visual_indexes", "empty: Qwen3.5's tower has no DeepStack")
        super().__init__(config, build)

    @staticmethod
    def shape_of(config: Terms) -> DecoderShape:
        return replace(Qwen35.shape_of(config), kinds=(AttentionKind(rope=rope_of(config, turning=True)),))


def layer_types(config: Terms) -> tuple[str, ...]:
    """What each layer mixes tokens with. Raises ConfigError for what is neither of the two."""
    count = config.integer("num_hidden_layers", high=MANY)
    every = config.integer("full_attention_interval", 4)
    types = config.words("layer_types", count)
    types = types or tuple(LINEAR if (layer + 1) % every else FULL for layer in range(count))
    if not set(types) <= {LINEAR, FULL}:
        raise config.wrong("layer_types", f"a list of {LINEAR} and {FULL}")
    return types


def rope_of(config: Terms, turning: bool = False) -> Terms:
    """How attention rotates: by one position a token, or `turning` by three."""
    rope = rope_terms(config)
    said = {"partial_rotary_factor": 0.25, "mrope_section": SECTIONS, **rope, "mrope_interleaved": True}
    if not turning:
        del said["mrope_section"]
    elif not rope.flag("mrope_interleaved", True):
        raise rope.wrong("mrope_interleaved", "true, as transformers takes it to be")
    return Terms({"rope_parameters": said}, config.source, config.within)


def delta_shape(config: Terms) -> DeltaShape:
    """The sizes of the gated delta nets."""
    heads = config.integer("linear_num_key_heads", 16), config.integer("linear_num_value_heads", 32)
    if heads[1] % heads[0]:
        raise config.wrong("linear_num_value_heads", f"a multiple of the {heads[0]} linear_num_key_heads")
    return DeltaShape(
        hidden_size=config.integer("hidden_size"),
        key_heads=heads[0],
        value_heads=heads[1],
        key_dim=config.integer("linear_key_head_dim", 128),
        value_dim=config.integer("linear_value_head_dim", 128),
        width=config.integer("linear_conv_kernel_dim", 4, low=2, high=64),
        epsilon=config.number("rms_norm_eps"),
    )


def mixture_of(config: Terms) -> Mixture | None:
    """The mixtures of experts; None of a dense model."""
    experts = config.integer("num_experts", 0, low=0, high=MANY)
    if not experts:
        return None
    chosen = config.integer("num_experts_per_tok", 8)
    if chosen > experts:
        raise config.wrong("num_experts_per_tok", f"at most num_experts, which is {experts}")
    every, dense = config.integer("decoder_sparse_step", 1), config.integers("mlp_only_layers")
    layers = range(config.integer("num_hidden_layers", high=MANY))
    # Only Qwen3-Next has a choice.
    normalised = config.flag("norm_topk_prob", True) or config.word("model_type", "") != NEXT
    return Mixture(
        routing=Routing(experts=experts, top_k=chosen, normalised=normalised),
        inner=config.integer("moe_intermediate_size"),
        layers=frozenset(layer for layer in layers if layer not in dense and (layer + 1) % every == 0),
        shared=config.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def stacked_parts(config: Terms, shape: DecoderShape) -> Stacks:
    """What checkpoints stack: each head's queries and gates, and the projections of the delta nets."""
    delta, dim = delta_shape(config), shape.head_dim
    query = range(0, 2 * dim * shape.query_heads, 2 * dim)
    gated = {"q_proj": [(first, dim) for first in query], "gate_proj": [(first + dim, dim) for first in query]}
    if config.word("model_type", "") != NEXT:
        sizes = {"in_proj_q": delta.keys, "in_proj_k": delta.keys, "in_proj_v": delta.values}
        return {"self_attn.q_proj": gated, "linear_attn.in_proj_qkv": one_after_the_other(sizes)}
    key, each = delta.key_dim, delta.value_heads // delta.key_heads
    values = each * delta.value_dim
    mixed = {"in_proj_q": key, "in_proj_k": key, "in_proj_v": values, "in_proj_z": values}
    return {
        "self_attn.q_proj": gated,
        "linear_attn.in_proj_qkvz": by_head(mixed, delta.key_heads),
        "linear_attn.in_proj_ba": by_head({"in_proj_b": each, "in_proj_a": each}, delta.key_heads),
    }


def by_head(sizes: dict[str, int], heads: int) -> dict[str, Ranges]:
    """The rows of modules that lie one below the other within each head, so many of each."""
    whole = sum(sizes.values())
    first = one_after_the_other(sizes)
    return {
        part: [(begin + head * whole, count) for head in range(heads) for begin, count in ranges]
        for part, ranges in first.items()
    }
