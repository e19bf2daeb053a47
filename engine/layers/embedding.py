"""From token ids to vectors and back to logits: the vocabulary is divided over the ranks, and need not divide evenly.
Where attention runs in copies, each copy has all of it, divided over its ranks.

ids ─ vectors of this rank's tokens, zeros for others ─ all_reduce ─> hidden … ─ this rank's logits ─ all_gather ─>

Where tokens are drawn of a rank's own logits, nothing is gathered (worker/sampling/shares.py).
"""

from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional

from engine.kernels.types import PackedMatrix
from engine.layers.build import Build
from engine.layers.linear import Linear, packed_part
from engine.layers.model import Layer, check_shape, copy_weight, empty_weight
from engine.layers.quantization import Shard
from engine.parallel.collectives import Divided, all_gather, all_reduce
from engine.plugin.specs import LazyTensor

WORDS = "tokens of the vocabulary"
TOGETHER = 32  # tokens whose bits are one word of a mask: ranks have whole words


class Embedding(Layer):
    """A table of one vector a token; on a CPU it stays packed if the checkpoint's is.

    Its tokens are divided over the ranks, unless `divided` is false: a small table is held whole by all."""

    def __init__(self, build: Build, vocab_size: int, size: int, divided: bool = True) -> None:
        super().__init__()
        self.kernels = build.kernels
        self.vocab_size, self.size = vocab_size, size
        self.group = build.group("attention_tp")
        self.divided = divided and self.group.size > 1
        self.share = _share(build, vocab_size) if self.divided else slice(0, vocab_size)
        self.weight = empty_weight(build, self.share.stop - self.share.start, size)
        self.matrix: PackedMatrix | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` [T] int64 to [T, size]."""
        if not self.divided:
            return self._vectors(ids)
        local = ids - self.share.start
        near = local.clamp(0, self.share.stop - self.share.start - 1)
        vectors = self._vectors(near).masked_fill_((near != local)[:, None], 0.0)
        return all_reduce(vectors, self.group)

    def _vectors(self, ids: Tensor) -> Tensor:
        """Of `ids` counted from this rank's first."""
        if self.matrix is not None:
            return self.matrix.select(ids)
        return nn.functional.embedding(ids, self.weight)

    def whole(self, parameter: str, part: str) -> tuple[int, ...] | None:
        return self.vocab_size, self.size

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        index = self.share, slice(0, self.size)
        packed = packed_part(self.kernels.dense, tensor, *index)
        if packed is None:
            return copy_weight(name, self.weight, tensor, (self.vocab_size, self.size), index)
        check_shape(name, tensor, (self.vocab_size, self.size))
        (self.matrix,) = self.kernels.dense.matrices([packed])
        self.register_buffer("packed", self.matrix.data)
        self.weight = nn.Parameter(self.weight.new_empty(0, self.weight.shape[1]), requires_grad=False)


class LMHead(Linear):
    """From hidden states to logits. `tied` shares the matrix of that embedding instead of having its own.

    Each rank multiplies with its tokens' part of the matrix. If it `gathers`, `forward` returns all logits on all
    ranks; else those of `share` alone.
    """

    def __init__(
        self, build: Build, size: int, vocab_size: int, tied: Embedding | None = None, gathers: bool = True
    ) -> None:
        share = _share(build, vocab_size)
        own = share if tied is None else slice(0, 0)
        sizes = {"": vocab_size if tied is None else 0}
        super().__init__(build, sizes, size, Shard({"": own}, slice(0, size)), bias=False, quantizable=False)
        self.share = share
        self._tied = (tied,) if tied is not None else ()  # in a tuple: it is not a part of this module
        if tied is not None:
            self.weight = tied.weight
        self.vocab_size = vocab_size
        self.group = build.group("attention_tp")
        self.gathers = gathers and self.group.size > 1
        self.most = replace(build.mesh, rank=0).uneven_share(vocab_size, "attention_tp", WORDS, TOGETHER).stop

    def loaded(self) -> None:
        super().loaded()
        for embedding in self._tied:
            self.weight = embedding.weight
            self.matrices = (embedding.matrix,) if embedding.matrix is not None else ()

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        """[S, size] to logits [S, vocab_size], or those of `share`."""
        logits = self.own(hidden)
        return self._gathered(logits) if self.gathers else logits

    def own(self, hidden: Tensor) -> Tensor:
        """[S, size] to the logits of `share`."""
        return super().forward(hidden)

    @property
    def divided(self) -> Divided | None:
        """Whose logits `own` makes, where these are not all."""
        return Divided(self.share, self.vocab_size, self.group) if self.gathers else None

    def _gathered(self, logits: Tensor) -> Tensor:
        if logits.shape[1] < self.most:  # the last rank's: all ranks send as many
            logits = functional.pad(logits, (0, self.most - logits.shape[1]))
        return all_gather(logits, self.group, dim=1)[:, : self.vocab_size].contiguous()


def _share(build: Build, vocab_size: int) -> slice:
    return build.mesh.uneven_share(vocab_size, "attention_tp", WORDS, TOGETHER)
