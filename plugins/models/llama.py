"""Llama and the models that share its shape: SmolLM2, Mistral.

They are the shared decoder with all options as they come: see `CausalLM` in engine.plugin.layers. Left out: mixtures
of experts.
"""

from engine.plugin import Terms
from engine.plugin.layers import AttentionKind, CausalLM, DecoderShape

WINDOWS = {"mistral": 4096, "mixtral": None}  # of a config.json that does not say


class Llama(CausalLM):
    """`LlamaForCausalLM` and `MistralForCausalLM` of Hugging Face."""

    @staticmethod
    def shape_of(config: Terms) -> DecoderShape:
        bias = config.flag("attention_bias")
        return DecoderShape.of(
            config,
            kinds=(AttentionKind(rope=config, window=window(config)),),
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=config.flag("mlp_bias"),
        )


def window(config: Terms) -> int | None:
    """How far attention sees, if not everywhere: Llama everywhere, whatever its config.json says of a window."""
    kind = config.word("model_type", "mistral" if "MistralForCausalLM" in config.words("architectures") else "llama")
    if kind not in WINDOWS or "sliding_window" not in config:
        return WINDOWS.get(kind)
    return config.integer("sliding_window", None, low=0) or None
