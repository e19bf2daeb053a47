"""DeepSeek-V2, V2-Lite, V3 and R1: latent attention (arXiv:2405.04434) and mixtures with shared experts.

    ─┬─ norm ─ latent attention ─(+)─┬─ norm ─ router, experts, shared experts ─(+)─
     └───────────────────────────────┘  └──────────────────────────────────────────┘

The first layers have a plain MLP. V2 scores experts by a softmax, V3 (arXiv:2412.19437) by sigmoids with a bias for
choosing. V3's checkpoints end with layers that predict further tokens: they are loaded, for speculation to use, and not
run yet. Left out: running them, biases of attention, V3.2's sparse attention.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from engine.plugin import ConfigError, LazyTensor
from engine.plugin.layers import (
    Batch,
    Build,
    ColumnLinear,
    DecoderShape,
    Embedding,
    Experts,
    GatedMLP,
    LatentAttention,
    LatentShape,
    LMHead,
    Mixture,
    Model,
    Rotary,
    Router,
    Routing,
    SparseMLP,
    yarn_scale,
)

Rotation = tuple[Tensor, Tensor]


class DeepseekBlock(nn.Module):
    """Latent attention, then an MLP; each reads a norm of the stream, and the next norm adds what it says to it."""

    def __init__(self, shape: DecoderShape, build: Build, attention: LatentAttention, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = shape.norm(build, shape.hidden_size)
        self.self_attn = attention
        self.post_attention_layernorm = shape.norm(build, shape.hidden_size)
        self.mlp = mlp

    def forward(self, hidden: Tensor, stream: Tensor | None, batch: Batch, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """`hidden` [T, H] is still to be added to `stream`, None before the first block; so is what is returned."""
        hidden, stream = self.input_layernorm.add(hidden, stream)
        hidden, stream = self.post_attention_layernorm.add(self.self_attn(hidden, batch, rotation), stream)
        return self.mlp(hidden), stream


class NextTokenBlock(DeepseekBlock):
    """A block that predicts one token further, from the state of a position and the token that followed it.

    Embedding and head are the model's; of its own are the norms of both inputs, the projection of the two to one, and
    the norm before the head. Held, not run.
    """

    def __init__(self, shape: DecoderShape, build: Build, attention: LatentAttention, mlp: nn.Module) -> None:
        super().__init__(shape, build, attention, mlp)
        self.enorm = shape.norm(build, shape.hidden_size)
        self.hnorm = shape.norm(build, shape.hidden_size)
        self.eh_proj = ColumnLinear(build, 2 * shape.hidden_size, shape.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": shape.norm(build, shape.hidden_size)})


class DeepseekDecoder(nn.Module):
    def __init__(self, shape: DecoderShape, build: Build, blocks: Sequence[DeepseekBlock]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(build, shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = shape.norm(build, shape.hidden_size)
        self.run = len(shape.layers)  # blocks; those after them are held

    def forward(self, batch: Batch, rotation: Rotation) -> Tensor:
        hidden, stream = self.embed_tokens(batch.ids), None
        for layer in self.layers[: self.run]:
            hidden, stream = layer(hidden, stream, batch, rotation)
        return self.norm.add(hidden, stream)[0]


class Deepseek(Model):
    """`DeepseekV2ForCausalLM` and `DeepseekV3ForCausalLM` of Hugging Face."""

    def __init__(self, config: dict[str, Any], build: Build) -> None:
        super().__init__(config, build)
        shape = shape_of(config)
        self.vocab_size = shape.vocab_size
        count, further = config["num_hidden_layers"], config.get("num_nextn_predict_layers") or 0
        latent = latent_shape(config)
        backend = build.latent_attention(latent)
        self.backends = (backend,)
        self.rotary = Rotary(build, config, latent.rope_dim)
        blocks = []
        for layer in range(count + further):
            attention = LatentAttention(
                build,
                backend,
                layer,
                shape.hidden_size,
                shape.query_heads,
                query_dim=config.get("q_lora_rank"),
                interleaved=config.get("rope_interleave", True),
            )
            block = DeepseekBlock if layer < count else NextTokenBlock
            blocks.append(block(shape, build, attention, mlp(config, shape, build, layer)))
        self.model = DeepseekDecoder(shape, build, blocks)
        self.lm_head = LMHead(
            build, shape.hidden_size, shape.vocab_size, self.model.embed_tokens if shape.tied else None
        )
        shared = ("embed_tokens.weight", "shared_head.head.weight")  # copies of the model's own
        copies = (f"model.layers.{layer}.{name}" for layer in range(count, count + further) for name in shared)
        self.ignored = (*self.ignored, *copies)

    def forward(self, batch: Batch) -> Tensor:
        return self.model(batch, self.rotary(batch.positions))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def load(self, tensors: Iterable[tuple[str, LazyTensor]]) -> None:
        """A checkpoint may lack the blocks that are not run: then the model has none."""
        listed = list(tensors)
        names = {name for name, _ in listed}
        run = self.model.run
        if not any(name.startswith(f"model.layers.{run}.") for name in names):
            del self.model.layers[run:]
        super().load(listed)


def shape_of(config: dict[str, Any]) -> DecoderShape:
    """The decoder without its attention. Raises ConfigError for what would run and be wrong."""
    refused = {"attention_bias": False, "mlp_bias": False, "ep_size": 1, "index_topk": None}
    for key, supported in refused.items():
        if (config.get(key) or supported) != supported:
            raise ConfigError(f"{key} is {config[key]}, which the deepseek model does not support")
    first, every = config.get("first_k_dense_replace") or 0, config.get("moe_layer_freq") or 1
    count = config["num_hidden_layers"] + (config.get("num_nextn_predict_layers") or 0)
    mixture = Mixture(
        routing=routing(config),
        inner=config["moe_intermediate_size"],
        layers=frozenset(layer for layer in range(first, count) if layer % every == 0),
    )
    return DecoderShape.of(config, mixture=mixture if config.get("n_routed_experts") else None)


def routing(config: Mapping[str, Any]) -> Routing:
    """How experts are chosen. Raises ConfigError for a way that it does not know."""
    method = config.get("topk_method") or ("noaux_tc" if config["model_type"] == "deepseek_v3" else "greedy")
    scorings: tuple[Literal["softmax", "sigmoid"], ...] = ("softmax", "sigmoid")
    known = {"greedy": 0, "group_limited_greedy": 1, "noaux_tc": 2}  # how many of a group's scores it is chosen by
    scoring = config.get("scoring_func") or ("sigmoid" if method == "noaux_tc" else "softmax")
    if method not in known or scoring not in scorings:
        raise ConfigError(
            f"experts chosen by topk_method {method!r} of scoring_func {scoring!r} are not supported; known are "
            f"{', '.join(known)} of {' or '.join(scorings)}"
        )
    normalised = bool(config.get("norm_topk_prob"))
    if normalised and method != "noaux_tc":
        raise ConfigError(
            f"norm_topk_prob with topk_method {method!r} is not supported: DeepSeek's code and transformers disagree "
            "on what it means there, and published models have it only with noaux_tc"
        )
    grouped = known[method] > 0
    return Routing(
        experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        scoring=scorings[scorings.index(scoring)],
        groups=(config.get("n_group") or 1) if grouped else 1,
        kept_groups=(config.get("topk_group") or 1) if grouped else 1,
        group_best=max(known[method], 1),
        normalised=normalised,
        scale=config.get("routed_scaling_factor") or 1.0,
    )


def latent_shape(config: Mapping[str, Any]) -> LatentShape:
    """The attention of all heads. With YaRN, scores grow with the factor by which positions are stretched."""
    dim = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    stretch = 1.0
    if rope.get("mscale_all_dim") and rope.get("rope_type", rope.get("type", "default")) != "default":
        stretch = yarn_scale(rope["factor"], rope["mscale_all_dim"])
    return LatentShape(
        layers=config["num_hidden_layers"],
        query_heads=config["num_attention_heads"],
        latent_dim=config["kv_lora_rank"],
        rope_dim=config["qk_rope_head_dim"],
        key_dim=config["qk_nope_head_dim"],
        value_dim=config["v_head_dim"],
        scale=dim**-0.5 * stretch**2,
    )


def mlp(config: Mapping[str, Any], shape: DecoderShape, build: Build, layer: int) -> nn.Module:
    """What comes after the attention of that layer."""
    mixture = shape.mixture
    if mixture is None or layer not in mixture.layers:
        return GatedMLP(shape, build)
    corrected = mixture.routing.scoring == "sigmoid"
    router = Router(build, mixture.routing, shape.hidden_size, corrected)
    experts = Experts(build, mixture.routing.experts, shape.hidden_size, mixture.inner)
    inner = mixture.inner * (config.get("n_shared_experts") or 0)
    shared = GatedMLP(dataclasses.replace(shape, intermediate_size=inner), build) if inner else None
    return SparseMLP(router, experts, shared)
