"""Every field of gen on every backend: it means the same there, or is refused before anything is sent.

The table has a row for each keyword; a keyword without a row fails the first test. Log-probabilities have tests of
their own, because servers tell them in three ways.
"""

import inspect
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from http_front import serving
from real_server import served
from test_language_servers import Scripted, add, call_of, other

from engine import Engine
from engine.errors import ProgramError
from engine.lang import (
    Anthropic,
    Server,
    State,
    assistant,
    function,
    gen,
    greedy_token_selection,
    separate_reasoning,
    user,
)
from engine.lang.expressions import KNOWN
from engine.lang.values import Meta, ScoredToken
from engine.messages.reply import TokenLogprob
from engine.params.grammar import Grammar

TAG = '{"type":"structural_tag","format":{"type":"const_string","value":"bc"}}'
SCHEMA = '{"const":1}'
ASKED = {"type": "json_schema", "json_schema": {"name": "reply", "schema": {"const": 1}, "strict": True}}
LOOSE = {"type": "json_schema", "json_schema": {"name": "reply", "schema": {"const": 1}, "strict": False}}
CONFIG = {"format": {"type": "json_schema", "schema": {"const": 1}}}
# A field: what gen is given, and what OpenAI's and Anthropic's bodies say of it; None: they have no such field.
Row = tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None]
TABLE: dict[str, Row] = {
    "temperature": ({"temperature": 0.5}, {"temperature": 0.5}, {"temperature": 0.5}),
    "top_p": ({"top_p": 0.5}, {"top_p": 0.5}, {"top_p": 0.5}),
    "top_k": ({"top_k": 3}, None, {"top_k": 3}),
    "min_p": ({"min_p": 0.5}, None, None),
    "seed": ({"seed": 3}, {"seed": 3}, None),
    "max_tokens": ({"max_tokens": 3}, {"max_tokens": 3}, {"max_tokens": 3}),
    "stop": ({"stop": "e"}, {"stop": ["e"]}, {"stop_sequences": ["e"]}),
    "stop_token_ids": ({"stop_token_ids": [101]}, None, None),
    "ignore_eos": ({"ignore_eos": True}, None, None),
    "stop_regex": ({"stop_regex": "[ef]"}, None, None),
    "min_tokens": ({"min_tokens": 2}, None, None),
    "presence_penalty": ({"presence_penalty": 0.5}, {"presence_penalty": 0.5}, None),
    "frequency_penalty": ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}, None),
    "repetition_penalty": ({"repetition_penalty": 1.5}, None, None),
    "logit_bias": ({"logit_bias": {98: -100}}, {"logit_bias": {"98": -100}}, None),
    "bad_words": ({"bad_words": ["d"]}, None, None),
    "allowed_token_ids": ({"allowed_token_ids": [98, 99, 120]}, None, None),
    "logprobs": ({"logprobs": 2}, {"logprobs": 2}, None),
    "prompt_logprobs": ({"prompt_logprobs": 2}, None, None),
    "skip_special_tokens": ({"skip_special_tokens": False}, None, None),
    "include_stop_str_in_output": ({"include_stop_str_in_output": True, "stop": "e"}, None, None),
    "detokenize": ({"detokenize": False, "logprobs": 0}, None, None),
    "json_object": ({"json_object": True}, {"response_format": {"type": "json_object"}}, None),
    "json_schema": ({"json_schema": SCHEMA}, {"response_format": ASKED}, {"output_config": CONFIG}),
    "strict_schema": ({"json_schema": SCHEMA, "strict_schema": False}, {"response_format": LOOSE}, None),
    "regex": ({"regex": "[4-9]{2}"}, None, None),
    "ebnf": ({"ebnf": 'root ::= "xy"'}, None, None),
    "lark": ({"lark": 'start: "xy"'}, None, None),
    "choice": ({"choice": ("xy", "z")}, None, None),
    "structural_tag": ({"structural_tag": TAG}, None, None),
    "grammar": ({"grammar": Grammar("regex", "[4-9]{2}")}, None, None),
}
ROWS = pytest.mark.parametrize(("name", "row"), TABLE.items(), ids=list(TABLE))


def test_the_table_has_every_field() -> None:
    assert set(TABLE) == KNOWN
    assert set(inspect.signature(gen).parameters) == {
        "name", "max_tokens", "n", "dtype", "choices", "choices_method", "tools", "tool_choice", "tool_rounds", "fields"
    }, "the last test looks at each"  # fmt: skip


@function
def plain(s: State, text: str = "ab", **fields: Any) -> None:
    s += text + gen("x", **{"max_tokens": 6, **fields})


@function
def chat(s: State, **fields: Any) -> None:
    s += user("ab") + assistant(gen("x", **{"max_tokens": 6, **fields}))


# ── in the process, and our server ───────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(model="echo", log_level="error") as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Server]:
    with served(engine) as server:
        yield server


def said(program: Any, backend: Any, fields: dict[str, Any], *, stream: bool = False) -> tuple[str, Meta]:
    """The reply, and what is known of it but for the cache."""
    asked = {"temperature": 0, **fields}
    if stream:
        with program.bind(**asked).stream(backend=backend) as s:
            assert "".join(s.text_iter("x")) == s["x"]
    else:
        s = program.bind(**asked).run(backend=backend)
    meta = s.get_meta_info("x")
    return s["x"], msgspec.structs.replace(meta, cached_tokens=0)


@ROWS
def test_our_server_does_what_the_process_does(engine: Engine, server: Server, name: str, row: Row) -> None:
    for program in (plain, chat):
        local = said(program, engine, row[0])
        assert said(program, server, row[0]) == local
        assert said(program, server, row[0], stream=True) == local


def test_log_probabilities_have_ids_ranks_and_the_likeliest(engine: Engine, server: Server) -> None:
    """The echo model is as good as certain of the next letter; two letters of one text would be told apart."""
    for backend in (engine, server):
        text, meta = said(plain, backend, {"logprobs": 2, "prompt_logprobs": 1, "max_tokens": 2})
        assert text == "cd" and [each.text for each in meta.logprobs] == ["c", "d"]
        first = meta.logprobs[0]
        assert (first.id, first.bytes, first.rank, round(first.logprob)) == (99, b"c", 1, 0)
        assert first.top[0] == ScoredToken("c", b"c", first.logprob, 99, 1) and first.top[1].rank == 2
        (asked,) = meta.prompt_logprobs  # of "ab", the first has none
        assert (asked.text, asked.id, asked.rank, len(asked.top)) == ("b", 98, 1, 1)
        half = said(plain, backend, {"logprobs": 0, "allowed_token_ids": [0xE2], "max_tokens": 1})[1].logprobs
        assert [(each.bytes, each.id, each.top) for each in half] == [(b"\xe2", 0xE2, ())]
        (far,) = said(plain, backend, {"text": "az", "prompt_logprobs": 2, "max_tokens": 0})[1].prompt_logprobs
        assert (far.text, far.rank, [each.rank for each in far.top]) == ("z", 2, [1, 2]), "all others are alike"
        assert far.top[0].text == "b" and far.id not in [each.id for each in far.top]


# ── other servers ────────────────────────────────────────────────────────────────────────────


async def refused(program: Any, backend: Any, fields: dict[str, Any]) -> str:
    """Why the reply did not come."""
    s = await program.bind(**fields).run_async(backend=backend)
    with pytest.raises(ProgramError) as caught:
        await s.get("x")
    return str(caught.value)


@ROWS
@pytest.mark.anyio
async def test_another_server_is_sent_the_field_or_nothing(name: str, row: Row) -> None:
    given, body, _ = row
    sent: list[dict[str, Any]] = []
    async with other(sent) as url, Server(url) as server:
        for program in (plain, chat):
            if body is None:
                named = "regex" if name == "grammar" else name
                says = rf"the server at {url.rstrip('/')} \(others\) has no field for .*{named}.*; leave it out, or use"
                assert re.search(says, await refused(program, server, given))
                continue
            s = await program.bind(**given).run_async(backend=server)
            assert await s.get("x") in ("yes", "hmyes")
            if name == "logprobs":
                assert [each.text for each in s.get_meta_info("x").logprobs] == ["yes"]
                body = {"logprobs": 2} if program is plain else {"logprobs": True, "top_logprobs": 2}
            own = {"model", "prompt", "messages"} | ({"max_tokens"} - body.keys())
            assert {key: value for key, value in sent.pop().items() if key not in own} == body
    assert not sent


@ROWS
@pytest.mark.anyio
async def test_anthropics_api_is_sent_the_field_or_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, row: Row
) -> None:
    given, _, body = row
    sent: list[dict[str, Any]] = []

    async def ask(path: str, body: dict[str, Any]) -> bytes:
        sent.append(msgspec.json.decode(msgspec.json.encode(body)))
        return b'{"content":[{"type":"text","text":"yes"}],"stop_reason":"end_turn"}'

    async with Anthropic("http://there", model="m") as server:
        monkeypatch.setattr(server, "_ask", ask)
        if body is None:
            named = {"grammar": "regex"}.get(name, name)
            says = rf"with Anthropic's API, has no field for .*{named}.*; leave it out, or use"
            assert re.search(says, await refused(chat, server, given)) and not sent
            return
        s = await chat.bind(**given).run_async(backend=server)
        assert await s.get("x") == "yes"
        own = {"model", "messages"} | ({"max_tokens"} - body.keys())
        assert {key: value for key, value in sent[0].items() if key not in own} == body


# ── log-probabilities of other servers ───────────────────────────────────────────────────────

LIKELY = [{"token": "no", "logprob": -0.5, "bytes": [110, 111]}, {"token": "yes", "logprob": -1.0, "bytes": None}]
CONTENT = {"content": [{"token": "yes", "logprob": -1.0, "bytes": [121, 101, 115], "top_logprobs": LIKELY}]}
NO, YES = ScoredToken("no", b"no", -0.5, None, 1), ScoredToken("yes", b"yes", -1.0, None, 2)
TOLD = (ScoredToken("yes", b"yes", -1.0, None, 2, (NO, YES)),)
# Beside the two likeliest stands the token itself, which is the third, half a character.
THIRD = {
    "tokens": ["bytes:\\xe2"],
    "token_logprobs": [-3.0],
    "top_logprobs": [{"yes": -1.0, "bytes:\\xe2": -3.0, "no": -0.5}],
}
HALF = (ScoredToken("\ufffd", b"\xe2", -3.0, None, None, (NO, YES)),)
ALONE = {"tokens": ["a", "b"], "token_logprobs": [None, -1.0], "top_logprobs": None}


@asynccontextmanager
async def telling(logprobs: Any) -> AsyncIterator[str]:
    """A server that is none of ours, whose replies have these `logprobs`, and in streams a last event without."""

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "owned_by": "others"}]})

    async def reply(request: web.Request) -> web.StreamResponse:
        said: dict[str, Any] = {"text": "yes", "message": {"content": "yes"}, "delta": {"content": "yes"}}
        choice = {**said, "logprobs": logprobs}
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        if not (await request.json()).get("stream"):
            return web.json_response({"choices": [{**choice, "finish_reason": "stop"}], "usage": usage})
        response = web.StreamResponse()
        await response.prepare(request)
        for each in ([choice], [{"delta": {}, "logprobs": None, "finish_reason": "stop"}]):
            await response.write(b"data: " + msgspec.json.encode({"choices": each, "usage": usage}) + b"\n\n")
        return response

    app = web.Application()
    paths = ("/v1/completions", "/v1/chat/completions")
    app.add_routes([web.get("/v1/models", models), *(web.post(path, reply) for path in paths)])
    async with TestServer(app) as server:
        yield str(server.make_url("/"))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("program", "told", "expected"),
    [
        (chat, CONTENT, TOLD),
        (plain, CONTENT, TOLD),
        (plain, THIRD, HALF),
        (plain, ALONE, (ScoredToken("b", b"b", -1.0),)),
    ],
)
async def test_log_probabilities_in_the_formats_of_servers(program: Any, told: Any, expected: Any) -> None:
    asking = program.bind(logprobs=2)
    async with telling(told) as url, Server(url) as server:
        s = await asking.run_async(backend=server)
        async with asking.stream_async(backend=server) as followed:
            assert [piece async for piece in followed.text_async_iter("x")] == ["yes"]
    assert s.get_meta_info("x").logprobs == followed.get_meta_info("x").logprobs == expected


@pytest.mark.anyio
async def test_a_server_that_tells_none_is_not_passed_over() -> None:
    async with telling(None) as url, Server(url) as server:
        for program in (plain, chat):
            assert "has told no logprobs, which it was asked for" in await refused(program, server, {"logprobs": 0})


# ── what gen itself takes ────────────────────────────────────────────────────────────────────


@function
def keywords(s: State) -> None:
    s += "ab" + gen("many", n=2, max_tokens=1) + "4" + gen("typed", dtype=int, max_tokens=2)
    s += "!" + gen("one", choices=["x", '"'], choices_method=greedy_token_selection)


def test_keywords_of_gen_in_the_process_and_on_our_server(engine: Engine, server: Server) -> None:
    for backend in (engine, server):
        s = keywords.run(backend=backend, temperature=0)
        assert [s[name] for name in ("many", "typed", "one")] == [["c", "c"], "56", '"']


@pytest.mark.anyio
@pytest.mark.parametrize("make", [Server, lambda url: Anthropic(url, model="m")], ids=["server", "anthropic"])
async def test_keywords_that_other_apis_have_not_are_refused_by_their_names(make: Any) -> None:
    sent: list[dict[str, Any]] = []
    async with other(sent) as url, make(url) as server:
        assert "has no field for dtype; leave it out" in await refused(chat, server, {"dtype": int})
        assert "which select needs" in await refused(chat, server, {"choices": ["a"], "max_tokens": None})
    assert not sent


@pytest.mark.anyio
async def test_a_reply_behind_tools_has_log_probabilities_of_its_own() -> None:
    @function
    async def program(s: State) -> None:
        s += user("?") + separate_reasoning(
            assistant(gen("x", tools=[add], tool_choice="auto", tool_rounds=1, logprobs=0))
        )

    front = Scripted(call_of("add", '{"a": 3}'), "It is 5.")
    front.logprobs = [(TokenLogprob(1, "call", b"call", -1.0, 1),), (TokenLogprob(2, "It", b"It", -2.0, 3),)]
    async with serving(front) as url, Server(url) as server:
        s = await program.run_async(backend=server)
    meta = s.get_meta_info("x")
    assert s["x"] == "It is 5." and meta.logprobs == (ScoredToken("It", b"It", -2.0, 2, 3),)
    assert meta.prompt_tokens == 14, "of both rounds"
