"""Requests made from our own OpenAPI document, right and wrong ones, against a real server of the echo model; and such
as ask for tools, schemas and expressions of all kinds.

Whatever is sent, the answer is as the document says and no 5xx but a 503 of our own; afterwards the server is
healthy, every page is free, and the reply that everyone knows is still the same. `FUZZ_REQUESTS=5000 pytest -s
--timeout 600 tests/unit/http/test_fuzz.py` sends that many, chosen anew each time; the few of every run are always the
same.
"""

import json
import os
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import hostile_grammars
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
# Short, and able to say all that there is of tools.
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}\n{% endfor %}"
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
)
SERVED: dict[str, dict[str, Any]] = {  # what is answered with 200, for a few fields at a time to be changed
    "/v1/chat/completions": {"messages": HI, "max_tokens": 8},
    "/v1/completions": {"prompt": "ab", "max_tokens": 8},
    "/v1/responses": {"input": "ab", "max_output_tokens": 8},
    "/v1/messages": {"messages": HI, "max_tokens": 8},
    "/generate": {"text": "ab", "sampling_params": {"max_new_tokens": 8}},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [97, 98]},
}

STREAMING = {route.path for route in ROUTES if route.events}


def cases() -> st.SearchStrategy[Case]:
    """Requests of every operation that takes anything: such as the document allows, such as it forbids, and such as
    are served, but for a few fields."""
    right = {one.path: one.as_strategy(generation_mode=GenerationMode.POSITIVE) for one in taking}
    wrong = [one.as_strategy(generation_mode=GenerationMode.NEGATIVE) for one in taking if one.body]
    near = [st.builds(nearly, right[path], st.randoms(use_true_random=False)) for path in SERVED]
    return st.one_of(st.one_of(list(right.values())), st.one_of(wrong), st.one_of(near), asking(), asking())


# ── tools, schemas, expressions ──────────────────────────────────────────────────────────────

TOOLS = {"tools"}
NAMES = st.sampled_from(["f", "f", "f", "get_weather", "a-b.c", "f" * 128, "f" * 129, "", "f g", "é", '"'])
KEYS = st.sampled_from(["a", "b", "é", '"', "x" * 40, ""])
EXPRESSIONS = st.one_of(
    st.sampled_from(hostile_grammars.EXPRESSIONS),
    st.sampled_from(
        [r"\d{1,3}", "(a|b)*c", "a{1000000}", "(a*)*b", "[", r"\p{L}+", r"(?<=a)b", r"\1", "^a$", ".*", ""]
    ),
    st.text("ab01.*+?()[]{}|\\^$,-", max_size=12),
)
LEAVES = st.one_of(
    st.sampled_from([True, False, {}, {"type": "null"}, {"$ref": "#"}, {"$ref": "#/$defs/x"}, {"not": {}}, {"if": {}}]),
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(
                ["string", "integer", "number", "boolean", "object", "array", "null", "strange", ["string", "null"]]
            )
        },
        optional={
            "enum": st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=3),
            "const": st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=3)),
            "pattern": EXPRESSIONS,
            "format": st.sampled_from(["date", "email", "uuid", "strange"]),
            "minLength": st.sampled_from([0, 3, -1, 10**6]),
            "maxLength": st.sampled_from([0, 5, 200, 10**9]),
            "minimum": st.integers(-5, 5),
            "maximum": st.integers(-5, 5),
            "multipleOf": st.sampled_from([0, 1, 0.1]),
            "strange": st.just(1),
        },
    ),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(KEYS, inner, max_size=3)},
            optional={
                "required": st.lists(KEYS, max_size=2),
                "additionalProperties": inner,
                "minProperties": st.integers(0, 3),
                "$defs": st.fixed_dictionaries({"x": inner}),
            },
        ),
        st.fixed_dictionaries(
            {"type": st.just("array"), "items": inner},
            optional={"minItems": st.integers(0, 3), "maxItems": st.integers(0, 3), "uniqueItems": st.booleans()},
        ),
        st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=2)}),
        st.fixed_dictionaries({"allOf": st.lists(inner, max_size=2)}),
    ),
    max_leaves=5,
)


ANY_SCHEMA = st.one_of(SCHEMAS, st.sampled_from(hostile_grammars.SCHEMAS))
TAGS = st.one_of(  # formats of structural tags
    st.builds(
        lambda schema: hostile_grammars.TAG | {"content": {"type": "json_schema", "json_schema": schema}}, ANY_SCHEMA
    ),
    st.builds(lambda pattern: {"type": "regex", "pattern": pattern}, EXPRESSIONS),
    st.sampled_from(hostile_grammars.FORMATS),
)
GRAMMARS = st.sampled_from(hostile_grammars.SOURCES)
FUNCTIONS = st.fixed_dictionaries(
    {"name": NAMES},
    optional={"parameters": ANY_SCHEMA, "strict": st.booleans(), "description": st.text(max_size=5)},
)
CLAUDES = st.fixed_dictionaries({"name": NAMES, "input_schema": ANY_SCHEMA}, optional={"strict": st.booleans()})
MODES = st.sampled_from(["none", "auto", "required", "any"])
FORMATS = st.one_of(
    st.builds(lambda schema: {"type": "json_schema", "json_schema": {"schema": schema}}, ANY_SCHEMA),
    st.builds(lambda format: {"type": "structural_tag", "format": format}, TAGS),
    st.sampled_from(
        [
            {"type": "json_object"},
            {"type": "text"},
            {"type": "structural_tag", "triggers": [""], "structures": [{"begin": "", "end": "", "schema": {}}]},
            {"type": "structural_tag", "triggers": [], "structures": []},
        ]
    ),
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.text(max_size=3),
            "function": st.fixed_dictionaries({"name": NAMES, "arguments": st.text('{}"a:1', max_size=6)}),
        }
    ),
    max_size=2,
)
PAST = st.lists(
    st.one_of(
        st.just(HI[0]),
        st.fixed_dictionaries({"role": st.just("assistant"), "tool_calls": CALLS}),
        st.fixed_dictionaries(
            {"role": st.just("tool"), "tool_call_id": st.text(max_size=3), "content": st.text(max_size=3)}
        ),
    ),
    max_size=3,
)
ASKING: dict[str, dict[str, st.SearchStrategy[Any]]] = {  # by path, the fields of bodies over those that are served
    "/v1/chat/completions": {
        "messages": PAST,
        "tools": st.one_of(
            st.lists(st.builds(lambda function: {"type": "function", "function": function}, FUNCTIONS), max_size=3),
            st.just([{"type": "function", "function": {"name": f"f{number % 150}"}} for number in range(300)]),
        ),
        "tool_choice": st.one_of(
            MODES, st.builds(lambda name: {"type": "function", "function": {"name": name}}, NAMES)
        ),
        "parallel_tool_calls": st.booleans(),
        "response_format": FORMATS,
        "regex": EXPRESSIONS,
        "guided_grammar": GRAMMARS,
        "choice": st.sampled_from(
            [[], [""], ["a", "a"], ["\x00", "\x7f"], [hostile_grammars.HALF], ["x" * 70_000], [*map(str, range(1500))]]
        ),
        "strict_schema": st.booleans(),
        "separate_reasoning": st.booleans(),
        "stream": st.booleans(),
        "n": st.sampled_from([1, 2]),
    },
    "/v1/responses": {
        "tools": st.lists(st.builds(lambda function: {"type": "function", **function}, FUNCTIONS), max_size=3),
        "tool_choice": st.one_of(MODES, st.builds(lambda name: {"type": "function", "name": name}, NAMES)),
        "stream": st.booleans(),
    },
    "/v1/messages": {
        "tools": st.lists(CLAUDES, max_size=3),
        "tool_choice": st.builds(lambda mode: {"type": mode}, MODES),
        "stream": st.booleans(),
    },
    "/generate": {
        "sampling_params": st.fixed_dictionaries(
            {"max_new_tokens": st.just(40)},
            optional={
                "regex": EXPRESSIONS,
                "ebnf": GRAMMARS,
                "lark": GRAMMARS,
                "json_schema": ANY_SCHEMA.map(json.dumps),
                "structural_tag": TAGS.map(lambda format: json.dumps({"type": "structural_tag", "format": format})),
            },
        )
    },
}


@st.composite
def asking(draw: st.DrawFn) -> Case:
    """A request that asks for tools or a grammar."""
    path = draw(st.sampled_from(sorted(ASKING)))
    (operation,) = (one for one in taking if one.path == path)
    names = draw(st.lists(st.sampled_from(sorted(ASKING[path])), max_size=3, unique=True))
    fields = draw(st.fixed_dictionaries({name: ASKING[path][name] for name in {*names, *TOOLS & {*ASKING[path]}}}))
    return operation.Case(body=SERVED[path] | fields, media_type="application/json")


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
    limits = ("--max-model-len", "160", "--max-running", "8", "--grammar-seconds", "1")
    with serving(*limits, "--chat-template", TEMPLATE, "--reasoning-parser", "qwen3") as server:
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
    assert "Traceback" not in server.log, server.log[server.log.index("Traceback") :][:3000]


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
