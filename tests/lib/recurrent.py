"""A toy model of two recurrent layers with an attention layer between them, and what it computes by the definition.

A recurrent layer keeps two tensors of a request: the last inputs of a short convolution, and the state of a gated
linear recurrence, state = keep * state + (1 - keep) * value. It computes token by token from tensors alone, so that a
captured step can hold it."""

from typing import Any

import torch
from torch import Tensor, nn

from engine.plugin import StateGroup, Terms, hookimpl
from engine.plugin.layers import (
    Attention,
    Batch,
    Build,
    ColumnLinear,
    Elsewhere,
    Embedding,
    LMHead,
    Model,
    QKVLinear,
    RowLinear,
)

API = 1
SIZE, INNER, HEADS, WIDTH, VOCABULARY = 16, 12, 2, 3, 24
KINDS = ("recurrent", "attention", "recurrent")
CONFIG = {
    "architectures": ["ToyRecurrent"],
    "vocab_size": VOCABULARY,
    "hidden_size": SIZE,
    "inner_size": INNER,
    "num_attention_heads": HEADS,
    "layer_types": list(KINDS),
    "max_position_embeddings": 64,
}


@hookimpl
def register_models(register: Any) -> None:
    register("toy-recurrent", f"{__name__}:ToyRecurrent", architectures=("ToyRecurrent",))


class Recurrence(nn.Module):
    """Layer `place` of those that keep states."""

    def __init__(self, build: Build, size: int, inner: int, place: int) -> None:
        super().__init__()
        self.in_proj = ColumnLinear(build, size, {"value_proj": inner, "gate_proj": inner})
        self.out_proj = RowLinear(build, inner, size)
        self.place = place

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        window = batch.states["window"][self.place]
        state = batch.states["state"][self.place]
        value, gate = self.in_proj(hidden, batch).to(state.dtype).chunk(2, dim=-1)
        rows = batch.token_rows()
        slots = batch.slots[rows]
        mixed = torch.empty_like(value)
        for token in range(len(hidden)):
            slot = slots[token : token + 1]
            seen = torch.cat((window[slot], value[token, None, None]), dim=1)
            state[slot] += (1 - gate[token].sigmoid()) * (seen.mean(dim=1) - state[slot])
            window[slot] = seen[:, 1:]
            mixed[token] = state[slot][0]
        return self.out_proj(mixed.to(hidden.dtype), batch)


class SelfAttention(nn.Module):
    def __init__(self, build: Build, size: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.qkv_proj = QKVLinear(build, size, heads, heads, size // heads)
        self.o_proj = RowLinear(build, size, size)
        self.attention = attention

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        return self.o_proj(self.attention(self.qkv_proj(hidden, batch), self.qkv_proj.heads, batch), batch)


class ToyRecurrent(Model):
    """`layer_types` says which layers recur and which attend."""

    staged = True

    def __init__(self, config: Terms, build: Build) -> None:
        super().__init__(config, build)
        size, inner, heads = (
            config.integer(f"{name}") for name in ("hidden_size", "inner_size", "num_attention_heads")
        )
        kinds = config["layer_types"]
        self.vocab_size, self.width = config.integer("vocab_size"), size
        self.held = build.stage(len(kinds))
        held = [kinds[layer] for layer in self.held]
        attends, recurs = held.count("attention"), held.count("recurrent")
        self.backends = (build.attention(attends, heads, heads, size // heads),) if attends else ()
        share = build.local(inner)
        shapes = {"window": (WIDTH - 1, share), "state": (share,)}
        self.states = tuple(StateGroup(name, recurs, shape, "float32") for name, shape in shapes.items() if recurs)
        layers: list[nn.Module] = [Elsewhere() for _ in kinds]
        for index, layer in enumerate(self.held):
            place = held[:index].count(held[index])
            if held[index] == "recurrent":
                layers[layer] = Recurrence(build, size, inner, place)
            else:
                layers[layer] = SelfAttention(build, size, heads, Attention(self.backends[0], place))
        self.embed_tokens = Embedding(build, self.vocab_size, size) if 0 in self.held else Elsewhere()
        self.layers = nn.ModuleList(layers)
        self.lm_head = LMHead(build, size, self.vocab_size) if len(kinds) - 1 in self.held else Elsewhere()

    def embed(self, batch: Batch) -> Tensor:
        embedded: Tensor = self.embed_tokens(batch.ids)
        return embedded

    def run(self, hidden: Tensor, batch: Batch, first: int, last: int) -> Tensor:
        for layer in self.layers[first:last]:
            hidden = hidden + layer(hidden, batch)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return logits


# ── by the definition ────────────────────────────────────────────────────────────────────────


def weights(kinds: tuple[str, ...] = KINDS) -> dict[str, Tensor]:
    shapes = {"embed_tokens": (VOCABULARY, SIZE), "lm_head": (VOCABULARY, SIZE)}
    for layer, kind in enumerate(kinds):
        if kind == "recurrent":
            parts = {"value_proj": (INNER, SIZE), "gate_proj": (INNER, SIZE), "out_proj": (SIZE, INNER)}
        else:
            parts = {f"{name}_proj": (SIZE, SIZE) for name in "qkvo"}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in parts.items()}
    generator = torch.Generator().manual_seed(0)
    return {f"{name}.weight": torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}


def reference(ids: list[int], kinds: tuple[str, ...] = KINDS) -> Tensor:
    """Logits [len(ids), VOCABULARY] in float64, all of them computed from the first token on."""
    weight = {name.removesuffix(".weight"): tensor.double() for name, tensor in weights(kinds).items()}
    hidden = weight["embed_tokens"][ids]
    for layer, kind in enumerate(kinds):
        own = {name: weight[f"layers.{layer}.{name}"] for name in _PARTS[kind]}
        hidden = hidden + (_recurred(hidden, own) if kind == "recurrent" else _attended(hidden, own))
    return (hidden @ weight["lm_head"].T).float()


_PARTS = {
    "recurrent": ("value_proj", "gate_proj", "out_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


def _recurred(hidden: Tensor, weight: dict[str, Tensor]) -> Tensor:
    value, keep = hidden @ weight["value_proj"].T, (hidden @ weight["gate_proj"].T).sigmoid()
    padded = torch.cat((value.new_zeros(WIDTH - 1, INNER), value))
    mean = sum(padded[back : back + len(value)] for back in range(WIDTH)) / WIDTH
    state, states = value.new_zeros(INNER), []
    for now, kept in zip(mean, keep, strict=True):
        state = kept * state + (1 - kept) * now
        states.append(state)
    return torch.stack(states) @ weight["out_proj"].T


def _attended(hidden: Tensor, weight: dict[str, Tensor]) -> Tensor:
    count = len(hidden)
    query, key, value = ((hidden @ weight[f"{name}_proj"].T).view(count, HEADS, -1).transpose(0, 1) for name in "qkv")
    scores = query @ key.transpose(1, 2) / (SIZE // HEADS) ** 0.5
    unseen = torch.ones(count, count, dtype=torch.bool).triu(1)
    attended = scores.masked_fill(unseen, -torch.inf).softmax(-1) @ value
    return attended.transpose(0, 1).reshape(count, SIZE) @ weight["o_proj"].T


def greedy(ids: list[int], count: int, kinds: tuple[str, ...] = KINDS) -> list[int]:
    """The next `count` ids."""
    known = list(ids)
    for _ in range(count):
        known.append(int(reference(known, kinds)[-1].argmax()))
    return known[len(ids) :]
