"""Requests made from our own OpenAPI document, right and wrong ones, against a real server of the echo model.

Whatever is sent, the answer is as the document says and no 5xx but a 503 of our own; afterwards the server is
healthy, every page is free, and the reply that everyone knows is still the same. `FUZZ_REQUESTS=5000 pytest -s
--timeout 600 tests/null/test_fuzz.py` sends that many, chosen anew each time; the few of every run are always the same.
"""

import json
import os
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import schemathesis
from house import counted
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance
from test_processes import Server, serving

from engine.http.app import ROUTES
from engine.http.openapi import describe

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")
REQUESTS = os.environ.get("FUZZ_REQUESTS")
BY_DESIGN = {"queue_full", "starting", "draining", "engine_unavailable"}

schema = schemathesis.openapi.from_dict(describe(ROUTES, models=["echo"], keyed=False))
operations = [found.ok() for found in schema.get_all_operations()]
taking = [operation for operation in operations if operation.body or operation.path_parameters or operation.query]


HI = [{"role": "user", "content": "hi"}]
SERVED: dict[str, dict[str, Any]] = {  # what is answered with 200, for a few fields at a time to be changed
    "/v1/chat/completions": {"messages": HI, "max_tokens": 8},
    "/v1/completions": {"prompt": "ab", "max_tokens": 8},
    "/v1/responses": {"input": "ab", "max_output_tokens": 8},
    "/v1/messages": {"messages": HI, "max_tokens": 8},
    "/generate": {"text": "ab", "sampling_params": {"max_new_tokens": 8}},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [97, 98]},
}

FORMED = ("/v1/chat/completions", "/v1/completions", "/generate", "/v1/responses")


def deep(levels: int) -> dict[str, Any]:
    """A schema of arrays in arrays."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 2},
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"type": "string", "maxLength": 10**9},
    {"type": "string", "minLength": 10**6},
    {"type": "array", "items": {"type": "string"}, "minItems": 10**6},
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "pattern": "((a{1,300}){1,300}){1,300}"},
    {"type": "integer", "minimum": -(10**30), "maximum": 10**30},
    {"enum": list(range(3000))},
    {"anyOf": []},
    {"properties": {"": {"not": {}}}},
    {"type": "object", "patternProperties": {"(": True}},
    {"minimum": None, "required": "a", "properties": []},
    *({keyword: value} for keyword in ("type", "items", "properties", "enum", "$ref", "anyOf", "format", "x-guidance")
      for value in (None, 3, "x", [], {}, [None], {"a": 3})),
    deep(30),
    deep(400),
    True,
    False,
]  # fmt: skip
TEXTS: list[str] = [
    *("a", "a*", "", "(", "[", "a{3,2}", "a{1,99999999}", "(a|b)*c", "(?=a)", r"\1", "(?i)é", "[^\n]*", "((a*)*)*b"),
    *('root ::= "a"', "root ::= root", 'root ::= root "a" | "b"', "root ::=", 'root ::= "a"{1,100000}', "x ::= y"),
    *('start: "a"', "start: start", "start: /a/ start?", "start: %json {}", 'start: %json {"not": {}}', "start: <[9]>"),
    *("start: %regex {}", "%llguidance {", "start: /(/", 'start: "a"{0,9999999}', "start: (((((((((", "{", "[]"),
    *("null", "\x00", "\ud7ff", "é" * 9000),
]
TAGS: list[Any] = [
    {"type": "structural_tag", "format": {"type": "const_string", "value": "a"}},
    {"type": "structural_tag", "format": {"type": "tag", "begin": "<", "content": {"type": "any_text"}, "end": ""}},
    {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": [""], "tags": []}},
    {"type": "structural_tag", "format": {"type": "or", "elements": []}},
    {"type": "structural_tag", "format": {"type": "repeat", "min": 5, "max": 2, "content": {"type": "any_text"}}},
    {"type": "structural_tag", "format": {"type": "sequence", "elements": [3, None, {}]}},
    {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": 3}},
    {"type": "structural_tag"},
]


def form(random: Random) -> dict[str, Any]:
    """What a completion may be asked to be: rightly, wrongly, and to do harm."""
    schema, text, tag = random.choice(SCHEMAS), random.choice(TEXTS), random.choice(TAGS)
    named = {"name": "n", "schema": schema, "strict": random.choice([True, False, None])}
    forms: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": named}},
        {"response_format": random.choice([{"type": "json_object"}, {"type": "text"}, {"type": "x"}, tag])},
        {"json_schema": json.dumps(schema)},
        {random.choice(["regex", "ebnf", "lark", "guided_regex", "guided_grammar", "json_schema"]): text},
        {"structured_outputs": {random.choice(["json", "regex", "grammar", "structural_tag"]): text}},
        {"choice": [text, "b"]},
        {"structural_tag": tag},
        {"json_object": True, "regex": text},
    ]
    return random.choice(forms)


def formed(case: Case, random: Random) -> Case:
    """`case` as it is served, under a grammar."""
    asked = form(random)
    body = dict(SERVED[case.operation.path])
    if case.operation.path == "/generate":
        body["sampling_params"] = {"max_new_tokens": 8, **asked}
    elif case.operation.path == "/v1/responses":
        format = asked.get("response_format", {})
        body["text"] = {"format": {**format.pop("json_schema", {}), **format} or {"type": "json_object"}}
    else:
        body |= asked
    if random.randrange(2):
        body["stream"] = True
    if random.randrange(4) == 0:
        body["n" if case.operation.path.startswith("/v1/c") else "temperature"] = 2
    case.body = body
    return case


STREAMING = {route.path for route in ROUTES if route.events}


def cases() -> st.SearchStrategy[Case]:
    """Requests of every operation that takes anything: such as the document allows, such as it forbids, such as are
    served, but for a few fields, and such as ask for a grammar."""
    right = {one.path: one.as_strategy(generation_mode=GenerationMode.POSITIVE) for one in taking}
    wrong = [one.as_strategy(generation_mode=GenerationMode.NEGATIVE) for one in taking if one.body]
    near = [st.builds(nearly, right[path], st.randoms(use_true_random=False)) for path in SERVED]
    forms = [st.builds(formed, right[path], st.randoms(use_true_random=False)) for path in FORMED]
    return st.one_of(st.one_of(list(right.values())), st.one_of(wrong), st.one_of(near), st.one_of(forms))


def nearly(case: Case, random: Random) -> Case:
    """`case` with at most three of its body's fields, over a body that is served; streamed every other time."""
    given = case.body if isinstance(case.body, dict) else {}  # a body may be left out
    fields = {name: whole(value) for name, value in given.items()}
    kept = random.sample(sorted(fields), min(len(fields), random.randrange(4)))
    case.body = SERVED[case.operation.path] | {name: fields[name] for name in kept}
    if case.operation.path in STREAMING and random.randrange(2):
        case.body["stream"] = True
    return case


def whole(value: Any) -> Any:
    """`value` with its integers written as such: to a JSON schema 1.0 is one, to the server it is not."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case list():
            return [whole(item) for item in value]
        case dict():
            return {name: whole(item) for name, item in value.items()}
        case _:
            return value


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--max-model-len", "64", "--max-running", "8", "--grammar-seconds", "1") as server:
        yield server


def post(server: Server, path: str, body: object = None) -> Any:
    data = b"" if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(server.url + path, data, timeout=30) as response:
        return json.load(response)


def send(server: Server, case: Case) -> int:
    """Send `case` and hold the answer against the document."""
    response = case.call(base_url=server.url, timeout=30)
    case.validate_response(response, checks=[content_type_conformance, response_schema_conformance])
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error["message"] and "type" in error and "param" in error
        assert response.status_code < 500 or (response.status_code == 503 and error["code"] in BY_DESIGN), error
    if case.operation.path == "/pause_generation":
        post(server, "/continue_generation")
    return response.status_code


def test_no_request_harms_the_server(server: Server) -> None:
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=int(REQUESTS or 250),
        derandomize=REQUESTS is None,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def fuzz(case: Case) -> None:
        statuses[send(server, case)] += 1

    fuzz()
    for operation in operations:
        if operation not in taking:
            statuses[send(server, operation.Case())] += 1
    print("answers by status:", dict(statuses))
    assert statuses[200] and statuses[400] and statuses[404]
    check_all_is_well(server)
    server.process.terminate()
    assert server.wait_end() == 0
    assert "Traceback" not in server.log


def check_all_is_well(server: Server) -> None:
    """All is as before the first request."""
    known = {"text": "a", "sampling_params": {"temperature": 0, "max_new_tokens": 9}}
    assert post(server, "/generate", known)["text"] == counted("a", 9)
    with urllib.request.urlopen(f"{server.url}/health_generate", timeout=30) as response:
        assert response.status == 200
    for _ in range(500):
        if (flushed := post(server, "/flush_cache"))["in_use"] == 0:
            break
    assert flushed["in_use"] == 0
