"""Gemma 3, its text models.

    ─┬─ norm ─ q,k,v ─ norm q,k ─ rotate ─ attention ─ o ─ norm ─(+)─┬─ norm ─ gate,up ─ gelu·mul ─ down ─ norm ─(+)─
     └───────────────────────────────────────────────────────────────┘  └───────────────────────────────────────┘

Five layers of six see a sliding window and rotate with a base of their own; the sixth sees everything. Norms
multiply by 1 + weight; embeddings are scaled by the root of their size. Left out: images, the bidirectional variant.
"""

from torch import Tensor, nn

from engine.plugin import MANY, ConfigError, Terms
from engine.plugin.layers import AttentionKind, Batch, Block, Build, CausalLM, DecoderShape, Rotations


class GemmaBlock(Block):
    """Attention, then a gated MLP, with a norm before and after each."""

    def __init__(self, shape: DecoderShape, build: Build, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__(shape, build, attention, mlp)
        self.pre_feedforward_layernorm = shape.norm(build, shape.hidden_size)
        self.post_feedforward_layernorm = shape.norm(build, shape.hidden_size)

    def forward(
        self, hidden: Tensor, stream: Tensor | None, batch: Batch, rotations: Rotations
    ) -> tuple[Tensor, Tensor]:
        hidden, stream = self.input_layernorm.add(hidden, stream)
        attended = self.post_attention_layernorm(self.self_attn(hidden, batch, rotations))
        hidden, stream = self.pre_feedforward_layernorm.add(attended, stream)
        return self.post_feedforward_layernorm(self.mlp(hidden, batch)), stream


class Gemma3(CausalLM):
    """`Gemma3ForCausalLM` of Hugging Face."""

    block = GemmaBlock

    @staticmethod
    def shape_of(config: Terms) -> DecoderShape:
        for key in ("attn_logit_softcapping", "use_bidirectional_attention"):
            if config.get(key):
                raise ConfigError(f"{key} is {config[key]}, which the gemma model does not support; it knows Gemma 3")
        bias = config.flag("attention_bias")
        return DecoderShape.of(
            config,
            head_dim=config.integer("head_dim", 256),
            kinds=kinds(config),
            layers=layers(config),
            activation=config.word("hidden_activation", "gelu_pytorch_tanh"),
            tied=config.flag("tie_word_embeddings", True),
            qkv_bias=bias,
            output_bias=bias,
            head_norms=True,
            norm_offset=1.0,
            scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
            embedding_scale=config.integer("hidden_size") ** 0.5,
            logit_cap=config.number("final_logit_softcapping", None),
        )


def kinds(config: Terms) -> tuple[AttentionKind, AttentionKind]:
    """Full and windowed attention. `rope_parameters` by kind is the form of transformers 5."""
    parameters = config.section("rope_parameters")
    full = {**parameters.section("full_attention"), **config.section("rope_scaling")}
    sliding = parameters.section("sliding_attention")
    thetas = config.number("rope_theta", 1e6), config.number("rope_local_base_freq", 1e4)
    ropes = [
        Terms({"rope_theta": theta, "rope_parameters": rope}, config.source)
        for theta, rope in zip(thetas, (full, sliding), strict=True)
    ]
    window = config.integer("sliding_window", None) if "sliding_window" in config else 4096
    return AttentionKind(rope=ropes[0]), AttentionKind(rope=ropes[1], window=window)


def layers(config: Terms) -> tuple[int, ...]:
    """Which of `kinds` each layer is of."""
    count = config.integer("num_hidden_layers", high=MANY)
    if types := config.words("layer_types", count):
        return tuple(int(kind == "sliding_attention") for kind in types)
    period = config.integer("sliding_window_pattern", 6)
    return tuple(int((layer + 1) % period != 0) for layer in range(count))
