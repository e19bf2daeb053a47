"""The decoder that most dense models are, with their differences as data.

    ids ─ embed ─┬─ norm ─ q,k,v ─ rotate ─ attention ─ o ─(+)─┬─ norm ─ gate,up ─ act·mul ─ down ─(+)─ … ─ norm ─ head
                 └─────────────────────────────────────────────┘  └─────────────────────────────────────┘

A model family is a `CausalLM` that reads its config.json into a `DecoderShape`; one that wires its blocks otherwise
sets `block`. Module paths are the weights' names in Hugging Face checkpoints. Layers may attend linearly (delta.py).
Left out: norms that are not RMS, layers that differ in more than their attention and whether they are a mixture of
experts.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.kernels.dense.reference import HeadNorms
from engine.layers.activation import gated_activation
from engine.layers.attention import Attention
from engine.layers.batch import Batch
from engine.layers.build import Build
from engine.layers.delta import GatedDeltaNet
from engine.layers.dispatch import Dispatch
from engine.layers.embedding import Embedding, LMHead
from engine.layers.linear import ColumnLinear, QKVLinear, ReplicatedLinear, RowLinear
from engine.layers.model import Elsewhere, Layer, Model
from engine.layers.moe import Experts, Mixture, Router, SparseMLP
from engine.layers.norm import RMSNorm
from engine.layers.rotary import Rotary
from engine.layers.spread import over_copies
from engine.parallel.collectives import all_reduce
from engine.parallel.mesh import Axis
from engine.plugin.specs import LazyTensor
from engine.plugin.terms import MANY, Terms

SILU = ("silu", "swish")  # two names of one activation
Rotations = Sequence[tuple[Tensor, Tensor]]  # per KV group: the cosines and sines of the step's positions


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKind:
    """What layers of one kind share, hence one KV group: how far they see, and the `rope` options that Rotary reads."""

    rope: Mapping[str, Any]
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """Sizes and options of a decoder; `layers[i]` says which of `kinds` layer i is, None that it does not attend."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    kinds: tuple[AttentionKind, ...]
    layers: tuple[int | None, ...]
    activation: str = "silu"
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False  # each query and key head passes an RMSNorm before it is rotated
    gated: bool = False  # what a query head attends to is multiplied by the sigmoid of numbers of its token
    norm_offset: float = 0.0  # added to the weights of all norms
    scale: float | None = None  # of attention scores; by default head_dim ** -0.5
    embedding_scale: float = 1.0
    logit_cap: float | None = None  # logits are squeezed into -cap .. cap
    # Whether attention and MLP sum over the ranks. If not, the norm sums that adds what they say to the stream, in one
    # kernel: a CausalLM whose blocks do no more with it than that says so.
    summed: bool = True
    mixture: Mixture | None = None  # of experts, in the place of the MLP of the layers that it names

    @classmethod
    def of(cls, config: Mapping[str, Any], **differences: Any) -> Self:
        """From config.json's usual terms, then `differences`, which are fields of this class.

        Raises ConfigError for a term that is missing, of another kind or out of its range, and for terms that do not
        go together."""
        terms = Terms.of(config)
        heads, size = terms.integer("num_attention_heads"), terms.integer("hidden_size")
        usual: dict[str, Any] = {
            "vocab_size": terms.integer("vocab_size"),
            "hidden_size": size,
            "intermediate_size": terms.integer("intermediate_size"),
            "query_heads": heads,
            "kv_heads": terms.integer("num_key_value_heads", heads),
            "head_dim": terms.integer("head_dim", None) or size // heads,
            "epsilon": terms.number("rms_norm_eps"),
            "kinds": (AttentionKind(rope=terms),),
            "layers": (0,) * terms.integer("num_hidden_layers", high=MANY),
            "activation": terms.word("hidden_act", "silu"),
            "tied": terms.flag("tie_word_embeddings"),
        }
        shape = cls(**usual | differences)
        shape.check(terms)
        return shape

    def check(self, terms: Terms) -> None:
        """Raises ConfigError for sizes that do not go together; `terms` are where they are from."""
        if self.query_heads % self.kv_heads:
            raise terms.wrong("num_key_value_heads", f"a divisor of the {self.query_heads} num_attention_heads")
        if self.head_dim == 0:
            raise terms.wrong("num_attention_heads", f"at most hidden_size, which is {self.hidden_size}")
        if len(self.layers) != terms["num_hidden_layers"]:
            raise terms.wrong("layer_types", f"a list of {terms['num_hidden_layers']} names, one for each hidden layer")

    def norm(self, build: Build, size: int) -> RMSNorm:
        return RMSNorm(build, size, self.epsilon, self.norm_offset)

    def stream_norm(self, build: Build) -> RMSNorm:
        """One that adds what attention or an MLP says to the stream."""
        return RMSNorm(build, self.hidden_size, self.epsilon, self.norm_offset, sums=not self.summed)

    def mlp(self, build: Build, layer: int) -> nn.Module:
        """What comes after the attention of that layer; copies of attention share it."""
        if build.mesh.dp == 1 and build.ways is None:
            return self._mlp(build, layer)
        mlp = replace(self, summed=False)._mlp(build, layer)
        if isinstance(mlp, SparseMLP) and build.ways is not None:
            mlp.forward = Dispatch(mlp, build, build.ways, summed=self.summed)  # type: ignore[method-assign]
        else:
            mlp.forward = over_copies(mlp.forward, build, summed=self.summed)  # it stays at its path in checkpoints
        return mlp

    def _mlp(self, build: Build, layer: int) -> nn.Module:
        mixture = self.mixture
        if mixture is None or layer not in mixture.layers:
            return GatedMLP(self, build, summed=self.summed)
        if self.activation not in SILU:
            raise ConfigError(f"experts with the activation {self.activation!r} are not supported; known is silu")
        size, count = self.hidden_size, mixture.routing.experts
        axis: Axis = "tp" if build.ways is None else "attention_tp"  # of all tokens, or those of a copy of attention
        shared = GatedMLP(self, build, mixture.shared, summed=False, axis=axis) if mixture.shared else None
        weigher = ReplicatedLinear(build, size, 1) if shared is not None and mixture.shared_gate else None
        router = Router(build, mixture.routing, size, mixture.corrected)
        experts = Experts(build, count, size, mixture.inner, mixture.parts, summed=self.summed)
        return SparseMLP(router, experts, shared, weigher)


class Decoder(nn.Module):
    """Embedding, blocks and the norm after them: of `blocks`, by number, those that this stage of a pipeline holds, the
    embedding where it has the first one, or the head shares its matrix, and the norm where it has the last one."""

    def __init__(self, shape: DecoderShape, build: Build, blocks: Mapping[int, "Block"]) -> None:
        super().__init__()
        self.count = len(shape.layers)  # of the blocks that are run: a model may hold further ones
        embeds, ends = 0 in blocks, self.count - 1 in blocks
        embeds = embeds or (ends and shape.tied)
        self.embed_tokens = Embedding(build, shape.vocab_size, shape.hidden_size) if embeds else Elsewhere()
        self.layers = nn.ModuleList(blocks.get(layer, Elsewhere()) for layer in range(self.count))
        self.norm = shape.stream_norm(build) if ends else Elsewhere()
        # What is still to be added is a part of a sum over these.
        self.parts = None if shape.summed else build.group("attention_tp")
        # rounded as the weights are, because the models were trained so
        self.embedding_scale = float(torch.tensor(shape.embedding_scale, dtype=build.dtype))

    def embed(self, batch: Batch) -> Tensor:
        hidden: Tensor = self.embed_tokens(batch.ids)
        hidden = hidden if self.embedding_scale == 1.0 else hidden * self.embedding_scale
        return hidden if batch.media is None else batch.media.into(hidden)

    def run(self, hidden: Tensor, batch: Batch, rotations: Rotations, first: int, last: int) -> Tensor:
        """Blocks first .. last-1, and after the last of all the norm. Between ranges the stream and what is still to be
        added to it are their sum: one tensor [T, H]."""
        stream = None
        for layer, block in enumerate(islice(self.layers, first, last), first):
            hidden, stream = block(hidden, stream, batch, rotations)
            if batch.media is not None:
                batch.media.behind(layer, stream)
        if last == self.count:
            assert isinstance(self.norm, RMSNorm)
            return self.norm.add(hidden, stream)[0]
        if stream is None:
            return hidden
        return (hidden if self.parts is None else all_reduce(hidden, self.parts)) + stream


class Block(nn.Module):
    """Attention, then an MLP; each reads a norm of the stream, and the next norm adds what it says to it.

    Linear attention goes by another name in checkpoints."""

    self_attn: nn.Module
    linear_attn: nn.Module

    def __init__(self, shape: DecoderShape, build: Build, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = shape.stream_norm(build)
        self.linear = isinstance(attention, GatedDeltaNet)
        if self.linear:
            self.linear_attn = attention
        else:
            self.self_attn = attention
        self.post_attention_layernorm = shape.stream_norm(build)
        self.mlp = mlp

    def forward(
        self, hidden: Tensor, stream: Tensor | None, batch: Batch, rotations: Rotations
    ) -> tuple[Tensor, Tensor]:
        """`hidden` [T, H] is still to be added to `stream`, None before the first block; so is what is returned."""
        hidden, stream = self.input_layernorm.add(hidden, stream)
        mixed = self.linear_attn(hidden, batch) if self.linear else self.self_attn(hidden, batch, rotations)
        hidden, stream = self.post_attention_layernorm.add(mixed, stream)
        return self.mlp(hidden, batch), stream


class SelfAttention(Layer):
    """Projections, attention, and the scales of an FP8 cache, where the checkpoint has them.

    The gates of heads are `gate_proj`: checkpoints stack them with the queries, and a model says so (`Model.stacked`).
    """

    extras = ("k_scale", "v_scale", "k_proj.k_scale", "v_proj.v_scale")

    def __init__(self, shape: DecoderShape, build: Build, attention: Attention) -> None:
        super().__init__()
        size, heads, head_dim = shape.hidden_size, shape.query_heads, shape.head_dim
        self.qkv_proj = QKVLinear(build, size, heads, shape.kv_heads, head_dim, shape.qkv_bias)
        self.o_proj = RowLinear(
            build, heads * head_dim, size, shape.output_bias, summed=shape.summed, axis="attention_tp"
        )
        self.q_norm = shape.norm(build, head_dim) if shape.head_norms else None
        self.k_norm = shape.norm(build, head_dim) if shape.head_norms else None
        gates = {"gate_proj": heads * head_dim}
        self.gates = ColumnLinear(build, size, gates, shape.qkv_bias, axis="attention_tp") if shape.gated else None
        self.attention = attention
        self._scales = {"k_scale": 1.0, "v_scale": 1.0}
        self._like = torch.empty(0, dtype=build.dtype, device=build.device)

    @property
    def norms(self) -> HeadNorms | None:
        if self.q_norm is None or self.k_norm is None:
            return None
        return HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.epsilon)

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        scale = float(tensor[(slice(None),) * len(tensor.shape)].to(torch.float32).max())
        if not 0.0 < scale < float("inf"):
            raise ConfigError(f"{name} is {scale} in the checkpoint; a scale is a number above 0: is the file damaged?")
        self._scales[parameter.rpartition(".")[2]] = scale

    def loaded(self) -> None:
        scales = self._scales
        self.attention.scale(scales["k_scale"], scales["v_scale"], self.qkv_proj.heads, self.norms, self._like)

    def forward(self, hidden: Tensor, batch: Batch, rotations: Rotations) -> Tensor:
        rotation = rotations[self.attention.group]
        attended = self.attention(self.qkv_proj(hidden, batch), self.qkv_proj.heads, batch, rotation, self.norms)
        if self.gates is not None:
            attended = attended * self.gates(hidden, batch).sigmoid()
        return self.o_proj(attended, batch)


class GatedMLP(nn.Module):
    """A gated MLP of the shape's intermediate size, or of `inner`. Where it is not `summed`, each rank returns its part
    of the sum."""

    def __init__(
        self, shape: DecoderShape, build: Build, inner: int | None = None, *, summed: bool = True, axis: Axis = "tp"
    ) -> None:
        super().__init__()
        size, inner = shape.hidden_size, inner or shape.intermediate_size
        self.gate_up_proj = ColumnLinear(build, size, {"gate_proj": inner, "up_proj": inner}, shape.mlp_bias, axis=axis)
        self.activation = gated_activation(build, shape.activation)
        self.silu = shape.activation in SILU
        self.down_proj = RowLinear(build, inner, size, shape.mlp_bias, summed=summed, axis=axis)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        if self.silu and self.gate_up_proj.dense and self.down_proj.dense:
            return self.down_proj(self.gate_up_proj.silu(hidden, batch), batch)
        gate_up = self.gate_up_proj(hidden, batch)
        return self.down_proj.gated(gate_up, batch) if self.silu else self.down_proj(self.activation(gate_up), batch)


class CausalLM(Model):
    """A model that is a decoder and a head. A subclass says how its config.json reads.

    One that attends otherwise than by heads with keys and values of their own writes `attention`."""

    staged = True
    in_copies = True
    block: type[Block] = Block
    rotaries: nn.ModuleList  # for each KV group

    def __init__(self, config: dict[str, Any], build: Build) -> None:
        super().__init__(config, build)
        terms = Terms.of(config)
        shape = self.decoder_shape(terms)
        self.vocab_size, self.width = shape.vocab_size, shape.hidden_size
        self.logit_cap = shape.logit_cap
        self.held = build.stage(len(shape.layers))
        attention = self.attention(terms, shape, build)
        blocks = {
            layer: self.block(shape, build, module, shape.mlp(build, layer)) for layer, module in attention.items()
        }
        self.model = Decoder(shape, build, blocks)
        ends = self.held.stop == len(shape.layers)
        tied = self.model.embed_tokens if shape.tied and ends else None
        assert tied is None or isinstance(tied, Embedding)
        self.lm_head = LMHead(build, shape.hidden_size, shape.vocab_size, tied) if ends else Elsewhere()
        self.vocabulary = self.lm_head.divided if isinstance(self.lm_head, LMHead) else None

    @staticmethod
    @abstractmethod
    def shape_of(config: Terms) -> DecoderShape:
        """What `config`, in config.json's terms, says. Raises ConfigError for what would run and be wrong."""

    @classmethod
    def decoder_shape(cls, config: Terms) -> DecoderShape:
        """`shape_of`, and whether the norms sum over the ranks: not those of a `block` of its own, which may have norms
        and a `forward` that do not know of ranks."""
        return replace(cls.shape_of(config), summed=cls.block is not Block)

    def attention(self, config: Terms, shape: DecoderShape, build: Build) -> dict[int, nn.Module]:
        """The attention of each layer that is `held`, by the layer's number. Sets `backends` and `rotaries`.

        A model with layers that do not attend adds what these have in its place."""
        attending = [(layer, kind) for layer in self.held if (kind := shape.layers[layer]) is not None]
        held = [kind for _, kind in attending]
        groups = sorted(set(held))  # kinds that no layer is of get no KV group
        kinds = [shape.kinds[group] for group in groups]
        heads = (shape.query_heads, shape.kv_heads, shape.head_dim)
        backends = tuple(
            build.attention(held.count(group), *heads, scale=shape.scale, window=kind.window)
            for group, kind in zip(groups, kinds, strict=True)
        )
        self.backends = backends
        self.rotaries = nn.ModuleList(Rotary(build, kind.rope, shape.head_dim) for kind in kinds)
        made: dict[int, nn.Module] = {}
        for index, (layer, kind_of_layer) in enumerate(attending):
            group = groups.index(kind_of_layer)
            place = held[:index].count(kind_of_layer)
            made[layer] = SelfAttention(shape, build, Attention(backends[group], place, group))
        return made

    def embed(self, batch: Batch) -> Tensor:
        return self.model.embed(batch)

    def run(self, hidden: Tensor, batch: Batch, first: int, last: int) -> Tensor:
        turns = batch.positions if batch.turns is None else batch.turns
        rotations = [rotary(turns) for rotary in self.rotaries]
        return self.model.run(hidden, batch, rotations, first, last)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._capped(self.lm_head(hidden))

    def own_logits(self, hidden: Tensor) -> Tensor:
        assert isinstance(self.lm_head, LMHead), "the last stage has the head"
        return self._capped(self.lm_head.own(hidden))

    def _capped(self, logits: Tensor) -> Tensor:
        if self.logit_cap is not None:
            logits = logits.to(torch.float32).div_(self.logit_cap).tanh_().mul_(self.logit_cap)
        return logits
