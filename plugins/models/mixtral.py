"""Mixtral: Mistral with a mixture of experts in the place of every MLP."""

import dataclasses
from collections.abc import Iterable

from engine.plugin import MANY, LazyTensor, Terms
from engine.plugin.layers import CausalLM, DecoderShape, Mixture, Routing
from engine_plugins.models.llama import Llama


class Mixtral(CausalLM):
    """`MixtralForCausalLM` of Hugging Face."""

    @staticmethod
    def shape_of(config: Terms) -> DecoderShape:
        shape = Llama.shape_of(Terms({**config, "rope_theta": config.number("rope_theta", 1e6)}, config.source))
        experts, top_k = config.integer("num_local_experts", high=MANY), config.integer("num_experts_per_tok")
        mixture = Mixture(
            routing=Routing(experts=experts, top_k=top_k, normalised=True),
            inner=shape.intermediate_size,
            layers=frozenset(range(len(shape.layers))),
            parts=("w1", "w3", "w2"),
        )
        return dataclasses.replace(shape, mixture=mixture)

    def load(self, tensors: Iterable[tuple[str, LazyTensor]]) -> None:
        """Its checkpoints call the mixture `block_sparse_moe`."""
        super().load((name.replace(".block_sparse_moe.", ".mlp."), tensor) for name, tensor in tensors)
