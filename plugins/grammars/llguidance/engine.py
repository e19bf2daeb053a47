"""llguidance: expressions by derivatives under an Earley parser, over a trie of the vocabulary.

A grammar compiles in about a millisecond, and the rest is done when a state is first met. So nothing is packed, and
`load` compiles again. JSON schemas are enforced exactly (json_exact.py), and a keyword that is not implemented is
refused by name. free_strings.py has long strings of bounded length, which would walk most of the trie at each token.
json_states.py has replies that are identified by states and need no matcher of their own. Left out: threads of the
library's own, which cost more than they save (bench/RESULTS.md).
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np

from engine.plugin import CompiledGrammar, Grammar, RequestError, Vocabulary
from engine_plugins.grammars.llguidance.ecma import Unheld
from engine_plugins.grammars.llguidance.free_strings import FreeString, FreeStrings
from engine_plugins.grammars.llguidance.json_exact import exact
from engine_plugins.grammars.llguidance.json_states import State, States, Texts, states_of
from engine_plugins.grammars.llguidance.lark_tags import ebnf_to_lark, quoted, to_lark
from engine_plugins.grammars.llguidance.refusals import ASCII, outgrown, refusal

# Parser items that one mask may take. An ambiguous grammar (`s: s s | /./`) takes all there may be and more, and all
# rows of a step wait for its masks: with the library's own bound of 50,000 some 30 ms. 1,000 choices take 1,000.
MOST_ITEMS = 5000
GUIDES = 32  # matchers of a grammar that are kept to go on to the next state from
HEADER = re.compile(r"^%llguidance[ \t]*(\{.*\})[ \t]*$", re.MULTILINE)  # of Lark, with options
# Of Lark: comments, literals and expressions, in which nothing begins, and what a JSON schema follows.
PARTS = re.compile(r'//[^\n]*|"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/|(?P<json>%json\s*)')
# Between the tokens of JSON: a space, or a new line and its indentation.
SOME_WHITESPACE = r"\x20|\n[\x20\t]{0,32}"


def free(lark: str) -> str:
    """`lark` without forcing: if a grammar leaves only one text, all tokens that may write it are allowed, not just
    those of one way to write it."""
    found = HEADER.search(lark)
    try:
        options = json.loads(found[1]) if found else {}
    except ValueError as error:
        message = f"the options of %llguidance are no JSON: {error}; correct them, or leave the line out"
        raise RequestError(message, code="invalid_grammar") from None
    rest = lark if found is None else lark[: found.start()] + lark[found.end() :]
    return f"%llguidance {json.dumps({**options, 'no_forcing': True})}\n{rest}"


def with_schemas(lark: str) -> str:
    """`lark` with its JSON schemas made exact, on as many lines."""
    written, at = [], 0
    for found in PARTS.finditer(lark):
        if not found["json"] or found.start() < at:
            continue
        try:
            schema, end = json.JSONDecoder().raw_decode(lark, found.end())
        except ValueError:
            continue  # which the library says, with the place
        text = json.dumps(exact(schema)) if isinstance(schema, dict) else lark[found.end() : end]
        lines = lark.count("\n", found.end(), end) - text.count("\n")
        written += [lark[at : found.end()], text.replace("{", "{" + "\n" * lines, 1)]
        at = end
    return "".join([*written, lark[at:]])


class LLMatcher:
    """One reply. If its grammar has states, it is only known by its `state` (json_states.py), until that is None. If
    its grammar has bounded strings, `string` knows more of them."""

    __slots__ = ("_full", "grammar", "items", "said", "state", "string")

    def __init__(
        self, grammar: "LLGrammar", full: llguidance.LLMatcher | None, string: FreeString | None, state: State | None
    ) -> None:
        self.grammar = grammar
        self._full = full
        self.string = string
        self.state = state
        self.items = 0  # as its state wants it
        self.said: list[int] = []  # while it has a state

    @property
    def full(self) -> llguidance.LLMatcher:
        assert self._full is not None, "a matcher that has a state is asked for by `exact`"
        return self._full

    @property
    def error(self) -> str:
        return outgrown(self._full.get_error()) if self._full is not None and self._full.is_error() else ""

    def consume(self, tokens: Sequence[int]) -> bool:
        """Consume tokens without states. False if one of them may not come."""
        if self.string is not None:
            for token in tokens:
                self.string.push(token)
        if len(tokens) == 1:
            taken: bool = self.full.consume_token(tokens[0])
        else:
            taken = self.full.consume_tokens(list(tokens))
        return taken

    def leave_states(self) -> bool:
        """Continue without states: a matcher reads the reply so far. False if it does not allow that."""
        exact = self.grammar.exact()
        self._full, self.string, self.state = exact.full, exact.string, None
        return not self.said or self.consume(self.said)

    def mask(self, pointer: int, size: int) -> int:
        """Write a mask of `size` bytes, without states. Returns the number of ordinary characters that it leaves
        out."""
        full, string = self.full, self.string
        left = 0 if string is None else string.left(full)
        (full if string is None or not left else string.caught_up()).unsafe_compute_mask_ptr(pointer, size)
        return left


class LLGrammar:
    """As specs.CompiledGrammar."""

    def __init__(self, full: llguidance.LLMatcher, string: FreeString | None, states: States | None) -> None:
        self._full = full
        self._string = string
        self.states = states
        self._guides: dict[tuple[int, ...], LLMatcher] = {}  # by what they have read

    def packed(self) -> bytes:
        return b""

    def matcher(self) -> LLMatcher:
        return self.exact() if self.states is None else LLMatcher(self, None, None, self.states.begin)

    def exact(self) -> LLMatcher:
        """At the beginning of a reply, without states."""
        return LLMatcher(self, self._full.deep_copy(), None if self._string is None else self._string.copy(), None)

    def led(self, path: tuple[int, ...]) -> LLMatcher:
        """A matcher that has read `path`, valid until the next call."""
        guide, rest = self._guides.pop(path, None), path[:0]
        if guide is None:
            guide, rest = self._guides.pop(path[:-1], None), path[-1:]
        if guide is None or guide.error:
            guide, rest = self.exact(), path
        if rest:
            guide.consume(rest)
        self._guides[path] = guide
        if len(self._guides) > GUIDES:
            del self._guides[next(iter(self._guides))]
        return guide


class LLGuidance:
    """As specs.GrammarEngine."""

    def __init__(self, vocabulary: Vocabulary, *, threads: int, whitespace: bool) -> None:
        self._size = len(vocabulary.tokens)
        self._tokenizer = tokenizer_of(vocabulary, vocabulary.tokens, llguidance.LLTokenizer.json_slices())
        self._options: dict[str, Any] = {"lenient": False, "coerce_one_of": False, "whitespace_flexible": whitespace}
        if whitespace:
            self._options["whitespace_pattern"] = SOME_WHITESPACE
        self._limits = llguidance.LLParserLimits(step_max_items=MOST_ITEMS)
        self._special = {vocabulary.tokens[id].decode(errors="replace"): id for id in vocabulary.special}
        self._strings = FreeStrings(vocabulary, tokenizer_of, self._limits)
        self._texts = Texts(vocabulary, self._strings.lengths)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        try:
            text = self._text(grammar)
        except Unheld as unheld:
            message = f"llguidance does not take the {grammar.kind}: {unheld}"
            raise RequestError(message, code=unheld.code) from None
        full = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        if full.is_error():
            raise refusal(grammar, full.get_error())
        if grammar.kind != "json_schema":
            return LLGrammar(full, None, None)
        states = states_of(exact(json.loads(grammar.source)), self._texts)
        return LLGrammar(full, self._strings.prepare(text, grammar.source), states)

    def load(self, grammar: Grammar, packed: bytes) -> CompiledGrammar:
        return self.compile(grammar)

    def _text(self, grammar: Grammar) -> str:
        """`grammar` in llguidance's own language."""
        source = grammar.source
        match grammar.kind:
            case "json_object":
                return free(f"start: {self._json({'type': 'object'})}")
            case "json_schema":
                return free(f"start: {self._json(json.loads(source))}")
            case "regex":
                return free(f"start: /{llguidance.regex_to_lark(source, ASCII)}/")
            case "choice":
                return free("start: " + " | ".join(map(quoted, json.loads(source))))
            case "ebnf":
                try:
                    return free(ebnf_to_lark(source))
                except Exception as error:  # it raises bare ones; the dialect of another engine may be another
                    raise refusal(grammar, str(error), "unsupported_grammar") from None
            case "structural_tag":
                return free(to_lark(json.loads(source), self._special, self._json))
        return free(with_schemas(source))

    def _json(self, schema: dict[str, Any] | bool) -> str:
        """A schema in Lark."""
        if schema is False:
            raise RequestError("the json_schema is false, which no reply fits; send another", code="invalid_grammar")
        schema = {} if schema is True else schema
        return f"%json {json.dumps(exact({**schema, 'x-guidance': self._options}))}"

    def accept(self, matchers: Sequence[LLMatcher], tokens: Sequence[int]) -> list[bool]:
        accepted = []
        for matcher, token in zip(matchers, tokens, strict=True):
            state = matcher.state
            if state is None:
                accepted.append(matcher.consume((token,)))
                continue
            move = state.moves.get(state.keys[token])
            if move.__class__ is State:
                matcher.state = move
                matcher.said.append(token)
                accepted.append(True)
            else:
                accepted.append(self._step(matcher, state, token, known=move is not None))
        return accepted

    def _step(self, matcher: LLMatcher, state: State, token: int, *, known: bool) -> bool:
        """Advance a matcher by a token that is not only to be looked up."""
        states = matcher.grammar.states
        assert states is not None
        if not known and not self._lets_through(matcher.grammar, state, token):
            return False
        matcher.state, matcher.items = states.next(state, matcher.items, token, matcher.said)
        matcher.said.append(token)
        return matcher.state is not None or matcher.leave_states()

    def _lets_through(self, grammar: LLGrammar, state: State, token: int) -> bool:
        if (mask := self._texts.mask(state)) is not None:
            return bool(mask[token >> 5] >> (token & 31) & 1)
        count: int = grammar.led(state.path).full.validate_tokens([token])
        return count == 1

    def fill(self, matchers: Sequence[LLMatcher], masks: np.ndarray, rows: Sequence[int]) -> None:
        size, first = masks.shape[1] * 4, masks.ctypes.data
        for matcher, row in zip(matchers, rows, strict=True):
            state = matcher.state
            if state is None:
                self._fill_one(matcher, masks[row], first + row * size)
                continue
            if (kept := self._texts.mask(state)) is not None:
                masks[row] = kept
                continue
            guide = matcher.grammar.led(state.path)
            self._fill_one(guide, masks[row], first + row * size)
            if not guide.error:
                self._texts.keep(state, masks[row])
            elif matcher.leave_states():
                self._fill_one(matcher, masks[row], first + row * size)

    def _fill_one(self, matcher: LLMatcher, mask: np.ndarray, pointer: int) -> None:
        if left := matcher.mask(pointer, mask.nbytes):
            mask |= self._strings.upto[left]


class _Tokens:
    """A vocabulary as llguidance.TokenizerWrapper asks for it."""

    bos_token_id = None
    unk_token_id = None

    def __init__(self, vocabulary: Vocabulary, tokens: Sequence[bytes]) -> None:
        self.eos_token_id = vocabulary.eos_ids[0]
        self.special_token_ids = sorted(vocabulary.special)
        # A special token's name is marked by a byte that no text has.
        self.tokens = [
            b"\xff" + token if id in vocabulary.special and token else token for id, token in enumerate(tokens)
        ]
        self._bytes = {token: id for id, token in enumerate(tokens) if len(token) == 1}

    def __call__(self, text: bytes) -> list[int]:
        return [self._bytes[text[at : at + 1]] for at in range(len(text)) if text[at : at + 1] in self._bytes]


def tokenizer_of(vocabulary: Vocabulary, tokens: Sequence[bytes], slices: list[str]) -> llguidance.LLTokenizer:
    """`tokens`, with the special ones and the ends of `vocabulary`. Those that lie in one of `slices`, expressions, are
    let through together, where all that it holds may come next."""
    wrapper = llguidance.TokenizerWrapper(_Tokens(vocabulary, tokens))
    return llguidance.LLTokenizer(wrapper, n_vocab=len(tokens), eos_token=list(vocabulary.eos_ids), slices=slices)
