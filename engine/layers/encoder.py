"""The base of models that make one vector of a prompt instead of going on with it.

An encoder sees a prompt whole, in one step, and keeps nothing of it: it has no KV cache. Left out: vectors from
causal models, one vector a token.
"""

from abc import abstractmethod
from typing import Any

from torch import Tensor

from engine.layers.batch import Batch
from engine.layers.build import Build
from engine.layers.model import Model
from engine.messages.step import VECTOR
from engine.plugin.specs import KVSpec


class Encoder(Model):
    """A subclass sets `vocab_size` and `embedding_size`, and writes `embed`, `run` and `pool`.

    Every row of a batch starts at position 0 and is a whole prompt.
    """

    yields = VECTOR

    @abstractmethod
    def __init__(self, config: dict[str, Any], build: Build) -> None:
        super().__init__(config, build)

    @abstractmethod
    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Float32 vectors [R, embedding_size] of the rows whose hidden states are `hidden` [T, H]."""

    def logits(self, hidden: Tensor) -> Tensor:
        raise AssertionError("an encoder predicts no tokens")

    def kv_spec(self) -> KVSpec:
        """Nothing is kept."""
        return KVSpec(self.page_size, ())
