"""What clients ask a reply to be, in the words of each API, as the Generate that comes of it."""

import json
from typing import Any

import pytest
from http_front import FakeFront, serving
from pydantic import BaseModel
from test_http import HI, client, post

from engine.errors import RequestError, Words
from engine.http.grammars import GrammarBody
from engine.params.grammar import MAX_GRAMMAR, Grammar
from engine.params.sampling import SamplingParams

pytestmark = pytest.mark.anyio

CHAT, TEXT, NATIVE, RESPONSES = "/v1/chat/completions", "/v1/completions", "/generate", "/v1/responses"
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
AS_TEXT = json.dumps(SCHEMA, separators=(",", ":"))
FORMAT = {"type": "const_string", "value": "x"}
TAG = '{"type":"structural_tag","format":{"type":"const_string","value":"x"}}'
STRUCTURES = [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}]
ASKED: list[tuple[dict[str, Any], Grammar | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None, "regex": None, "json_object": False}, None),
    ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        Grammar("json_schema", AS_TEXT),
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": False}}},
        Grammar("json_schema", AS_TEXT, strict=False),
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": True, "strict": True}}},
        Grammar("json_schema", "true"),
    ),
    ({"response_format": {"type": "structural_tag", "format": FORMAT}}, Grammar("structural_tag", TAG)),
    ({"structural_tag": TAG}, Grammar("structural_tag", TAG)),
    ({"json_schema": SCHEMA}, Grammar("json_schema", AS_TEXT)),
    ({"json_schema": AS_TEXT, "strict_schema": False}, Grammar("json_schema", AS_TEXT, strict=False)),
    ({"regex": "a+"}, Grammar("regex", "a+")),
    ({"ebnf": 'root ::= "a"'}, Grammar("ebnf", 'root ::= "a"')),
    ({"lark": 'start: "a"'}, Grammar("lark", 'start: "a"')),
    ({"choice": ["a", "b"]}, Grammar("choice", '["a","b"]')),
    ({"json_object": True}, Grammar("json_object")),
    ({"guided_json": SCHEMA}, Grammar("json_schema", AS_TEXT)),
    ({"guided_json": AS_TEXT, "guided_decoding_backend": "outlines"}, Grammar("json_schema", AS_TEXT)),
    ({"guided_regex": "a+"}, Grammar("regex", "a+")),
    ({"guided_choice": ["a"]}, Grammar("choice", '["a"]')),
    ({"guided_grammar": 'root ::= "a"'}, Grammar("ebnf", 'root ::= "a"')),
    ({"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
    ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", AS_TEXT)),
    ({"structured_outputs": {"regex": "a+", "disable_fallback": True}}, Grammar("regex", "a+")),
    ({"structured_outputs": {"choice": ["a"]}}, Grammar("choice", '["a"]')),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, Grammar("ebnf", 'root ::= "a"')),
    ({"structured_outputs": {"json_object": True}}, Grammar("json_object")),
    ({"structured_outputs": {"structural_tag": TAG}}, Grammar("structural_tag", TAG)),
]
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"regex": "a", "ebnf": "b"}, "ebnf", "regex and ebnf are given"),
    ({"regex": "a", "response_format": {"type": "json_object"}}, "response_format", "only one of them"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "only one of them"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": "b"}}, "structured_outputs.whitespace_pattern", "not"),
    ({"structured_outputs": {"reg": "a"}}, "structured_outputs.reg", "did you mean regex?"),
    ({"choice": []}, "choice", "offer at least one"),
    ({"choice": ["a", ""]}, "choice", "none of them empty"),
    ({"regex": "a" * (MAX_GRAMMAR + 1)}, "regex", f"at most {MAX_GRAMMAR}"),
    ({"json_schema": "[1"}, "json_schema", "json_schema is no JSON"),
    ({"json_schema": "[]"}, "json_schema", "an object, true or false"),
    ({"structural_tag": "3"}, "structural_tag", "is an object"),
    ({"response_format": {"type": "structural_tag"}}, "response_format", "structures and triggers"),
    ({"response_format": {"type": "structural_tag", "structures": STRUCTURES}}, "response_format", "send one"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "required field `json_schema`"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format.json_schema", "sch"),
]


@pytest.mark.parametrize(("fields", "grammar"), ASKED)
async def test_every_clients_words_become_one_grammar(fields: dict[str, Any], grammar: Grammar | None) -> None:
    front = FakeFront()
    async with serving(front) as url:
        for path, prompt in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "x"})):
            status, answer = await post(url + path, {**prompt, **fields})
            assert status == 200, answer
    assert [job.grammar for job in front.asked] == [grammar, grammar]


@pytest.mark.parametrize(("fields", "param", "says"), REFUSED)
async def test_what_cannot_be_asked_is_refused_by_name(fields: dict[str, Any], param: str, says: str) -> None:
    front = FakeFront()
    async with serving(front) as url:
        status, answer = await post(url + TEXT, {"prompt": "x", **fields})
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert says in answer["error"]["message"] and front.asked == []


async def test_the_older_structural_tag_becomes_the_newer() -> None:
    front = FakeFront()
    asked = {"type": "structural_tag", "structures": STRUCTURES, "triggers": ["<a"]}
    async with serving(front) as url:
        await post(url + CHAT, {"messages": HI, "response_format": asked})
    grammar = front.asked[0].grammar
    assert grammar is not None
    content = {"type": "json_schema", "json_schema": SCHEMA}
    tag = {"type": "tag", "begin": "<a>", "content": content, "end": "</a>"}
    assert json.loads(grammar.source)["format"] == {"type": "triggered_tags", "triggers": ["<a"], "tags": [tag]}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [(fields, grammar) for fields, grammar in ASKED if fields.keys() <= {"regex", "ebnf", "lark", "choice"}]
    + [({"json_schema": AS_TEXT}, Grammar("json_schema", AS_TEXT)), ({"structural_tag": TAG}, ASKED[8][1])],
)
async def test_the_native_route_has_its_own(fields: dict[str, Any], grammar: Grammar | None) -> None:
    front = FakeFront()
    async with serving(front) as url:
        status, answer = await post(url + NATIVE, {"text": "x", "sampling_params": fields})
        both = {"text": "x", "sampling_params": {"regex": "a", "ebnf": "b"}}
        refused = await post(url + NATIVE, both)
    assert status == 200, answer
    assert front.asked[0].grammar == grammar
    assert (refused[0], refused[1]["error"]["param"]) == (400, "sampling_params.ebnf")


@pytest.mark.parametrize(
    ("format", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar("json_object")),
        ({"type": "json_schema", "name": "n", "schema": SCHEMA}, Grammar("json_schema", AS_TEXT)),
        (
            {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": False, "description": "d"},
            Grammar("json_schema", AS_TEXT, strict=False),
        ),
    ],
)
async def test_responses_tell_the_format_again(format: dict[str, Any], grammar: Grammar | None) -> None:
    front = FakeFront()
    async with serving(front) as url:
        status, answer = await post(url + RESPONSES, {"input": "x", "text": {"format": format, "verbosity": "medium"}})
    assert status == 200, answer
    assert front.asked[0].grammar == grammar
    assert {name: answer["text"]["format"][name] for name in format} == format


async def test_the_openai_client_parses_into_a_model() -> None:
    class Person(BaseModel):
        name: str

    from http_front import chunks

    front = FakeFront(chunks('{"name":', '"A"}'))
    async with serving(front) as url, client(url) as api:
        answer = await api.chat.completions.parse(model="fake", messages=HI, response_format=Person)
        other = await api.responses.parse(model="fake", input="x", text_format=Person)
    assert answer.choices[0].message.parsed == Person(name="A") == other.output_parsed
    for job in front.asked:
        grammar = job.grammar
        assert grammar is not None and grammar.strict and json.loads(grammar.source)["required"] == ["name"]


def test_every_field_is_tried() -> None:
    tried = {name for fields, _ in ASKED for name in fields} | {"guided_whitespace_pattern"}
    assert tried == set(GrammarBody.__struct_fields__)


def test_sampling_parameters_are_checked_by_the_names_that_a_client_has() -> None:
    with pytest.raises(RequestError, match="regex and lark are given") as caught:
        SamplingParams(regex="a", lark="b")
    told = caught.value.worded(Words({"regex": "--regex", "lark": "--lark"}))
    assert told.message.startswith("--regex and --lark are given") and told.param == "--lark"
    with pytest.raises(RequestError, match="json_schema is a dict; send it as text"):
        SamplingParams(json_schema={"type": "object"})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="strict_schema is 1; it must be true or false"):
        SamplingParams(strict_schema=1)  # type: ignore[arg-type]
    for fields in ({"regex": "\ud800"}, {"choice": ("a", "\ud800")}):
        with pytest.raises(RequestError, match="half of a surrogate pair"):
            SamplingParams(**fields)  # type: ignore[arg-type]
