"""XGrammar: pushdown automata over bytes, with the part of each mask that depends on nothing else made when compiling.

Compiling is its expensive part (a string of at most 200 characters takes ten seconds), so the result is packed for the
process that uses it. It ignores keywords of JSON schemas that it does not know, so json_subset.py refuses schemas that
it would not enforce exactly.
"""

import json
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import xgrammar

from engine.plugin import CompiledGrammar, Grammar, RequestError, Vocabulary
from engine_plugins.grammars.xgrammar.json_subset import check_schema, check_tag

MOST_WHITESPACE = 34  # in a row, between the tokens of JSON: a new line and its indentation
COMPACT = (",", ":")
PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")  # in the source of the library, which its messages begin with


class XMatcher:
    """One reply."""

    __slots__ = ("error", "inner", "state")

    def __init__(self, inner: xgrammar.GrammarMatcher) -> None:
        self.inner = inner
        self.state = None  # the library tells of none
        self.error = ""


class XGrammarCompiled:
    """As specs.CompiledGrammar."""

    def __init__(self, compiled: xgrammar.CompiledGrammar) -> None:
        self._compiled = compiled

    def packed(self) -> bytes:
        return zlib.compress(self._compiled.serialize_json().encode(), 1)

    def matcher(self) -> XMatcher:
        return XMatcher(xgrammar.GrammarMatcher(self._compiled))


class XGrammar:
    """As specs.GrammarEngine."""

    def __init__(self, vocabulary: Vocabulary, *, threads: int, whitespace: bool) -> None:
        # It takes a token without bytes for a special one, which is never text.
        tokens = [b"" if id in vocabulary.special else token for id, token in enumerate(vocabulary.tokens)]
        self._info = xgrammar.TokenizerInfo(
            tokens, xgrammar.VocabType.RAW, vocab_size=len(tokens), stop_token_ids=list(vocabulary.eos_ids)
        )
        self._batch = xgrammar.BatchGrammarMatcher(max_threads=threads)
        self._json: dict[str, Any] = (
            {"any_whitespace": True, "max_whitespace_cnt": MOST_WHITESPACE}
            if whitespace
            else {"any_whitespace": False, "separators": COMPACT}
        )

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        compiler = xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)
        try:
            return XGrammarCompiled(self._compiled(compiler, grammar))
        except UnicodeDecodeError:  # in the library's own message
            raise RequestError(f"xgrammar does not take the {grammar.kind}", code="invalid_grammar") from None
        except RuntimeError as error:  # of the library, whose messages begin with the place in its source
            said = PLACE.sub("", str(error).strip().splitlines()[-1])
            message = f"xgrammar does not take the {grammar.kind}: {said[:500]}"
            raise RequestError(message, code="invalid_grammar") from None

    def _compiled(self, compiler: xgrammar.GrammarCompiler, grammar: Grammar) -> xgrammar.CompiledGrammar:
        source = grammar.source
        match grammar.kind:
            case "json_object":
                return compiler.compile_json_schema('{"type": "object"}', strict_mode=False, **self._json)
            case "json_schema":
                check_schema(json.loads(source))
                return compiler.compile_json_schema(source, strict_mode=False, **self._json)
            case "regex":
                return compiler.compile_regex(source)
            case "choice":
                words = " | ".join(map(json.dumps, json.loads(source)))
                return compiler.compile_grammar(f"root ::= {words}")
            case "structural_tag":
                check_tag(json.loads(source))
                return compiler.compile_structural_tag(source)
        return compiler.compile_grammar(source)

    def load(self, grammar: Grammar, packed: bytes) -> CompiledGrammar:
        text = zlib.decompress(packed).decode()
        return XGrammarCompiled(xgrammar.CompiledGrammar.deserialize_json(text, self._info))

    def accept(self, matchers: Sequence[XMatcher], tokens: Sequence[int]) -> list[bool]:
        if len(matchers) < 2:
            return [matcher.inner.accept_token(token) for matcher, token in zip(matchers, tokens, strict=True)]
        accepted = self._batch.batch_accept_token([matcher.inner for matcher in matchers], list(tokens))
        return [bool(each) for each in accepted]

    def fill(self, matchers: Sequence[XMatcher], masks: np.ndarray, rows: Sequence[int]) -> None:
        if len(matchers) == 1:
            matchers[0].inner.fill_next_token_bitmask(masks, rows[0])
            return
        self._batch.batch_fill_next_token_bitmask([matcher.inner for matcher in matchers], masks, list(rows))
