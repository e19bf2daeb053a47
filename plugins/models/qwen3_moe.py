"""Qwen3's mixtures of experts: Qwen3 with a mixture in the place of the MLP of all layers, or of some."""

import dataclasses
from typing import Any

from engine.plugin.layers import CausalLM, DecoderShape, Mixture, Routing
from engine_plugins.models.qwen import Qwen


class Qwen3Moe(CausalLM):
    """`Qwen3MoeForCausalLM` of Hugging Face."""

    @staticmethod
    def shape_of(config: dict[str, Any]) -> DecoderShape:
        experts = config.get("num_experts") or config["num_local_experts"]
        every, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
        layers = range(config["num_hidden_layers"])
        mixture = Mixture(
            routing=Routing(
                experts=experts,
                top_k=config["num_experts_per_tok"],
                normalised=bool(config.get("norm_topk_prob")),
            ),
            inner=config["moe_intermediate_size"],
            layers=frozenset(layer for layer in layers if layer not in dense and (layer + 1) % every == 0),
        )
        return dataclasses.replace(Qwen.shape_of(config), mixture=mixture)
