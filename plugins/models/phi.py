"""Phi-3, Phi-3.5 and Phi-4, the dense ones.

They are the shared decoder; query, key and value, and gate and up, are one tensor each in the checkpoint. Left out:
mixtures of experts, images.
"""

from engine.plugin import Terms
from engine.plugin.layers import AttentionKind, Build, CausalLM, DecoderShape, one_after_the_other


class Phi3(CausalLM):
    """`Phi3ForCausalLM` of Hugging Face."""

    def __init__(self, config: Terms, build: Build) -> None:
        super().__init__(config, build)
        shape = self.shape_of(Terms.of(config))
        query, key = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.stacked = {
            "self_attn.qkv_proj": one_after_the_other({"q_proj": query, "k_proj": key, "v_proj": key}),
            "mlp.gate_up_proj": one_after_the_other(dict.fromkeys(("gate_proj", "up_proj"), shape.intermediate_size)),
        }

    @staticmethod
    def shape_of(config: Terms) -> DecoderShape:
        window = config.integer("sliding_window", None, low=0) or None
        rope = Terms({"original_max_position_embeddings": 4096, **config}, config.source)
        return DecoderShape.of(config, kinds=(AttentionKind(rope=rope, window=window),))
