"""What a token of a prompt costs, by the shapes of a model's layers: products alone, and with each token of context.

Left out: layers that see a window, whose cost does not grow; the head, as few tokens of a prompt have logits; what
norms and the like take; how much faster a device does one than the other.
"""

from engine.layers.attention import AttentionShape
from engine.layers.embedding import LMHead
from engine.layers.latent import LatentShape
from engine.layers.linear import Linear
from engine.layers.model import Model
from engine.layers.moe import SparseMLP


def attention_work(model: Model) -> float:
    """What each token of context adds to a token's work, as a part of what that is without context. 0 where nothing
    attends to all of it."""
    alone = 0
    for layer in model.modules():
        if isinstance(layer, Linear) and not isinstance(layer, LMHead):
            alone += 2 * sum(layer.shard.rows_of(part) for part in layer.sizes) * layer.shard.inputs
        elif isinstance(layer, SparseMLP):
            experts = layer.experts
            width = experts.share.stop - experts.share.start
            alone += 2 * layer.gate.routing.top_k * 3 * width * experts.size
    context = sum(_per_token(backend.shape) for backend in model.backends)
    return context / alone if alone else 0.0


def _per_token(shape: object) -> int:
    """Of one token of context, over all layers: a score, and its part in the sum, for each head."""
    if isinstance(shape, AttentionShape):
        return 0 if shape.window is not None else 4 * shape.layers * shape.query_heads * shape.head_dim
    if isinstance(shape, LatentShape):
        numbers = shape.key_dim + shape.rope_dim + shape.value_dim  # expanded, as prompts are
        return 2 * shape.layers * shape.query_heads * numbers
    return 0
