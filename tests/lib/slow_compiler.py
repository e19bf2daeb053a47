"""python slow_compiler.py FD: the compiler, around an engine whose grammars say what becomes of their compilation."""

import os
import sys
import time
from typing import Any

from engine.errors import RequestError
from engine.grammars import compiler
from engine.grammars.engines import Engines
from engine.params.grammar import Grammar
from engine.plugin.hookspecs import GrammarEntry
from engine.plugin.specs import Vocabulary


class Odd:
    """A grammar engine, its own grammars and their matchers."""

    error = ""

    def __init__(self, vocabulary: Vocabulary, *, threads: int, whitespace: bool) -> None:
        pass

    def compile(self, grammar: Grammar) -> "Odd":
        what, _, rest = grammar.source.partition(" ")
        self.nothing = what == "nothing"
        match what:
            case "sleep":
                time.sleep(float(rest))
            case "spin":
                while True:
                    pass
            case "memory":
                self.kept = bytearray(4 << 30)
            case "abort":
                os.abort()
            case "raise":
                raise KeyError(rest)
            case "refuse":
                raise RequestError(f"{rest} is not known", code="unsupported_keyword")
            case "pass":
                raise RequestError("somebody else may know", code="unsupported_grammar")
            case "broken":
                self.error = "too complex"
        return self

    def packed(self) -> bytes:
        return f"made by {os.getpid()}".encode()

    def matcher(self) -> "Odd":
        return self

    def fill(self, matchers: Any, masks: Any, rows: Any) -> None:
        masks[rows] = 0 if self.nothing else -1


class Second(Odd):
    """One that takes everything, and takes its time to be made."""

    def __init__(self, vocabulary: Vocabulary, *, threads: int, whitespace: bool) -> None:
        time.sleep(0.7)

    def compile(self, grammar: Grammar) -> "Odd":
        self.nothing = False
        return self


if __name__ == "__main__":
    entries = [
        GrammarEntry(name="odd", target="__main__:Odd", kinds=("regex",), package="odd"),
        GrammarEntry(name="second", target="__main__:Second", kinds=("regex",), package="odd"),
    ]

    def ready(self: compiler.Compiler, vocab_size: int) -> Engines:
        self._engines = Engines(entries, Vocabulary([b"a"] * vocab_size, frozenset(), ()), threads=1, whitespace=True)
        self._engines.warm_up()
        return self._engines

    compiler.Compiler._ready = ready  # type: ignore[method-assign]
    sys.exit(compiler.main(int(sys.argv[1])))
