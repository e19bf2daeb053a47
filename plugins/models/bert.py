"""BERT (arXiv:1810.04805) as an encoder of texts: MiniLM, BGE, GTE, E5 and what else shares its shape.

    ids ─ word + position + type ─ norm ─┬─ q,k,v ─ attention ─ dense ─(+)─ norm ─┬─ dense ─ act ─ dense ─(+)─ norm ─ …
                                         └──────────────────────────────┘         └────────────────────────┘

Every token sees its whole prompt. Rows of similar length attend together, padded to the longest of them. Module paths
are the weights' names in Hugging Face checkpoints, with or without `bert.` before them. Left out: the heads that BERT
was trained with, a second text (`token_type_ids` are 0), relative positions.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.plugin import LONGEST, MANY, ConfigError, LazyTensor, Terms
from engine.plugin.layers import (
    Batch,
    Build,
    ColumnLinear,
    Embedding,
    Encoder,
    LayerNorm,
    QKVLinear,
    RowLinear,
    over_copies,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}
SHORTEST = 16  # rows of up to so many tokens are padded to one length
UNUSED = ("pooler.", "cls.")  # heads of the training tasks
OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}  # of norms, in the first checkpoints


# ── attention over whole prompts ─────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Group:
    """r rows that attend together, padded to l tokens: which tokens of the step they are, and which are real.

    All is worked out on the host: to count what is real on a device would wait for it, in every layer."""

    tokens: Tensor  # [r, l] int64: of the step, 0 for padding
    mask: Tensor | None  # [r, 1, 1, l] bool: what is to be seen; None if there is no padding
    real: Tensor  # [n] int64: of the r * l, those that are no padding
    targets: Tensor  # [n] int64: which tokens of the step these are


def grouped(batch: Batch) -> list[Group]:
    """The rows of `batch`, those of similar length together: at most twice the longest of a group is padding."""
    device = batch.ids.device

    def upload(numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(device, non_blocking=True)

    sizes = np.ceil(np.log2(np.maximum(batch.lengths, SHORTEST)))
    groups = []
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        lengths = batch.lengths[rows, None]
        places = np.arange(lengths.max())[None]
        real = places < lengths
        tokens = np.where(real, batch.offsets[rows, None] + places, 0)
        mask = None if real.all() else upload(real[:, None, None])
        groups.append(Group(upload(tokens), mask, upload(np.flatnonzero(real)), upload(tokens[real])))
    return groups


def attend(query: Tensor, key: Tensor, value: Tensor, groups: list[Group]) -> Tensor:
    """Each token over all of its row's: [T, heads, dim] each, to [T, heads * dim]."""
    out = torch.empty_like(query)
    for group in groups:
        q, k, v = (part[group.tokens].transpose(1, 2) for part in (query, key, value))  # [r, heads, l, dim]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=group.mask)
        out[group.targets] = mixed.transpose(1, 2).flatten(0, 1)[group.real]
    return out.flatten(1)


# ── the model ────────────────────────────────────────────────────────────────────────────────


class Embeddings(nn.Module):
    def __init__(self, config: Terms, build: Build) -> None:
        super().__init__()
        size = config.integer("hidden_size")
        self.word_embeddings = Embedding(build, config.integer("vocab_size"), size)
        self.position_embeddings = Embedding(
            build, config.integer("max_position_embeddings", high=LONGEST), size, divided=False
        )
        self.token_type_embeddings = Embedding(build, config.integer("type_vocab_size"), size, divided=False)
        self.LayerNorm = LayerNorm(build, size, config.number("layer_norm_eps"))

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.word_embeddings(batch.ids) + self.position_embeddings(batch.positions)
        return self.LayerNorm(hidden + self.token_type_embeddings(torch.zeros_like(batch.ids[:1])))


class Projections(nn.Module):
    """Query, key and value of all heads."""

    def __init__(self, config: Terms, build: Build) -> None:
        super().__init__()
        size, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
        if size % heads:
            raise config.wrong("num_attention_heads", f"a divisor of hidden_size, which is {size}")
        self.head_dim = size // heads
        self.qkv = QKVLinear(build, size, heads, heads, self.head_dim, bias=True, parts=("query", "key", "value"))

    def forward(self, hidden: Tensor, batch: Batch) -> Iterable[Tensor]:
        return self.qkv(hidden, batch).unflatten(1, (3, -1, self.head_dim)).unbind(1)


class Output(nn.Module):
    """The last projection of a part of a block, and the norm of what that says and what the part was told."""

    def __init__(self, config: Terms, build: Build, dense: RowLinear) -> None:
        super().__init__()
        self.dense = dense
        self.LayerNorm = LayerNorm(build, config.integer("hidden_size"), config.number("layer_norm_eps"))

    def forward(self, said: Tensor, told: Tensor) -> Tensor:
        return self.LayerNorm(said + told)


class Block(nn.Module):
    def __init__(self, config: Terms, build: Build) -> None:
        super().__init__()
        size, inner = config.integer("hidden_size"), config.integer("intermediate_size")
        attended = RowLinear(build, size, size, bias=True, axis="attention_tp")
        parts = {"self": Projections(config, build), "output": Output(config, build, attended)}
        self.attention = nn.ModuleDict(parts)  # as one of its names cannot be an attribute
        self.intermediate = nn.ModuleDict({"dense": ColumnLinear(build, size, inner, bias=True)})
        self.output = Output(config, build, RowLinear(build, inner, size, bias=True, summed=False))
        self.activation = ACTIVATIONS[config["hidden_act"]]
        self.mlp = over_copies(self._mlp, build)

    def forward(self, hidden: Tensor, batch: Batch, groups: list[Group]) -> Tensor:
        output = self.attention["output"]
        assert isinstance(output, Output)
        query, key, value = self.attention["self"](hidden, batch)
        hidden = output(output.dense(attend(query, key, value, groups), batch), hidden)
        return self.output(self.mlp(hidden, batch), hidden)

    def _mlp(self, hidden: Tensor, batch: Batch) -> Tensor:
        made: Tensor = self.output.dense(self.activation(self.intermediate["dense"](hidden, batch)), batch)
        return made


class Blocks(nn.Module):
    def __init__(self, config: Terms, build: Build, count: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(config, build) for _ in range(count))

    def forward(self, hidden: Tensor, batch: Batch, first: int, last: int) -> Tensor:
        groups = grouped(batch)
        for block in islice(self.layer, first, last):
            hidden = block(hidden, batch, groups)
        return hidden


class Bert(Encoder):
    """Its vectors are what `pooling` in the configuration says: the mean of a prompt's tokens, or its first token
    ("cls"); of length 1 if `normalize`. Without `pooling` they are means of length 1."""

    in_copies = True

    def __init__(self, config: Terms, build: Build) -> None:
        config = Terms.of(config)
        super().__init__(config, build)
        check_config(config)
        pooling = config.section("pooling")
        self.mode = pooling.word("mode", "mean")
        self.normalize = pooling.flag("normalize", True)
        self.vocab_size = config.integer("vocab_size")
        self.embedding_size = config.integer("hidden_size")
        self.embeddings = Embeddings(config, build)
        layers = config.integer("num_hidden_layers", high=MANY)
        self.held = range(layers)
        self.encoder = Blocks(config, build, layers)

    def embed(self, batch: Batch) -> Tensor:
        return self.embeddings(batch)

    def run(self, hidden: Tensor, batch: Batch, first: int, last: int) -> Tensor:
        return self.encoder(hidden, batch, first, last)

    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        firsts = batch.row_offsets[:-1]
        if self.mode == "cls":
            vectors = hidden[firsts].to(torch.float32)
        else:
            lengths = batch.row_offsets[1:] - firsts
            rows = torch.arange(len(lengths), device=hidden.device)
            rows = rows.repeat_interleave(lengths, output_size=len(hidden))
            sums = torch.zeros(len(lengths), hidden.shape[1], device=hidden.device)
            vectors = sums.index_add_(0, rows, hidden.to(torch.float32)) / lengths[:, None]
        return functional.normalize(vectors, dim=1) if self.normalize else vectors

    def load(self, tensors: Iterable[tuple[str, LazyTensor]]) -> None:
        """As Model.load, under any of the names that BERT's weights have had."""
        super().load(renamed(tensors))


def renamed(tensors: Iterable[tuple[str, LazyTensor]]) -> Iterator[tuple[str, LazyTensor]]:
    """The weights of the encoder alone, as a BertModel of today names them."""
    for name, tensor in tensors:
        name = name.removeprefix("bert.")
        for old, new in OLD_NAMES.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if not name.startswith(UNUSED) and not name.endswith("position_ids"):
            yield name, tensor


def check_config(config: Terms) -> None:
    """Raises ConfigError for a configuration that would run and be wrong."""
    activation = config.word("hidden_act")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"the activation {activation!r} is not supported; known are {', '.join(ACTIVATIONS)}")
    kind = config.word("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ConfigError(f"position_embedding_type {kind!r} is not supported; only 'absolute' is")
    if config.get("is_decoder"):
        raise ConfigError("is_decoder is true: this model class sees prompts whole, and is no decoder")
    mode = config.section("pooling").word("mode", "mean")
    if mode not in ("mean", "cls"):
        raise ConfigError(f"pooling mode {mode!r} is not supported; known are mean, cls")
