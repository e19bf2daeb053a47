"""What a plugin provides, kind by kind: the protocols behind the targets that its manifest names.

Torch-free, so that the front process can read tokenizers and configurations without it.
"""

from collections.abc import Hashable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

from engine.errors import PluginError

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    import numpy as np
    import torch
    from tokenizers import Tokenizer

    from engine.params.grammar import Grammar

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "uint8": 1, "int8": 1}


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


class StateGroup(Struct, frozen=True):
    """State of recurrent layers: one tensor of `shape` and `dtype` a layer for each request, however long it is.

    Layers that keep two tensors (Mamba's convolution and its state) declare two groups; `name` tells them apart. Sizes
    are those of one rank: a layer that is divided over ranks declares its own share, and a stage its own layers.
    """

    name: str
    layers: int
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise PluginError(f"states {self.name!r} are of type {self.dtype!r}; known are {', '.join(DTYPE_BYTES)}")

    @property
    def slot_bytes(self) -> int:
        """Bytes of one request over all layers of the group."""
        return self.layers * prod(self.shape) * DTYPE_BYTES[self.dtype]


class KVSpec(Struct, frozen=True):
    """What a model keeps of requests, declared by it together with its attention backend: pages, and states.

    A page is `page_size` consecutive tokens of one request in every layer of every group. `states` are what a request
    holds once. A copy of them at the end of a cached prefix lies in `state_pages` of the cache, as bytes. Without it a
    prefix serves nobody, so a model that has states and no groups computes every prompt from its first token.
    """

    page_size: int
    groups: tuple[KVGroup, ...]
    states: tuple[StateGroup, ...] = ()

    def __post_init__(self) -> None:
        names = [group.name for group in self.states]
        if len(set(names)) < len(names):
            raise PluginError(f"two groups of states have one name, in {', '.join(names)}; give each its own")

    @property
    def page_bytes(self) -> int:
        return sum(group.page_bytes for group in self.groups)

    @property
    def slot_bytes(self) -> int:
        """Bytes of the states of one request."""
        return sum(group.slot_bytes for group in self.states)

    @property
    def state_pages(self) -> int:
        """Pages that a copy of the states of one request takes; 0 where there are none, or no pages."""
        return -(-self.slot_bytes // self.page_bytes) if self.page_bytes else 0


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

    Constructing it and calling `config()` and `text()` need no torch. One whose models may see has a method
    `processor()` too, which returns what it says of the processing of media, in the terms of processor_config.json:
    `image_processor` and `video_processor`.
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


class Waiting(Struct, frozen=True, kw_only=True):
    """A request in the waiting queue, as a policy sees it. Lengths are in tokens.

    `arrival` numbers requests as they came. `length` tokens are to be computed, less what the cache holds: the prompt
    of `prompt_len`, and what was generated before the request had to give its pages back. At most `max_new` are still
    to be generated.
    """

    arrival: int
    priority: int
    prompt_len: int
    length: int
    max_new: int


class Policy(Protocol):
    """Orders the waiting queue before each step. Pure; called with at most a few hundred requests."""

    def order(self, waiting: "Sequence[Waiting]", matched: "Sequence[int]") -> list[int]:
        """Indices of `waiting` (given by priority, then arrival), first to run first; `matched[i]` tokens of
        waiting[i] are cached. `needs_match` False says that `matched` is not looked at."""
        ...

    needs_match: bool


# ── commands ─────────────────────────────────────────────────────────────────────────────────


class Command(Protocol):
    """A subcommand of `engine`. Made and asked only when it is the one that is called."""

    def add_arguments(self, parser: "ArgumentParser") -> None:
        """Declare its arguments. `--plugins` is there already."""
        ...

    def run(self, arguments: "Namespace") -> int:
        """Do it; the exit code. A ConfigError ends it with one line and the code 2."""
        ...
