"""What a plugin provides, kind by kind: the registry entries and the protocols behind them.

Torch-free, so that the front process can read manifests, tokenizers and configurations without it.
An entry names its code as "module:attribute"; the code is imported where it is used, once.
"""

from collections.abc import Hashable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Protocol

from msgspec import Struct

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer

    from engine.messages.request import Grammar
    from engine.sched.request import Request

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "uint8": 1, "int8": 1}


# ── registry entries, filled by the hooks ────────────────────────────────────────────────────


class Entry(Struct, frozen=True, kw_only=True):
    """What every kind shares: a `name` users type and a `target` "module:attribute"."""

    name: str
    target: str
    description: str = ""


class ModelEntry(Entry, frozen=True, kw_only=True):
    """A model family. `architectures` are the names of config.json that it answers to."""

    architectures: tuple[str, ...]


class AttentionEntry(Entry, frozen=True, kw_only=True):
    """An attention backend. Of those that run on a device, the highest `preference` is chosen."""

    devices: tuple[str, ...]
    preference: int = 0


class CheckpointEntry(Entry, frozen=True, kw_only=True):
    """A checkpoint format. `models` maps names that come with it ("smollm2-135m") to what they are."""

    models: dict[str, str] = {}


class QuantizationEntry(Entry, frozen=True, kw_only=True):
    """A quantization. `methods` are the `quant_method`s of config.json that it reads."""

    methods: tuple[str, ...] = ()


class PolicyEntry(Entry, frozen=True, kw_only=True):
    """An order of the waiting queue."""


class ParserEntry(Entry, frozen=True, kw_only=True):
    """A parser of replies. It is chosen for a model whose chat template holds all of `markers`, the one with the most
    of them first, else for a model of one of `architectures`."""

    kind: Literal["tool", "reasoning"]
    markers: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()


class GrammarEntry(Entry, frozen=True, kw_only=True):
    """A grammar engine. Those that are installed are asked in order of `preference`, the highest first; the first that
    takes a grammar has it. `kinds` are those of messages.GrammarKind, `package` is what `pip install` must have got."""

    kinds: tuple[str, ...]
    package: str
    preference: int = 0


# ── KV memory ────────────────────────────────────────────────────────────────────────────────


class KVGroup(Struct, frozen=True):
    """Layers that share one page layout: `shape` and `dtype` of one page of one layer."""

    layers: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers of the group."""
        return self.layers * prod(self.shape) * DTYPE_BYTES[self.dtype]


class KVSpec(Struct, frozen=True):
    """Bytes and layout of a page, declared by a model together with its attention backend.

    A page is `page_size` consecutive tokens of one request in every layer of every group.
    """

    page_size: int
    groups: tuple[KVGroup, ...]

    @property
    def page_bytes(self) -> int:
        return sum(group.page_bytes for group in self.groups)


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────


class TextSpec(Struct, frozen=True):
    """A checkpoint's tokenizer and what goes with it.

    `eos_ids` end a reply; chat templates refer to `bos_token`, `eos_token` and those in `special_tokens`, by their
    names. Where the tokenizer's own post-processor does not add the first token, `add_bos` says to do so.
    `named_templates` are further chat templates: "tool_use" is for conversations with tools. `generation`
    is what the model's makers recommend, in the terms of generation_config.json: temperature, top_p and so on.
    """

    tokenizer: "Tokenizer"
    eos_ids: tuple[int, ...]
    bos_id: int | None = None
    add_bos: bool = False
    bos_token: str = ""
    eos_token: str = ""
    chat_template: str | None = None
    generation: dict[str, Any] = {}
    special_tokens: dict[str, str] = {}
    named_templates: dict[str, str] = {}


class LazyTensor(Protocol):
    """A weight not read yet. Indexing with slices reads just that part, as a CPU torch tensor.

    A matrix that is stored in blocks may have a method `packed(rows: slice, columns: slice)` which returns that part as
    tuple[str, numpy.ndarray]: GGUF's name of the block type and the uint8 bytes [rows, bytes of a row], for kernels
    that work on them as they are. It returns None where `columns` begin or end within a block. Bytes that are read-only
    lie in a mapped file, and are copied by whoever keeps them.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: "slice | tuple[slice, ...]") -> "torch.Tensor": ...


class Checkpoint(Protocol):
    """One opened model: its configuration, its text and its weights, under Hugging Face names.

    Constructing it and calling `config()` and `text()` need no torch.
    """

    @classmethod
    def open(cls, model: str) -> "Checkpoint | None":
        """Open `model`, a path or a name; None when it is not of this format.

        Raises ConfigError when it is of this format but broken."""
        ...

    def name(self) -> str:
        """A short name to serve the model under."""
        ...

    def config(self) -> dict[str, Any]:
        """The configuration in config.json's terms, with `architectures`."""
        ...

    def text(self) -> TextSpec: ...

    def tensors(self) -> Iterator[tuple[str, LazyTensor]]:
        """Every weight, named as Hugging Face transformers names it, in the file's order."""
        ...


# ── grammars ─────────────────────────────────────────────────────────────────────────────────


class Vocabulary(Struct, frozen=True):
    """What a grammar engine must know of a model: the bytes of each token, by id.

    Ids that no text has are empty. Of `special` tokens the bytes are their name, which is never text; `eos_ids`, which
    are special, end a reply.
    """

    tokens: list[bytes]
    special: frozenset[int]
    eos_ids: tuple[int, ...]


class Matcher(Protocol):
    """Where one reply is in its grammar. Advanced by its engine alone; `error` is not empty once it cannot go on for a
    reason other than a token that may not come.

    Those of one compiled grammar that have the same `state`, if not None, have the same mask, and it is not asked for
    again while it is remembered. `accept` alone changes it, or `fill` to None."""

    @property
    def state(self) -> Hashable | None: ...

    @property
    def error(self) -> str: ...


class CompiledGrammar(Protocol):
    """A grammar made ready; never changed, and shared by replies."""

    def packed(self) -> bytes:
        """What `GrammarEngine.load` takes in place of compiling: nothing where that is as quick."""
        ...

    def matcher(self) -> Matcher:
        """At the beginning of a reply."""
        ...


class GrammarEngine(Protocol):
    """Grammars over one vocabulary. `threads` may fill masks at a time; without `whitespace` JSON has none between its
    tokens, with it not much at a time, so that no reply goes on in spaces for ever.

    `compile` may take long and as much memory as it likes, for it runs where it can be killed; what else is here must
    not. An eos id is let through where a reply may end, and nothing else where it must.
    """

    def __init__(self, vocabulary: Vocabulary, *, threads: int, whitespace: bool) -> None: ...

    def compile(self, grammar: "Grammar") -> CompiledGrammar:
        """Raises RequestError naming the keyword, or the place, for what cannot be held to exactly: its code is
        invalid_grammar, unsupported_keyword (of JSON Schema), or unsupported_grammar, for what another engine may take.
        """
        ...

    def load(self, grammar: "Grammar", packed: bytes) -> CompiledGrammar:
        """What `compile` made of `grammar` in another process, from its `packed`."""
        ...

    def accept(self, matchers: "Sequence[Any]", tokens: "Sequence[int]") -> list[bool]:
        """Advance each matcher by a token; False where that is none that its last mask let through."""
        ...

    def fill(self, matchers: "Sequence[Any]", masks: "np.ndarray", rows: "Sequence[int]") -> None:
        """Write into row `rows[i]` of `masks` (int32, 32 tokens a word, the lowest bit first) what may come next in
        `matchers[i]`."""
        ...


# ── policies ─────────────────────────────────────────────────────────────────────────────────


class Policy(Protocol):
    """Orders the waiting queue before each step. Pure; called with at most a few hundred requests."""

    def order(self, waiting: "Sequence[Request]", matched: "Sequence[int]") -> list[int]:
        """Indices of `waiting` (given by priority, then arrival), first to run first; `matched[i]` tokens of
        waiting[i] are cached. `needs_match` False says that `matched` is not looked at."""
        ...

    needs_match: bool
