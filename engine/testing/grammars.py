"""Contract checks of grammar engines, for `engine.plugin.testing`. A small vocabulary, texts that are of a grammar and
texts that are not, each followed token by token: what a mask lets through is what is taken.

Raises AssertionError with the text and the place. Needs no torch.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import RequestError
from engine.params.grammar import Grammar, GrammarKind
from engine.plugin.specs import CompiledGrammar, GrammarEngine, Vocabulary

WORDS = (
    '{"',
    '":',
    '",',
    '"}',
    '":"',
    "true",
    "null",
    "12",
    "abc",
    "ab",
    "  ",
    "\n",
    "é",
    "日本",
    "😀",
    '\\"',
    "SELECT ",
)
SPECIAL = ("<end>", "<stop>", "<call>")


def vocabulary() -> Vocabulary:
    """A token for each byte, some for words and parts of characters, three special ones, and ids without a text."""
    parts = ["日".encode()[:2], "日".encode()[2:], "😀".encode()[1:]]
    tokens = [bytes([byte]) for byte in range(256)] + [word.encode() for word in WORDS] + parts
    first = len(tokens)
    tokens += [name.encode() for name in SPECIAL] + [b""] * 10
    return Vocabulary(tokens, frozenset(range(first, first + 3)), (first, first + 1))


@dataclass(frozen=True, kw_only=True)
class GrammarCase:
    """Texts that a reply may be, and texts that it may not be."""

    kind: GrammarKind
    source: str = ""
    right: tuple[str, ...]
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} {self.source}"[:80]

    @property
    def grammar(self) -> Grammar:
        return Grammar(self.kind, self.source)


def _object(properties: str, *required: str) -> str:
    names = ", ".join(f'"{name}"' for name in required)
    rest = f'"required": [{names}], "additionalProperties": false'
    return f'{{"type": "object", "properties": {{{properties}}}, {rest}}}'


TAGGED = (
    '{"type": "tag", "begin": "<f=x>", "content": {"type": "json_schema", "json_schema": {"type": "integer"}}, "end": '
    '"</f>"}, {"type": "tag", "begin": "<f=y>", "content": {"type": "regex", "pattern": "[a-c]+"}, "end": "</f>"}'
)


def _tags(format: str) -> str:
    return f'{{"type": "structural_tag", "format": {format}}}'


GRAMMAR_CASES: tuple[GrammarCase, ...] = (
    GrammarCase(
        kind="json_object",
        right=("{}", '{"a":1}', '{"é":["日本",true,null,-1.5e3,{}]}', '{ "a": "\\"\\n"}'),
        wrong=("", "[]", "1", "{", '{"a"}', '{"a":1,}', '{"a":01}', "{} {}", '{"a":"\n"}'),
    ),
    GrammarCase(
        kind="json_schema",
        source=_object('"name": {"type": "string"}, "age": {"type": "integer"}', "name"),
        right=('{"name":"日本😀"}', '{"name":"abc","age":12}', '{"name":"","age":-1}', '{"name":"\\"{}"}'),
        wrong=("{}", '{"age":12}', '{"name":1}', '{"name":"a","age":1.5}', '{"name":"a","x":1}', '"name"'),
    ),
    GrammarCase(
        kind="json_schema",
        source=_object('"s": {"type": "string", "maxLength": 5}, "k": {"enum": ["abc", "é", 12, null]}', "s", "k"),
        right=('{"s":"","k":"abc"}', '{"s":"日本é😀a","k":12}', '{"s":"abcab","k":null}', '{"s":"ab","k":"é"}'),
        wrong=('{"s":"abcabc","k":12}', '{"s":"日本日本日本","k":12}', '{"s":"a","k":"ab"}', '{"s":"a","k":13}'),
    ),
    GrammarCase(
        kind="json_schema",
        source='{"type": "array", "items": {"type": "integer", "minimum": 3, "maximum": 120}, "minItems": 1, '
        '"maxItems": 2}',
        right=("[3]", "[12,120]"),
        wrong=("[]", "[2]", "[121]", "[3,3,3]", "[3.0e]"),
    ),
    GrammarCase(
        kind="json_schema",
        source='{"$defs": {"t": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/t"}}]}}, '
        '"$ref": "#/$defs/t"}',
        right=("null", "[]", "[null,[[]]]"),
        wrong=("1", "[", "[null", "[1]"),
    ),
    GrammarCase(
        kind="json_schema",
        source=_object('"p": {"type": "string", "pattern": "^[a-c]{2,3}$"}, "d": {"type": "string", "format": "date"}'),
        right=('{"p":"abc"}', '{"d":"2024-02-29"}', "{}"),
        wrong=('{"p":"a"}', '{"p":"abca"}', '{"d":"2024-2-29"}', '{"d":"x"}'),
    ),
    GrammarCase(kind="regex", source=r"[a-c]+(12|é)?", right=("a", "abcab12", "cé"), wrong=("", "12", "d", "a1")),
    GrammarCase(kind="regex", source=r"^\d{3}-\d{2}$", right=("123-45",), wrong=("12-345", "^123-45$", "١٢٣-45")),
    GrammarCase(kind="regex", source=r"a/b\\\w", right=("a/b\\x",), wrong=("a\\/b\\x", "a/b\\é")),
    GrammarCase(
        kind="choice",
        source='["yes", "yes, \\"é\\"", "no\\n"]',
        right=("yes", 'yes, "é"', "no\n"),
        wrong=("", "no", "y"),
    ),
    GrammarCase(
        kind="ebnf",
        source='root ::= "SELECT " col (", " col)* # all\ncol ::= [a-c]+ | "\\"" [^"]{1,3} "\\""\n',
        right=("SELECT abc", 'SELECT a, "日本", c'),
        wrong=("SELECT ", "SELECT d", 'SELECT ""', "SELECT a,b"),
    ),
    GrammarCase(
        kind="ebnf",
        source=r'root ::= "\u00e9\x41\U0001F600" [\u3041-\u3096\x61] [^\u00e0-\u00ff\]\\]',
        right=("éA😀ぁb", "éA😀a[", "éA😀ゖ日", "éA😀a\n"),
        wrong=("éA😀bb", "éA😀ぁé", "éA😀ぁ]", "éA😀ぁ\\", "e9A", "éAぁb"),
    ),
    GrammarCase(
        kind="ebnf",
        source='root ::= expr\nexpr ::= "(" expr ")" | [0-9]\n',
        right=("1", "((1))"),
        wrong=("", "((1)", "(1))", "()"),
    ),
    GrammarCase(
        kind="lark",
        source='start: item ("," item)*\nitem: NAME | "(" start ")"\nNAME: /[a-c]+/',
        right=("abc", "a,(b,c)"),
        wrong=("", "a,", "(a", "d"),
    ),
    GrammarCase(
        kind="structural_tag",
        source=_tags(f'{{"type": "triggered_tags", "triggers": ["<f="], "tags": [{TAGGED}]}}'),
        right=("", "ab", "a<f=x>12</f>b", "<f=y>abc</f><f=x>1</f>", "a <f"),
        wrong=("<f=", "<f=z>", "<f=x>ab</f>", "<f=y></f>", "<f=x>12"),
    ),
    GrammarCase(
        kind="structural_tag",
        source=_tags(
            f'{{"type": "triggered_tags", "triggers": ["<f="], "tags": [{TAGGED}], "at_least_one": true, '
            '"stop_after_first": true}'
        ),
        right=("<f=x>12</f>", "<f=y>c</f>"),
        wrong=("", "a<f=x>12</f>", "<f=x>1</f>a", "<f=x>1</f><f=x>1</f>"),
    ),
    GrammarCase(
        kind="structural_tag",
        source=_tags(
            '{"type": "sequence", "elements": [{"type": "const_string", "value": "[é"}, '
            f'{{"type": "tags_with_separator", "tags": [{TAGGED}], "separator": ", ", "at_least_one": true}}, '
            '{"type": "const_string", "value": "]"}]}'
        ),
        right=("[é<f=x>1</f>]", "[é<f=x>1</f>, <f=y>a</f>]"),
        wrong=("[é]", "[é<f=x>1</f><f=y>a</f>]", "<f=x>1</f>"),
    ),
    GrammarCase(
        kind="structural_tag",
        source=_tags('{"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"}'),
        right=("<t></t>", "<t>a < b\n</t>"),
        wrong=("<t>", "<t></t>a", "a"),
    ),
    GrammarCase(
        kind="structural_tag",
        source=_tags(
            '{"type": "or", "elements": [{"type": "grammar", "grammar": "root ::= \\"a\\" root | \\"b\\""}, '
            '{"type": "repeat", "min": 2, "max": 3, "content": {"type": "const_string", "value": "é"}}]}'
        ),
        right=("b", "aab", "éé", "ééé"),
        wrong=("a", "é", "éééé", "bé"),
    ),
)
INVALID: tuple[tuple[GrammarKind, str], ...] = (
    ("json_schema", '{"type": "text"}'),
    ("json_schema", '{"type": "object", "not": {}}'),
    ("json_schema", '{"$ref": "#/$defs/nowhere"}'),
    ("json_schema", "false"),
    ("regex", "a("),
    ("regex", "(?=a)b"),
    ("ebnf", 'root ::= "a" nowhere'),
    ("ebnf", "root = a"),
    ("lark", "start: nowhere"),
    ("structural_tag", "{}"),
    ("structural_tag", '{"type": "structural_tag", "format": {"type": "nothing"}}'),
)


def check_grammar(engine: type[GrammarEngine], case: GrammarCase, *, threads: int = 1) -> bool:
    """Follows each text of `case`, byte by byte and in the longest tokens, with a grammar that was compiled and with
    one that was packed and loaded; matchers in one state have one mask. False if `engine` refuses a keyword by name,
    which it may."""
    words = vocabulary()
    made = engine(words, threads=threads, whitespace=True)
    try:
        compiled = made.compile(case.grammar)
    except RequestError as error:
        assert error.code == "unsupported_keyword", f"{case}: {error}"
        return False
    for each in (compiled, made.load(case.grammar, compiled.packed())):
        known: dict[Hashable, np.ndarray] = {}
        for text in case.right + case.wrong:
            for tokens in (list(text.encode()), _longest(words, text.encode())):
                problem = _follow(made, each, words, tokens, known)
                if text in case.right:
                    assert problem is None, f"{case}: {text!r} is right, but {problem}"
                else:
                    assert problem is not None, f"{case}: {text!r} is wrong, and taken"
    return True


def check_whitespace(engine: type[GrammarEngine]) -> None:
    """JSON with and without whitespace between its tokens, of which no reply could be made for ever."""
    words = vocabulary()
    case = GRAMMAR_CASES[1]
    spaced, endless = '{"name": "a",\n  "age": 12}', '{"name":' + " " * 200
    for whitespace in (True, False):
        made = engine(words, threads=1, whitespace=whitespace)
        compiled = made.compile(case.grammar)
        assert (_follow(made, compiled, words, _longest(words, spaced.encode())) is None) == whitespace
        assert "may not come" in (_follow(made, compiled, words, list(endless.encode())) or "")


def check_together(engine: type[GrammarEngine], threads: int) -> None:
    """Many matchers of several grammars, advanced and asked together: as each by itself."""
    words = vocabulary()
    made = engine(words, threads=threads, whitespace=True)
    kinds = [case for case in GRAMMAR_CASES if case.kind in ("json_object", "regex", "ebnf", "choice")]
    compiled = [made.compile(case.grammar) for case in kinds]
    texts = [list(case.right[-1].encode()) for case in kinds]
    together, alone = ([each.matcher() for each in compiled] for _ in range(2))
    for step in range(max(map(len, texts))):
        going = [index for index, text in enumerate(texts) if step < len(text)]
        masks, single = (np.zeros((len(kinds) + 1, _words(words)), np.int32) for _ in range(2))
        rows = [len(kinds) - index for index in going]  # in another order, with a row to spare
        made.fill([together[index] for index in going], masks, rows)
        for index, row in zip(going, rows, strict=True):
            made.fill([alone[index]], single, [row])
        assert (masks == single).all(), f"masks filled together differ at step {step}"
        tokens = [texts[index][step] for index in going]
        taken = made.accept([together[index] for index in going], tokens)
        assert taken == [True] * len(going)
        for index, token in zip(going, tokens, strict=True):
            assert made.accept([alone[index]], [token]) == [True]


def check_invalid(engine: type[GrammarEngine], kind: GrammarKind, source: str) -> str:
    """What `engine` says of one of INVALID."""
    made = engine(vocabulary(), threads=1, whitespace=True)
    try:
        compiled = made.compile(Grammar(kind, source))
    except RequestError as error:
        assert error.code in ("invalid_grammar", "unsupported_keyword", "unsupported_grammar"), error.code
        assert kind in error.message or "#" in error.message, error.message
        return error.message
    masks = np.zeros((1, _words(vocabulary())), np.int32)
    made.fill([compiled.matcher()], masks, [0])
    assert not masks.any(), f"{kind} {source} is taken"
    return "nothing can come first"


def _words(words: Vocabulary) -> int:
    return -(-len(words.tokens) // 32)


def _longest(words: Vocabulary, text: bytes) -> list[int]:
    """`text` in tokens, each the longest that fits."""
    ids = {token: id for id, token in enumerate(words.tokens) if token and id not in words.special}
    longest = max(map(len, ids))
    tokens = []
    while text:
        size = next(size for size in range(longest, 0, -1) if text[:size] in ids)
        tokens.append(ids[text[:size]])
        text = text[size:]
    return tokens


def _bits(mask: np.ndarray, size: int) -> np.ndarray:
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:size].astype(bool)


def _masks(made: GrammarEngine, matcher: Any, words: Vocabulary) -> Iterator[np.ndarray]:
    """What `matcher` lets through, [tokens] bool, whenever it is asked."""
    masks = np.full((1, _words(words)), 0x55, np.int32)
    while True:
        made.fill([matcher], masks, [0])
        assert not matcher.error, matcher.error
        yield _bits(masks[0], len(words.tokens))


def _follow(
    made: GrammarEngine,
    compiled: CompiledGrammar,
    words: Vocabulary,
    tokens: Sequence[int],
    known: dict[Hashable, np.ndarray] | None = None,
) -> str | None:
    """Why a reply of `tokens` is none, if so; asserts what holds of every mask. `known` are those of states so far."""
    matcher = compiled.matcher()
    ends = list(words.eos_ids)
    never = [id for id, token in enumerate(words.tokens) if (id in words.special and id not in ends) or not token]
    for place, (token, allowed) in enumerate(zip([*tokens, ends[0]], _masks(made, matcher, words), strict=False)):
        assert not allowed[never].any(), "a special token, or an id without text, is let through"
        assert allowed[ends[0]] == allowed[ends[1]], "of two end tokens one is let through"
        if known is not None and matcher.state is not None:
            assert (known.setdefault(matcher.state, allowed) == allowed).all(), "one state has two masks"
        if not allowed[token]:
            what = "it may not end" if token == ends[0] else f"{words.tokens[token]!r} may not come"
            return f"at {place}, {what}"
        assert made.accept([matcher], [token]) == [True], f"{words.tokens[token]!r} is let through and not taken"
    return None
