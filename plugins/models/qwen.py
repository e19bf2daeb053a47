"""Qwen2, Qwen2.5 and Qwen3, the dense ones.

They are the shared decoder: Qwen2 has biases on query, key and value, Qwen3 instead normalises each query and key
head. The later layers of either may see through a window. Left out: mixtures of experts, images.
"""

from typing import Any

from engine.plugin.layers import AttentionKind, CausalLM, DecoderShape


class Qwen(CausalLM):
    """`Qwen2ForCausalLM` and `Qwen3ForCausalLM` of Hugging Face, told apart by `model_type`."""

    @staticmethod
    def shape_of(config: dict[str, Any]) -> DecoderShape:
        count = config["num_hidden_layers"]
        window = config.get("sliding_window") if config.get("use_sliding_window") else None
        types = config.get("layer_types")
        if types:
            windowed = [kind == "sliding_attention" for kind in types]
        else:
            windowed = [layer >= config.get("max_window_layers", count) for layer in range(count)]
        usual: dict[str, Any] = {
            "kinds": (AttentionKind(rope=config), AttentionKind(rope=config, window=window)),
            "layers": tuple(int(window is not None and each) for each in windowed),
        }
        if config["model_type"] == "qwen2":
            return DecoderShape.of(config, **usual, qkv_bias=True)
        bias = bool(config.get("attention_bias"))
        head_dim = config.get("head_dim") or 128
        return DecoderShape.of(config, **usual, head_dim=head_dim, head_norms=True, qkv_bias=bias, output_bias=bias)
