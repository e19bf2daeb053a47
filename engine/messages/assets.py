"""Grammars on their way: to the compiler, and to the device."""

from engine.messages.base import Message
from engine.messages.request import Grammar


class Compile(Message, frozen=True):
    """scheduler → compiler: a grammar that a request waits for, and how many tokens the model has. Numbers begin with 1
    and are not used again."""

    number: int
    grammar: Grammar
    vocab_size: int


class Compiled(Message, frozen=True):
    """compiler → scheduler: what became of it, after `seconds`: what `engine` packed of `grammar`, as that was given
    to it, or the error of all that wait (fields as in RequestError; `param` is "grammar", or "format" where what is
    refused is what stands beside a grammar's tools). `lasting` says that it would be the same again."""

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


class LoadGrammar(Message, frozen=True):
    """scheduler → rank 0: get this ready for rows that come with its number; see Compiled."""

    number: int
    engine: str
    grammar: Grammar
    packed: bytes


class GrammarLoaded(Message, frozen=True):
    """rank 0 → scheduler: it is ready, or it cannot be, for a reason."""

    number: int
    cause: str = ""


class DropGrammar(Message, frozen=True):
    """scheduler → rank 0: no row will come with this number again."""

    number: int
