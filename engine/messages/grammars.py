"""Grammars as needs of requests, and between the compiler actor and its process."""

import msgspec

from engine.messages.assets import Need
from engine.messages.base import Message, Part
from engine.params.grammar import Grammar

GRAMMAR = "grammar"  # the kind of these needs


class Compile(Message, frozen=True):
    """compiler actor → its process: a grammar that a request waits for, and how many tokens the model has."""

    number: int
    grammar: Grammar
    vocab_size: int


class Compiled(Message, frozen=True):
    """compiler process → its actor: what became of it, after `seconds`: what `engine` packed of `grammar`, as that was
    given to it, or the error of all that wait (fields as in RequestError; `param` is "grammar", or "format" where what
    is refused is what stands beside a grammar's tools). `lasting` says that it would be the same again."""

    number: int
    seconds: float
    engine: str = ""
    grammar: Grammar | None = None
    packed: bytes = b""
    status: int = 0
    code: str = ""
    cause: str = ""
    lasting: bool = True
    param: str = "grammar"


class PackedGrammar(Part, frozen=True):
    """The payload that a worker loads; see Compiled."""

    engine: str
    grammar: Grammar
    packed: bytes


def grammar_need(grammar: Grammar) -> Need:
    """The need of a request for `grammar`. Where that begins (`after`) is the request's own, and not shared."""
    content = msgspec.msgpack.encode(msgspec.structs.replace(grammar, after=""))
    return Need(GRAMMAR, content, grammar.after.encode())
