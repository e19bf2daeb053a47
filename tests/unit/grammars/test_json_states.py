"""States of replies under JSON schemas: those of one state have one mask, whatever has been said before."""

import gc
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from engine.params.grammar import Grammar
from engine.plugin.specs import Vocabulary
from engine.testing import grammars as grammar_checks
from engine_plugins.grammars.llguidance import json_states
from engine_plugins.grammars.llguidance.engine import LLGrammar, LLGuidance

MORE = (
    "},{",
    '"},{"',
    "],[",
    "1,2",
    "1,2]",
    "0,",
    '","',
    '":{"',
    "]}",
    '"]',
    "\n  ",
    ",\n",
    " 1",
    "e",
    "\\u00",
    "00",
    "99,",
)


def words_of() -> Vocabulary:
    """A token for each byte, and such as go over the ends of strings, numbers and items."""
    plain = grammar_checks.vocabulary()
    first = min(plain.special)
    tokens = [*plain.tokens[:first], *(word.encode() for word in MORE), *plain.tokens[first:]]
    special, ends = (sorted(id + len(MORE) for id in ids) for ids in (plain.special, plain.eos_ids))
    return Vocabulary(tokens, frozenset(special), tuple(ends))


WORDS = words_of()
BENCH = runpy.run_path(str(Path(__file__).parents[3] / "bench" / "lib" / "workloads.py"))
HARD, EASY = BENCH["JSON_SCHEMA"], BENCH["EASY_SCHEMA"]
ENGINES = {whitespace: LLGuidance(WORDS, threads=1, whitespace=whitespace) for whitespace in (False, True)}


def compiled_of(engine: LLGuidance, schema: Any) -> LLGrammar:
    compiled = engine.compile(Grammar("json_schema", json.dumps(schema)))
    assert isinstance(compiled, LLGrammar)
    return compiled


def bounds(low: str, high: str, most: int) -> st.SearchStrategy[dict[str, int]]:
    """None, one or both of them."""
    pairs = st.tuples(st.integers(0, most), st.integers(0, most)).map(sorted)
    both = st.tuples(pairs, st.booleans(), st.booleans())
    return both.map(lambda drawn: {name: drawn[0][at] for at, name in enumerate((low, high)) if drawn[1 + at]})


def ranges() -> st.SearchStrategy[dict[str, int]]:
    """With two bounds, one or none."""
    lows, highs = (st.sampled_from([end, f"exclusive{end.capitalize()}", ""]) for end in ("minimum", "maximum"))
    near = st.integers(-12000, 12000) | st.sampled_from([0, 1, -1, 10, 100, 1000, -1000, 10**15, -(10**15)])
    return st.tuples(lows, near, highs, st.integers(2, 12000) | st.sampled_from([9, 100, 1000])).map(
        lambda drawn: {name: value for name, value in ((drawn[0], drawn[1]), (drawn[2], drawn[1] + drawn[3])) if name}
    )


SCALARS = st.one_of(
    *(st.just({"type": name}) for name in ("string", "integer", "number", "boolean", "null")),
    bounds("minLength", "maxLength", 9).map(lambda drawn: {"type": "string", **drawn}),
    ranges().map(lambda drawn: {"type": "integer", **drawn}),
    st.just({"type": "number", "minimum": -2.5, "exclusiveMaximum": 40}),
    st.just({"type": "integer", "multipleOf": 3}),
    st.just({"type": ["string", "null", "integer"], "maxLength": 4}),
    st.just({"type": "string", "pattern": '^[a-c"é]{2,4}$'}),
    st.just({"type": "string", "format": "date"}),
    st.just({"const": 'a"b\\'}),
    st.lists(st.sampled_from(["ab", "abc", "é", 1, 12, -1.5, True, None, '"']), min_size=1, unique_by=repr).map(
        lambda drawn: {"enum": drawn}
    ),
)


def arrays(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    sizes = bounds("minItems", "maxItems", 20)
    return st.tuples(items, sizes).map(lambda drawn: {"type": "array", "items": drawn[0], **drawn[1]})


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.dictionaries(st.sampled_from(["a", "ab", "é", "id", "n 1"]), inner, max_size=4)
    some = st.tuples(names, st.sets(st.sampled_from(["a", "ab", "é", "id", "n 1"])))
    return some.map(
        lambda drawn: {
            "type": "object",
            "properties": drawn[0],
            "required": sorted(drawn[1] & drawn[0].keys()),
            "additionalProperties": False,
        }
    )


def choices(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Between a value and null, as clients write what may be missing, or more."""
    others = st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"const": "ab"}, {"enum": [1, 12]}])
    return st.lists(inner | others, min_size=1, max_size=3).map(lambda drawn: {"anyOf": drawn})


PARTS = st.recursive(SCALARS, lambda inner: arrays(inner) | objects(inner) | choices(inner), max_leaves=6)
TREE = {"$ref": "#/$defs/tree"}
DEFINITIONS = {
    "tree": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"anyOf": [TREE, {"type": "null"}]}, "c": {"$ref": "#/$defs/s"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "s": {"type": "array", "items": {"type": "string", "maxLength": 2}},
}
SCHEMAS = PARTS | PARTS.map(
    lambda drawn: {
        "type": "object",
        "properties": {"x": drawn, "t": TREE, "s": {"$ref": "#/$defs/s"}},
        "additionalProperties": False,
        "$defs": DEFINITIONS,
    }
)


def drawn(mask: np.ndarray, rng: np.random.Generator) -> int:
    """A token that may come: one of several bytes often enough."""
    ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    long = ids[ids >= 256]
    return int(rng.choice(long if len(long) and rng.random() < 0.5 else ids))


def walk(
    engine: LLGuidance, compiled: LLGrammar, rng: np.random.Generator, steps: int, *, lost: bool = False
) -> tuple[int, int]:
    """One reply by its states, and beside them by a matcher that reads all of it: its tokens, and the new states."""
    by_state, exact = compiled.matcher(), compiled.exact()
    assert compiled.states is not None
    before = len(compiled.states.known)
    masks = np.zeros((2, -(-len(WORDS.tokens) // 32)), np.int32)
    said: list[bytes] = []
    for _ in range(steps):
        engine.fill([by_state, exact], masks, [0, 1])
        assert not exact.error and not by_state.error
        assert lost or by_state.state is not None, f"lost its way after {b''.join(said)!r}"
        assert (masks[0] == masks[1]).all(), (
            f"{differing(masks)} after {b''.join(said)!r}, in {by_state.state and by_state.state.place}"
        )
        for barred in map(int, [ord("\t"), *rng.integers(len(WORDS.tokens), size=10)]):
            if by_state.state is not None and not masks[0][barred >> 5] >> (barred & 31) & 1:
                assert engine.accept([by_state], [barred]) == [False]
        token = drawn(masks[0], rng)
        assert engine.accept([by_state, exact], [token, token]) == [True, True]
        said.append(WORDS.tokens[token])
        if token in WORDS.eos_ids:
            break
    assert (by_state.state is None) == lost
    return len(said), len(compiled.states.known) - before


def differing(masks: np.ndarray) -> list[bytes]:
    bits = np.unpackbits((masks[0] ^ masks[1]).view(np.uint8), bitorder="little")
    return [WORDS.tokens[id] for id in np.flatnonzero(bits)[:9]]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, st.booleans(), st.integers(0, 1000))
def test_replies_in_one_state_have_one_mask(schema: Any, whitespace: bool, seed: int) -> None:
    engine = ENGINES[whitespace]
    try:
        compiled = compiled_of(engine, schema)
    except Exception as error:
        assert "satisf" in str(error) or "inimum" in str(error), error
        return
    if compiled.states is None:
        assert "anyOf" in json.dumps(schema)  # between what begins alike
        return
    rng = np.random.default_rng(seed)
    for _ in range(5):
        walk(engine, compiled, rng, 80)


ZEROS = {"type": "array", "items": {"const": 0}, "minItems": 9, "maxItems": 12}
LONG: list[Any] = [
    {"type": "array", "items": ZEROS},
    {"type": "array", "items": {"type": "array", "items": ZEROS, "maxItems": 1}, "minItems": 40},
    {
        "type": "object",
        "properties": {"a": ZEROS, "ab": {**ZEROS, "items": ZEROS}},
        "required": ["a", "ab"],
        "additionalProperties": False,
    },
]


@pytest.mark.parametrize("schema", LONG, ids=json.dumps)
def test_items_are_counted_in_long_arrays_and_in_those_behind(schema: Any) -> None:
    engine, rng = ENGINES[False], np.random.default_rng(0)
    compiled = compiled_of(engine, schema)
    assert compiled.states is not None and compiled.states._long
    for _ in range(4):
        walk(engine, compiled, rng, 300)


@pytest.mark.parametrize("schema", [HARD, EASY], ids=["hard", "easy"])
@pytest.mark.parametrize("whitespace", [False, True])
def test_most_states_are_met_again(schema: Any, whitespace: bool) -> None:
    """Though items, characters and digits come without end."""
    engine, rng = ENGINES[whitespace], np.random.default_rng(0)
    compiled = compiled_of(engine, schema)
    for _ in range(40 if whitespace else 8):  # of which there may be up to 33 in a row
        walk(engine, compiled, rng, 300)
    again = [walk(engine, compiled, rng, 300) for _ in range(4)]
    tokens, new = map(sum, zip(*again, strict=True))
    assert tokens == 1200 and new < 0.06 * tokens


@pytest.mark.parametrize(
    ("items", "most"),
    [
        ({"type": "number"}, 30),
        ({"type": "integer", "minimum": 0}, 90),
        ({"type": "integer", "exclusiveMinimum": 0, "maximum": 1000}, 30),
        ({"type": "integer", "minimum": -99, "exclusiveMaximum": 100}, 30),
        ({"type": "string", "format": "of-no-known-form", "maxLength": 1.0}, 30),
    ],
    ids=json.dumps,
)
def test_what_no_bound_looks_at_makes_no_states(items: Any, most: int) -> None:
    """Before, in and behind a number, which is the first or is not, and has so and so many digits; or a string."""
    engine, rng = ENGINES[False], np.random.default_rng(0)
    compiled = compiled_of(engine, {"type": "array", "minItems": 1, "items": items})
    for _ in range(100):
        walk(engine, compiled, rng, 300)
    assert compiled.states is not None
    assert len(compiled.states.known) <= most


def test_a_reply_without_a_state_goes_on_as_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are too many states to tell."""
    monkeypatch.setattr(json_states, "MOST_STATES", 30)
    engine, rng = ENGINES[False], np.random.default_rng(0)
    compiled = compiled_of(engine, HARD)
    walk(engine, compiled, rng, 100, lost=True)


TREES = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}


@pytest.mark.parametrize(
    ("schema", "begins", "goes_on"),
    [
        ({"type": "string", "pattern": "^[a-z]*$"}, b'"', b"a"),
        ({"type": "number", "minimum": 0.5}, b"", b"1"),
        (TREES, b"", b"["),
        ({"type": "string", "maxLength": 2000}, b'"', b"a"),
    ],
    ids=["text", "digits", "open", "characters"],
)
def test_a_long_reply_does_not_take_room_by_the_square_of_its_length(
    schema: Any, begins: bytes, goes_on: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of places and paths there is kept so much and no more; the reply goes on without a state."""
    monkeypatch.setattr(json_states, "MOST_LED", 100_000)
    engine = ENGINES[False]
    compiled = compiled_of(engine, schema)
    by_state, exact = compiled.matcher(), compiled.exact()
    masks = np.zeros((2, -(-len(WORDS.tokens) // 32)), np.int32)
    for token in begins + goes_on * 1200:
        engine.fill([by_state, exact], masks, [0, 1])
        assert (masks[0] == masks[1]).all()
        assert engine.accept([by_state, exact], [token, token]) == [True, True]
    assert by_state.state is None and compiled.states is not None
    kept = [len(each.path) + len(each.place.text) + len(each.place.stack) for each in compiled.states.known.values()]
    assert sum(kept) < 110_000


def test_of_all_grammars_so_many_states_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one with the most begins anew, in the middle of its replies too; those that are dropped do not count."""
    monkeypatch.setattr(json_states, "MOST_OF_ALL", 100)
    engine, rng = LLGuidance(WORDS, threads=1, whitespace=False), np.random.default_rng(0)
    texts, numbers = engine._texts, {"type": "array", "minItems": 30, "items": {"type": "number", "minimum": 0.5}}
    grammars = [compiled_of(engine, schema) for schema in (HARD, EASY, numbers)]
    forgot = 0
    for _ in range(4):
        for compiled in grammars:
            _, more = walk(engine, compiled, rng, 150)
            forgot += more < 0
            assert sum(len(states.known) for states in texts.grammars) <= 100
    assert forgot and len(texts.grammars) == 3
    del grammars, compiled
    gc.collect()
    assert not texts.grammars
    other = compiled_of(engine, HARD)
    assert other.states is not None
    assert walk(engine, other, rng, 20)[1] == len(other.states.known) > 0


def test_masks_that_are_no_longer_kept_are_filled_again() -> None:
    engine, rng = LLGuidance(WORDS, threads=1, whitespace=False), np.random.default_rng(0)
    engine._texts._kept = engine._texts._kept[:5]
    compiled = compiled_of(engine, HARD)
    walk(engine, compiled, rng, 150)
    assert engine._texts._age > 5


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"type": "string", "maxLength": 2}, {"const": "abc"}]},
        {"anyOf": [{"type": "integer"}, {"type": "null"}, {"enum": ["a", 1.5]}]},
        {"type": "string", "anyOf": [{"maxLength": 2}]},
        {"type": "object", "properties": {"a": {"type": "string"}}},
        {"type": "object", "additionalProperties": {"type": "string"}},
        {"$ref": "#/$defs/a", "maxLength": 2, "$defs": {"a": {"type": "string"}}},
        {"allOf": [{"type": "string"}]},
        {"type": "array"},
        {"enum": [{"a": 1}]},
        {},
    ],
    ids=json.dumps,
)
def test_of_other_schemas_no_states_are_told(schema: Any) -> None:
    compiled = compiled_of(ENGINES[True], schema)
    assert compiled.states is None and compiled.matcher().state is None


def test_a_vocabulary_without_a_comma_has_an_engine_too() -> None:
    letters = Vocabulary([b"a", b"b", b"</s>"], frozenset({2}), (2,))
    compiled = LLGuidance(letters, threads=1, whitespace=True).compile(Grammar("regex", "ab"))
    masks = np.zeros((1, 1), np.int32)
    LLGuidance(letters, threads=1, whitespace=True).fill([compiled.matcher()], masks, [0])
    assert masks[0, 0] == 0b001
