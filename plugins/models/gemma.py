"""Gemma 3, its text models.

    ─┬─ norm ─ q,k,v ─ norm q,k ─ rotate ─ attention ─ o ─ norm ─(+)─┬─ norm ─ gate,up ─ gelu·mul ─ down ─ norm ─(+)─
     └───────────────────────────────────────────────────────────────┘  └───────────────────────────────────────┘

Five layers of six see a sliding window and rotate with a base of their own; the sixth sees everything. Norms
multiply by 1 + weight; embeddings are scaled by the root of their size. Left out: images, the bidirectional variant.
"""

from typing import Any

from torch import Tensor, nn

from engine.plugin import ConfigError
from engine.plugin.layers import Attention, AttentionKind, Batch, Block, Build, CausalLM, DecoderShape, Rotations


class GemmaBlock(Block):
    """Attention, then a gated MLP, with a norm before and after each."""

    def __init__(self, shape: DecoderShape, build: Build, attention: Attention, mlp: nn.Module) -> None:
        super().__init__(shape, build, attention, mlp)
        self.pre_feedforward_layernorm = shape.norm(build, shape.hidden_size)
        self.post_feedforward_layernorm = shape.norm(build, shape.hidden_size)

    def forward(
        self, hidden: Tensor, stream: Tensor | None, batch: Batch, rotations: Rotations
    ) -> tuple[Tensor, Tensor]:
        hidden, stream = self.input_layernorm.add(hidden, stream)
        attended = self.post_attention_layernorm(self.self_attn(hidden, batch, rotations))
        hidden, stream = self.pre_feedforward_layernorm.add(attended, stream)
        return self.post_feedforward_layernorm(self.mlp(hidden)), stream


class Gemma3(CausalLM):
    """`Gemma3ForCausalLM` of Hugging Face."""

    block = GemmaBlock

    @staticmethod
    def shape_of(config: dict[str, Any]) -> DecoderShape:
        for key in ("attn_logit_softcapping", "use_bidirectional_attention"):
            if config.get(key):
                raise ConfigError(f"{key} is {config[key]}, which the gemma model does not support; it knows Gemma 3")
        bias = bool(config.get("attention_bias"))
        return DecoderShape.of(
            config,
            head_dim=config.get("head_dim") or 256,
            kinds=kinds(config),
            layers=layers(config),
            activation=config.get("hidden_activation") or "gelu_pytorch_tanh",
            tied=config.get("tie_word_embeddings") is not False,
            qkv_bias=bias,
            output_bias=bias,
            head_norms=True,
            norm_offset=1.0,
            scale=(config.get("query_pre_attn_scalar") or 256) ** -0.5,
            embedding_scale=config["hidden_size"] ** 0.5,
            logit_cap=config.get("final_logit_softcapping"),
        )


def kinds(config: dict[str, Any]) -> tuple[AttentionKind, AttentionKind]:
    """Full and windowed attention. `rope_parameters` by kind is the form of transformers 5."""
    window, parameters = config.get("sliding_window"), config.get("rope_parameters")
    if parameters:
        full, sliding = ({"rope_parameters": parameters[kind]} for kind in ("full_attention", "sliding_attention"))
    else:
        full = {"rope_theta": config.get("rope_theta") or 1e6, "rope_scaling": config.get("rope_scaling")}
        sliding = {"rope_theta": config.get("rope_local_base_freq") or 1e4}
    return AttentionKind(rope=full), AttentionKind(rope=sliding, window=window)


def layers(config: dict[str, Any]) -> tuple[int, ...]:
    """Which of `kinds` each layer is of."""
    if types := config.get("layer_types"):
        return tuple(int(kind == "sliding_attention") for kind in types)
    period = config.get("sliding_window_pattern") or 6
    return tuple(int((layer + 1) % period != 0) for layer in range(config["num_hidden_layers"]))
