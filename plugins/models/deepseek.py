"""DeepSeek-V2, V2-Lite, V3 and R1: latent attention (arXiv:2405.04434) and mixtures with shared experts.

    ─┬─ norm ─ latent attention ─(+)─┬─ norm ─ router, experts, shared experts ─(+)─
     └───────────────────────────────┘  └──────────────────────────────────────────┘

The first layers have a plain MLP. V2 scores experts by a softmax, V3 (arXiv:2412.19437) by sigmoids with a bias for
choosing. V3's checkpoints end with layers that predict further tokens: they are loaded, for speculation to use, and not
run yet. Left out: running them, biases of attention, V3.2's sparse attention.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal

from torch import nn

from engine.plugin import MANY, ConfigError, LazyTensor, Terms
from engine.plugin.layers import (
    Block,
    Build,
    CausalLM,
    DecoderShape,
    Elsewhere,
    LatentAttention,
    LatentBackend,
    LatentShape,
    Mixture,
    ReplicatedLinear,
    Rotary,
    Routing,
    rope_terms,
    rope_type,
    yarn_scale,
)


class NextTokenBlock(Block):
    """A block that predicts one token further, from the state of a position and the token that followed it.

    Embedding and head are the model's; of its own are the norms of both inputs, the projection of the two to one, and
    the norm before the head. Held, not run.
    """

    def __init__(self, shape: DecoderShape, build: Build, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__(shape, build, attention, mlp)
        self.enorm = shape.norm(build, shape.hidden_size)
        self.hnorm = shape.norm(build, shape.hidden_size)
        self.eh_proj = ReplicatedLinear(build, 2 * shape.hidden_size, shape.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": shape.norm(build, shape.hidden_size)})


class Deepseek(CausalLM):
    """`DeepseekV2ForCausalLM` and `DeepseekV3ForCausalLM` of Hugging Face."""

    def __init__(self, config: Terms, build: Build) -> None:
        config = Terms.of(config)
        super().__init__(config, build)
        shape = self.decoder_shape(config)
        count = len(shape.layers)
        further = range(count, count + further_layers(config))
        for layer in further:  # the stage with the head holds them
            if self.held.stop < count:
                self.model.layers.append(Elsewhere())
                continue
            attention = self._attention(config, shape, build, layer)
            self.model.layers.append(NextTokenBlock(shape, build, attention, shape.mlp(build, layer)))
        shared = ("embed_tokens.weight", "shared_head.head.weight")  # copies of the model's own
        copies = (f"model.layers.{layer}.{name}" for layer in further for name in shared)
        self.ignored = (*self.ignored, *copies)

    @staticmethod
    def shape_of(config: Terms) -> DecoderShape:
        return shape_of(config)

    def attention(self, config: Terms, shape: DecoderShape, build: Build) -> dict[int, nn.Module]:
        latent = dataclasses.replace(latent_shape(config), layers=len(self.held))
        self.backends = (build.latent_attention(latent),)
        self.rotaries = nn.ModuleList([Rotary(build, config, latent.rope_dim)])
        return {layer: self._attention(config, shape, build, layer) for layer in self.held}

    def _attention(self, config: Terms, shape: DecoderShape, build: Build, layer: int) -> LatentAttention:
        (backend,) = self.backends
        assert isinstance(backend, LatentBackend)
        return LatentAttention(
            build,
            backend,
            layer - self.held.start,
            shape.hidden_size,
            shape.query_heads,
            query_dim=config.integer("q_lora_rank", None),
            interleaved=config.flag("rope_interleave", True),
            summed=shape.summed,
        )

    def load(self, tensors: Iterable[tuple[str, LazyTensor]]) -> None:
        """A checkpoint may lack the blocks that are not run: then the model has none."""
        listed = list(tensors)
        run = self.model.count
        if not any(name.startswith(f"model.layers.{run}.") for name, _ in listed):
            del self.model.layers[run:]
        super().load(listed)


def further_layers(config: Terms) -> int:
    """Layers that predict further tokens."""
    return config.integer("num_nextn_predict_layers", 0, low=0, high=MANY)


def shape_of(config: Terms) -> DecoderShape:
    """The decoder without its attention. Raises ConfigError for what would run and be wrong."""
    refused = {"attention_bias": False, "mlp_bias": False, "ep_size": 1, "index_topk": None}
    for key, supported in refused.items():
        if (config.get(key) or supported) != supported:
            raise ConfigError(f"{key} is {config[key]}, which the deepseek model does not support")
    if not config.integer("n_routed_experts", 0, low=0, high=MANY):
        return DecoderShape.of(config)
    first, every = config.integer("first_k_dense_replace", 0, low=0), config.integer("moe_layer_freq", 1)
    count = config.integer("num_hidden_layers", high=MANY) + further_layers(config)
    chosen = routing(config)
    mixture = Mixture(
        routing=chosen,
        inner=config.integer("moe_intermediate_size"),
        layers=frozenset(layer for layer in range(first, count) if layer % every == 0),
        shared=config.integer("moe_intermediate_size") * config.integer("n_shared_experts", 0, low=0, high=MANY),
        corrected=chosen.scoring == "sigmoid",
    )
    return DecoderShape.of(config, mixture=mixture)


def routing(config: Terms) -> Routing:
    """How experts are chosen. Raises ConfigError for a way that it does not know."""
    method = config.word("topk_method", None)
    method = method or ("noaux_tc" if config.word("model_type") == "deepseek_v3" else "greedy")
    scorings: tuple[Literal["softmax", "sigmoid"], ...] = ("softmax", "sigmoid")
    known = {"greedy": 0, "group_limited_greedy": 1, "noaux_tc": 2}  # how many of a group's scores it is chosen by
    scoring = config.word("scoring_func", "sigmoid" if method == "noaux_tc" else "softmax")
    if method not in known or scoring not in scorings:
        raise ConfigError(
            f"experts chosen by topk_method {method!r} of scoring_func {scoring!r} are not supported; known are "
            f"{', '.join(known)} of {' or '.join(scorings)}"
        )
    normalised = config.flag("norm_topk_prob")
    if normalised and method != "noaux_tc":
        raise ConfigError(
            f"norm_topk_prob with topk_method {method!r} is not supported: DeepSeek's code and transformers disagree "
            "on what it means there, and published models have it only with noaux_tc"
        )
    grouped = known[method] > 0
    return Routing(
        experts=config.integer("n_routed_experts", high=MANY),
        top_k=config.integer("num_experts_per_tok", high=MANY),
        scoring=scorings[scorings.index(scoring)],
        groups=config.integer("n_group", 1, high=MANY) if grouped else 1,
        kept_groups=config.integer("topk_group", 1, high=MANY) if grouped else 1,
        group_best=max(known[method], 1),
        normalised=normalised,
        scale=config.number("routed_scaling_factor", 1.0),
    )


def latent_shape(config: Terms) -> LatentShape:
    """The attention of all heads. With YaRN, scores grow with the factor by which positions are stretched."""
    rope_dim, key_dim = config.integer("qk_rope_head_dim"), config.integer("qk_nope_head_dim")
    rope, stretch = rope_terms(config), 1.0
    if rope_type(rope) != "default" and (weight := rope.number("mscale_all_dim", 0.0, above=-1.0)):
        stretch = yarn_scale(rope.number("factor"), weight)
    return LatentShape(
        layers=config.integer("num_hidden_layers", high=MANY),
        query_heads=config.integer("num_attention_heads"),
        latent_dim=config.integer("kv_lora_rank"),
        rope_dim=rope_dim,
        key_dim=key_dim,
        value_dim=config.integer("v_head_dim"),
        scale=(key_dim + rope_dim) ** -0.5 * stretch**2,
    )
