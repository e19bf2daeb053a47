"""Mixtral: Mistral with a mixture of experts in the place of every MLP."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from engine.plugin import LazyTensor
from engine.plugin.layers import CausalLM, DecoderShape, Mixture, Routing
from engine_plugins.models.llama import Llama


class Mixtral(CausalLM):
    """`MixtralForCausalLM` of Hugging Face."""

    @staticmethod
    def shape_of(config: dict[str, Any]) -> DecoderShape:
        mixture = Mixture(
            routing=Routing(experts=config["num_local_experts"], top_k=config["num_experts_per_tok"], normalised=True),
            inner=config["intermediate_size"],
            layers=frozenset(range(config["num_hidden_layers"])),
            parts=("w1", "w3", "w2"),
        )
        return dataclasses.replace(Llama.shape_of(config), mixture=mixture)

    def load(self, tensors: Iterable[tuple[str, LazyTensor]]) -> None:
        """Its checkpoints call the mixture `block_sparse_moe`."""
        super().load((name.replace(".block_sparse_moe.", ".mlp."), tensor) for name, tensor in tensors)
