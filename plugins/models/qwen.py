"""Qwen2, Qwen2.5 and Qwen3, the dense ones.

They are the shared decoder: Qwen2 has biases on query, key and value, Qwen3 instead normalises each query and key
head. The later layers of either may see through a window. Left out: mixtures of experts, images.
"""

from typing import Any

from engine.plugin import MANY, Terms
from engine.plugin.layers import AttentionKind, CausalLM, DecoderShape


class Qwen(CausalLM):
    """`Qwen2ForCausalLM` and `Qwen3ForCausalLM` of Hugging Face, told apart by `model_type`."""

    @staticmethod
    def shape_of(config: Terms) -> DecoderShape:
        count = config.integer("num_hidden_layers", high=MANY)
        window = config.integer("sliding_window", None) if "sliding_window" in config else 4096
        window = window if config.flag("use_sliding_window") else None
        kind = config.word("model_type")
        first = 0 if kind == "qwen3_moe" else config.integer("max_window_layers", 28, low=0)
        windowed = [each == "sliding_attention" for each in config.words("layer_types", count)]
        windowed = windowed or [layer >= first for layer in range(count)]
        usual: dict[str, Any] = {
            "kinds": (AttentionKind(rope=config), AttentionKind(rope=config, window=window)),
            "layers": tuple(int(window is not None and each) for each in windowed),
        }
        if kind == "qwen2":
            return DecoderShape.of(config, **usual, qkv_bias=True)
        if kind == "qwen3":  # the mixtures divide, as most models do
            usual["head_dim"] = config.integer("head_dim", 128)
        bias = config.flag("attention_bias")
        return DecoderShape.of(config, **usual, head_norms=True, qkv_bias=bias, output_bias=bias)
