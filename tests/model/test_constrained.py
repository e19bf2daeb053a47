"""Grammars on the real model, at temperature 1: every reply that ends is of its form, whatever runs beside it."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from engine import Engine, Reply, RequestError, SamplingParams
from engine.conversation.parts import read_messages
from engine.plugin.checkpoints import open_checkpoint
from engine.text.tokenizer import Text

pytest.importorskip("llguidance")

MESSAGES = [{"role": "user", "content": "Invent a person. Answer in JSON."}]
SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "required": ["name", "age", "hobbies"],
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "hobbies": {"type": "array", "items": {"enum": ["chess", "tennis", "opera"]}, "maxItems": 3},
        },
    },
    {
        "type": "object",
        "required": ["kind", "at"],
        "properties": {
            "kind": {"enum": ["alpha", "beta"]},
            "at": {"type": "string", "format": "date"},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
        },
    },
    {
        "type": "array",
        "minItems": 1,
        "maxItems": 2,
        "items": {"anyOf": [{"type": "string", "maxLength": 12}, {"type": "null"}, {"type": "boolean"}]},
    },
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(model="smollm2-135m", max_model_len=512, max_step_tokens=64) as engine:
        yield engine


def asked(seed: int, **grammar: Any) -> SamplingParams:
    return SamplingParams(temperature=1.0, max_tokens=100, seed=seed, **grammar)


def test_every_reply_that_ends_is_valid(engine: Engine) -> None:
    params = [asked(seed, json_schema=json.dumps(schema)) for schema in SCHEMAS for seed in range(6)]
    replies: list[Reply] = engine.generate([MESSAGES] * len(params), params)
    ended = 0
    for index, reply in enumerate(replies):
        if reply.finish == "stop":
            ended += 1
            schema = SCHEMAS[index // 6]
            value = json.loads(reply.text)
            assert jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(value), reply.text
            if isinstance(value, dict):
                assert value.keys() <= schema["properties"].keys()
    assert ended >= 12


def test_other_forms(engine: Engine) -> None:
    forms: list[tuple[dict[str, Any], str]] = [
        ({"regex": r"\d{3}-[a-f]{2}"}, r"[0-9]{3}-[a-f]{2}"),
        ({"choice": ("yes", "no", "perhaps")}, "yes|no|perhaps"),
        ({"ebnf": 'root ::= "SELECT " [a-c]{1,3} " FROM t"'}, "SELECT [a-c]{1,3} FROM t"),
        ({"lark": 'start: "<" NAME ">"\nNAME: /[A-Z]{2,5}/'}, "<[A-Z]{2,5}>"),
    ]
    replies: list[Reply] = engine.generate([MESSAGES] * 4, [asked(3, **form) for form, _ in forms])
    for reply, (_, expression) in zip(replies, forms, strict=True):
        assert reply.finish == "stop" and re.fullmatch(expression, reply.text), reply.text
        assert reply.matched is not None  # the end token


def test_what_runs_beside_changes_nothing(engine: Engine) -> None:
    """With and without a grammar, in one batch of more rows than a step has tokens, and alone: the same tokens."""
    schema = json.dumps(SCHEMAS[0])
    params = [asked(seed, **({"json_schema": schema} if seed % 2 else {})) for seed in range(8)]
    together: list[Reply] = engine.generate([MESSAGES] * 8, params)
    for seed in (1, 2):
        alone = engine.generate(MESSAGES, params[seed])
        assert alone.ids == together[seed].ids


def test_greedy_is_the_likeliest_that_the_grammar_lets_through(engine: Engine) -> None:
    reply = engine.generate(MESSAGES, SamplingParams(temperature=0, logprobs=20, regex="[0-9]+", max_tokens=1))
    (token,) = reply.logprobs
    assert re.fullmatch("[0-9]+", token.text)
    assert token.rank > 1 and token.logprob is not None and token.logprob < token.top[0].logprob  # type: ignore[operator]
    better = [other for other in token.top if other.rank < token.rank]
    assert not any(re.fullmatch("[0-9]+", other.text) for other in better)


def test_pages_that_run_out_change_nothing() -> None:
    """Rows are sent back to the queue and come back, and their matchers read what they had said."""
    params = [asked(seed, json_schema=json.dumps(SCHEMAS[0])) for seed in range(6)]
    with Engine(model="smollm2-135m", max_model_len=256) as roomy:
        expected: list[Reply] = roomy.generate([MESSAGES] * 6, params)
    with Engine(model="smollm2-135m", max_model_len=256, kv_tokens=320, prefix_cache=False) as tight:
        got: list[Reply] = tight.generate([MESSAGES] * 6, params)
        for _ in range(150):  # its figures are up to a second old
            if retractions := tight.stats().retractions_total:
                break
            time.sleep(0.01)
    assert [reply.ids for reply in got] == [reply.ids for reply in expected]
    assert retractions > 0


def test_a_bad_grammar_hurts_nobody_but_its_sender(engine: Engine) -> None:
    with pytest.raises(RequestError, match="unclosed group"):
        engine.generate(MESSAGES, asked(1, regex="(a"))
    with pytest.raises(RequestError, match="uniqueItems"):
        engine.generate(MESSAGES, asked(1, json_schema='{"type": "array", "uniqueItems": true}'))
    assert engine.generate(MESSAGES, asked(1, choice=("fine",))).text == "fine"


def test_a_grammar_that_begins_behind_a_text() -> None:
    """The way of a reply that reasons: free up to the end of it."""
    import anyio

    from engine.config import resolve
    from engine.messages.request import Generate
    from engine.params.grammar import Grammar
    from engine.runtime.offline import AsyncEngine

    async def ask() -> str:
        async with AsyncEngine(resolve({"model": "smollm2-135m", "max_model_len": 256})) as engine:
            grammar = Grammar("choice", '["yes","no"]', after=".")
            params = SamplingParams(temperature=0, max_tokens=40, grammar=grammar)
            job = Generate("r", params, messages=read_messages(MESSAGES))
            return "".join([chunk.text async for chunk in engine.front.generate(job)])

    text = anyio.run(ask)
    assert re.fullmatch(r"[^.]+\.(yes|no)", text, re.DOTALL), text


def test_the_vocabulary_is_what_the_tokenizer_says(engine: Engine) -> None:
    from engine.config import Config
    from engine.grammars.vocabulary import read_vocabulary
    from engine.plugin.registry import Plugins

    checkpoint = open_checkpoint(Plugins.load(), "smollm2-135m")
    words = read_vocabulary(checkpoint, Config(), 49152)
    text = Text(checkpoint.text())
    ids = text.encode('{"name": "Zoë 日本"}\n')
    assert b"".join(words.tokens[id] for id in ids).decode() == '{"name": "Zoë 日本"}\n'
    assert set(words.eos_ids) <= words.special and words.tokens[words.eos_ids[0]] == b"<|im_end|>"
