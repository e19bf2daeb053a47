"""Llama and the models that share its shape: SmolLM2, Mistral.

They are the shared decoder with all options as they come: see `CausalLM` in engine.plugin.layers. Left out: mixtures
of experts.
"""

from typing import Any

from engine.plugin.layers import AttentionKind, CausalLM, DecoderShape


class Llama(CausalLM):
    """`LlamaForCausalLM` and `MistralForCausalLM` of Hugging Face."""

    @staticmethod
    def shape_of(config: dict[str, Any]) -> DecoderShape:
        bias = bool(config.get("attention_bias"))
        return DecoderShape.of(
            config,
            kinds=(AttentionKind(rope=config, window=config.get("sliding_window") or None),),
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=bool(config.get("mlp_bias")),
        )
