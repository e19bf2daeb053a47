"""Qwen3's mixtures of experts: Qwen3 with a mixture in the place of the MLP of all layers, or of some."""

import dataclasses

from engine.plugin import MANY, Terms
from engine.plugin.layers import CausalLM, DecoderShape, Mixture, Routing
from engine_plugins.models.qwen import Qwen


class Qwen3Moe(CausalLM):
    """`Qwen3MoeForCausalLM` of Hugging Face."""

    @staticmethod
    def shape_of(config: Terms) -> DecoderShape:
        experts = config.integer("num_experts", None, high=MANY) or config.integer("num_local_experts", high=MANY)
        every, dense = config.integer("decoder_sparse_step", 1), config.integers("mlp_only_layers")
        layers = range(config.integer("num_hidden_layers", high=MANY))
        mixture = Mixture(
            routing=Routing(
                experts=experts,
                top_k=config.integer("num_experts_per_tok"),
                normalised=config.flag("norm_topk_prob"),
            ),
            inner=config.integer("moe_intermediate_size"),
            layers=frozenset(layer for layer in layers if layer not in dense and (layer + 1) % every == 0),
        )
        return dataclasses.replace(Qwen.shape_of(config), mixture=mixture)
