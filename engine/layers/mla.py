"""The layer of latent attention (MLA, DeepSeek-V2, arXiv:2405.04434): projections around a LatentBackend.

    hidden ─ q_kv_a ─┬─ q_a ─ norm ─ q_b ─> query ─ rotate ─┐
                     └─ latent ─ norm, rotate ─> pages ─────┴─ attend, with kv_b as `up` ─ o ─>

What is projected from the same input is one matrix. Names are those of Hugging Face's checkpoints. Ranks divide the
heads. All heads need the latents, so each rank computes these whole, and caches them whole. Left out: biases.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from engine.kernels.dense.reference import LatentNorm, Rotation
from engine.layers.batch import Batch
from engine.layers.build import Build
from engine.layers.latent import LatentBackend, LatentShape
from engine.layers.linear import ColumnLinear, RowLinear
from engine.layers.norm import RMSNorm

EPSILON = 1e-6  # of the norms of latents, whatever that of others is


class UpProjection(ColumnLinear):
    """What makes keys and values of latents, and is multiplied with queries and with what is attended as well."""

    held_dense = True

    def __init__(self, build: Build, shape: LatentShape, heads: int) -> None:
        super().__init__(build, shape.latent_dim, heads * (shape.key_dim + shape.value_dim), axis="attention_tp")
        self.shape = shape

    def matrices_of_heads(self) -> Tensor:
        """[query_heads, key_dim + value_dim, latent_dim]"""
        return self.weight.view(self.shape.query_heads, -1, self.shape.latent_dim)


class LatentAttention(nn.Module):
    """Layer `layer` of KV group `group`, of `heads` heads in the whole model.

    Queries are projected through `query_dim` numbers if that is given. `interleaved` says how the rotated dimensions
    lie in the checkpoint (`Ops.latent_into_pages`). Where it is not `summed`, each rank returns its part of the sum.
    """

    def __init__(
        self,
        build: Build,
        backend: LatentBackend,
        layer: int,
        size: int,
        heads: int,
        query_dim: int | None,
        interleaved: bool,
        group: int = 0,
        *,
        summed: bool = True,
    ) -> None:
        super().__init__()
        shape = backend.shape
        self.backend, self.layer, self.group, self.interleaved = backend, layer, group, interleaved
        queries = heads * (shape.key_dim + shape.rope_dim)
        first = {"q_proj": queries} if query_dim is None else {"q_a_proj": query_dim}
        self.q_kv_a_proj = ColumnLinear(
            build,
            size,
            {**first, "kv_a_proj_with_mqa": shape.width},
            replicated=("q_a_proj", "kv_a_proj_with_mqa"),
            axis="attention_tp",
        )
        self.q_a_layernorm = None if query_dim is None else RMSNorm(build, query_dim, EPSILON)
        self.q_b_proj = None if query_dim is None else ColumnLinear(build, query_dim, queries, axis="attention_tp")
        self.kv_a_layernorm = RMSNorm(build, shape.latent_dim, EPSILON)
        self.kv_b_proj = UpProjection(build, shape, heads)
        self.o_proj = RowLinear(build, heads * shape.value_dim, size, summed=summed, axis="attention_tp")

    def forward(self, hidden: Tensor, batch: Batch, rotations: Sequence[Rotation]) -> Tensor:
        """`hidden` [T, size] to [T, size]; `rotations` by KV group."""
        shape, rotation = self.backend.shape, rotations[self.group]
        projected = self.q_kv_a_proj(hidden, batch)
        query, latents = projected.split([projected.shape[1] - shape.width, shape.width], dim=1)
        if self.q_a_layernorm is not None and self.q_b_proj is not None:
            query = self.q_b_proj(self.q_a_layernorm(query), batch)
        query = query.unflatten(1, (shape.query_heads, -1))
        cache = batch.caches[self.group][self.layer]
        norm = LatentNorm(self.kv_a_layernorm.weight, self.kv_a_layernorm.epsilon)
        dense = self.backend.kernels.dense
        dense.latent_into_pages(query, latents, norm, rotation, self.interleaved, cache, batch.places)
        up = self.kv_b_proj.matrices_of_heads()
        out = self.backend.forward(query, latents, up, cache, batch.plans[self.group])
        return self.o_proj(out.flatten(1), batch)
