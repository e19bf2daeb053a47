"""A model without weights that counts: after byte b comes (b + 1) % 256, whatever came before.

Through it the whole engine runs in milliseconds, and a step that was lost, doubled or put out of order
shows as a gap in the count. The end token, 256, never comes by itself.
"""

from typing import Any

import torch
from torch import Tensor

from engine.plugin import KVGroup, KVSpec
from engine.plugin.layers import Batch, Build, Model


class Echo(Model):
    """`EchoForTests`: 257 tokens, of which the first 256 are bytes."""

    def __init__(self, config: dict[str, Any], build: Build) -> None:
        super().__init__(config, build)
        self.vocab_size = 257

    def embed(self, batch: Batch) -> Tensor:
        """The ids themselves, [T, 1] float32."""
        return batch.ids[:, None].to(torch.float32)

    def run(self, hidden: Tensor, batch: Batch, first: int, last: int) -> Tensor:
        """The same. They pass through the cache, so that pages matter."""
        cache = batch.caches[0][0].view(-1)
        cache[batch.places] = hidden[:, 0].to(cache.dtype)
        return cache[batch.places, None].to(torch.float32)

    def logits(self, hidden: Tensor) -> Tensor:
        successor = (hidden.to(torch.int64) + 1) % 256
        logits = torch.full((hidden.shape[0], self.vocab_size), -100.0, device=hidden.device)
        return logits.scatter_(1, successor, 100.0)

    def kv_spec(self) -> KVSpec:
        """One float32 a token."""
        return KVSpec(self.page_size, (KVGroup(1, (self.page_size,), "float32"),))
