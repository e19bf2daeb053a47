"""Llama and the models that share its shape: SmolLM2, Mistral.

They are the shared decoder with all options as they come: see `CausalLM` in engine.plugin.layers. Left out: mixtures
of experts.
"""

from engine.plugin import Terms
from engine.plugin.layers import AttentionKind, CausalLM, DecoderShape


class Llama(CausalLM):
    """`LlamaForCausalLM` and `MistralForCausalLM` of Hugging Face."""

    @staticmethod
    def shape_of(config: Terms) -> DecoderShape:
        bias = config.flag("attention_bias")
        return DecoderShape.of(
            config,
            kinds=(AttentionKind(rope=config, window=config.integer("sliding_window", None, low=0) or None),),
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=config.flag("mlp_bias"),
        )
