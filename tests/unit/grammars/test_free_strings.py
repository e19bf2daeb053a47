"""Masks of bounded strings: of the table and the few tokens together they are those of all tokens, exactly."""

import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance")

from engine.config import Config, ModelOptions
from engine.grammars.vocabulary import read_vocabulary
from engine.params.grammar import Grammar
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.plugin.specs import Vocabulary
from engine_plugins.grammars.llguidance.engine import LLGrammar, LLGuidance, LLMatcher
from engine_plugins.grammars.llguidance.free_strings import FEW, ordinary_length, probe_of

STRING = {"type": "string"}


def one(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


BOUNDED: list[dict[str, Any]] = [
    one(a={"type": "string", "maxLength": 5}),
    one(a={"type": "string", "maxLength": 30}, b={"type": "string", "maxLength": 1}, c=STRING),
    one(a={"type": "string", "minLength": 3, "maxLength": 12}),
    one(kind={"enum": ["alpha", "beta", 12]}, name={"type": "string", "maxLength": 8}, n={"type": "integer"}),
    {"type": "array", "items": one(a={"type": "string", "maxLength": 9}), "minItems": 5},
    {"type": "object", "additionalProperties": {"type": "string", "maxLength": 4}, "minProperties": 3},
    {**one(ab={"type": "string", "maxLength": 6}), "additionalProperties": {"type": "string", "maxLength": 3}},
    {**one(ab={"type": "string", "maxLength": 6}), "additionalProperties": True},
    {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 5, "maxLength": 9}]},
]
LEFT_ALONE: list[dict[str, Any]] = [
    one(a=STRING),
    one(a={"type": "string", "maxLength": 5, "pattern": "^a*$"}),
    one(a={"type": "string", "maxLength": 5}, b={"type": "string", "format": "date"}),
    {"anyOf": [{"const": "abcdef"}, {"type": "string", "maxLength": 3}]},
    {"type": "object", "patternProperties": {"^a": {"type": "string", "maxLength": 3}}},
]


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    checkpoint = open_checkpoint(Plugins.load(), "smollm2-135m")
    return read_vocabulary(checkpoint, Config(model=ModelOptions(model="smollm2-135m")), 49152)


@pytest.fixture(scope="module")
def engine(words: Vocabulary) -> LLGuidance:
    return LLGuidance(words, threads=1, whitespace=True)


@pytest.mark.parametrize("schema", BOUNDED, ids=json.dumps)
def test_masks_are_those_of_the_whole_vocabulary(engine: LLGuidance, words: Vocabulary, schema: dict[str, Any]) -> None:
    compiled = engine.compile(Grammar("json_schema", json.dumps(schema)))
    assert isinstance(compiled, LLGrammar)
    rng = np.random.default_rng(0)
    masks = np.zeros((2, -(-len(words.tokens) // 32)), np.int32)
    odd = np.array([not ordinary_length(token) for token in words.tokens])
    used = 0
    for reply in range(6):
        matcher = compiled.exact()
        assert matcher.string is not None
        whole = LLMatcher(compiled, matcher.full, None, None)
        for _ in range(60):
            engine.fill([matcher], masks, [0])
            engine.fill([whole], masks, [1])
            used += matcher.string.left(matcher.full) > 0
            assert (masks[0] == masks[1]).all(), f"{differing(masks, words)} in reply {reply}"
            token = drawn(masks[0], odd, rng)
            assert engine.accept([matcher], [token]) == [True]
            if token in words.eos_ids:
                break
    assert used > 5  # the table was of use


def differing(masks: np.ndarray, words: Vocabulary) -> list[bytes]:
    bits = np.unpackbits((masks[0] ^ masks[1]).view(np.uint8), bitorder="little")
    return [words.tokens[id] for id in np.flatnonzero(bits)[:5]]


def drawn(mask: np.ndarray, odd: np.ndarray, rng: np.random.Generator) -> int:
    """A token that may come; an `odd` one, that ends a string or is no ordinary text, often enough to be seen."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)
    ids, rare = np.flatnonzero(bits), np.flatnonzero(bits & odd)
    return int(rng.choice(rare if len(rare) and rng.random() < 0.4 else ids))


@pytest.mark.parametrize("schema", LEFT_ALONE, ids=json.dumps)
def test_other_schemas_are_left_to_the_whole_vocabulary(engine: LLGuidance, schema: dict[str, Any]) -> None:
    assert probe_of(json.dumps(schema)) == ""
    compiled = engine.compile(Grammar("json_schema", json.dumps(schema)))
    assert compiled.exact().string is None  # type: ignore[attr-defined]


def test_the_probe_is_no_character_of_the_schema() -> None:
    assert probe_of(json.dumps(one(a={"type": "string", "maxLength": 5}))) == "~"
    assert probe_of(json.dumps(one(a={"type": "string", "maxLength": 5}, b={"enum": ["~", "\u005e"]}))) == "`"


@pytest.mark.parametrize(
    ("token", "length"),
    [
        *((b"abc", 3), (" 日本".encode(), 3), ("😀".encode(), 1)),
        *(("日".encode()[:2], 0), (b'a"', 0), (b"\\n", 0), (b"\n", 0), (b"a\x7f", 0), (b"", 0)),
    ],
)
def test_ordinary_characters(token: bytes, length: int) -> None:
    assert ordinary_length(token) == length


def test_the_table_says_how_long_a_token_may_be(engine: LLGuidance, words: Vocabulary) -> None:
    table = engine._strings.upto
    assert table.shape == (FEW + 1, len(words.tokens) // 32) and not table[0].any()
    for left in (1, 5, FEW):
        ids = np.flatnonzero(np.unpackbits(table[left].view(np.uint8), bitorder="little"))
        lengths = [ordinary_length(words.tokens[id]) for id in ids]
        assert set(lengths) == set(range(1, max(lengths) + 1)) and max(lengths) <= left
        assert not words.special & set(ids.tolist())
