"""Real replies, whole and streamed, of every route that generates, held against the published OpenAPI document.

Its schemas of replies allow no other field than those they name, so a reply that says more is found as well.
"""

import json
from typing import Any

import aiohttp
import jsonschema_rs
import pytest
from http_front import FakeFront, chunks, serving
from test_http_routes import HI, Site, open_site

from engine.errors import WorkerError
from engine.http.app import ROUTES
from engine.http.openai.replies import OpenAIReply, Wording
from engine.http.openapi import describe

pytestmark = pytest.mark.anyio
DOCUMENT = describe(ROUTES, models=["echo"], keyed=False)
CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"
SHORT: dict[str, Any] = {"max_tokens": 5, "temperature": 0}
ASKED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HI}),
    (CHAT, {"messages": HI, "n": 3, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1}),
    (CHAT, {"messages": HI, "stop": "\r", "skip_special_tokens": False, "include_stop_str_in_output": True}),
    (CHAT, {"messages": HI, "detokenize": False, "logprobs": True}),
    (TEXT, {"prompt": "ab"}),
    (TEXT, {"prompt": ["ab", [7]], "n": 2, "logprobs": 2, "echo": True, "prompt_logprobs": 0}),
    (TEXT, {"prompt": "ab", "stop_token_ids": [101], "logprobs": 0}),
    (TEXT, {"prompt": "ab", "max_tokens": 0, "echo": True, "logprobs": 1}),
    (NATIVE, {"text": "ab"}),
    (NATIVE, {"text": ["ab", "c"], "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}),
    (NATIVE, {"input_ids": [5], "return_logprob": True, "return_text_in_logprobs": True}),
    (NATIVE, {"text": "ab", "sampling_params": {"n": 2, "stop": "f", "max_new_tokens": 9}}),
    ("/v1/responses", {"input": "ab", "instructions": "Hi.", "max_output_tokens": 4}),
    ("/v1/responses", {"input": "ab", "stop": "\r"}),
    ("/v1/messages", {"messages": HI}),
    ("/v1/messages", {"messages": HI, "stop_sequences": ["\r"], "system": "Hi."}),
]


def hold(schema: dict[str, Any], value: Any) -> None:
    jsonschema_rs.validator_for({**schema, "components": DOCUMENT["components"]}).validate(value)


def content(path: str, status: int = 200, method: str = "post") -> dict[str, Any]:
    answers = DOCUMENT["paths"][path][method]["responses"]
    return answers.get(str(status), answers["default"])["content"]


def hold_events(described: dict[str, Any], raw: str) -> list[Any]:
    """The data of the events in `raw`, each as described."""
    data = described["schema"]["properties"]["data"]
    *alone, of_json = data.get("anyOf", [data])
    held = []
    for event in raw.removesuffix("\n\n").split("\n\n"):
        value = event.rpartition("data: ")[2]
        if {"const": value} not in alone:
            held.append(json.loads(value))
            hold(of_json["contentSchema"], held[-1])
    return held


async def ask(site: Site, path: str, body: dict[str, Any]) -> Any:
    """The answer, or a stream's answers, as the document says they are."""
    async with site.session.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        described = content(path)[response.content_type]
        if response.content_type == "text/event-stream":
            return hold_events(described, await response.text())
        answer = await response.json()
    hold(described["schema"], answer)
    return answer


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("path", "body"), ASKED)
async def test_replies_are_as_described(path: str, body: dict[str, Any], streamed: bool) -> None:
    short = SHORT if path in (CHAT, TEXT, "/v1/messages") else {}
    options = {"stream_options": {"include_usage": True}} if streamed and path in (CHAT, TEXT) else {}
    async with open_site(seconds=0.001) as site:
        assert await ask(site, path, {**short, **body, **options, "stream": streamed})
        if options:
            always = {"stream_options": {"continuous_usage_stats": True}}
            assert await ask(site, path, {**short, **body, **always, "stream": True})


async def test_a_response_at_every_time() -> None:
    async with open_site(seconds=0.001) as site:
        body = {"input": "ab", "background": True, "max_output_tokens": 50}
        first = await ask(site, "/v1/responses", body)
        assert first["status"] == "queued"
        one = "/v1/responses/{response_id}"
        for path, method in ((one, "get"), (one + "/cancel", "post"), (one, "get"), (one + "/input_items", "get")):
            async with site.session.request(method, path.format(response_id=first["id"])) as response:
                hold(content(path, method=method)["application/json"]["schema"], await response.json())
        events = await ask(site, "/v1/responses", {**body, "stream": True})
        assert events[0]["type"] == "response.queued"


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE, "/v1/responses", "/v1/messages"])
async def test_errors_are_as_described(path: str) -> None:
    """Refused before it begins, refused by the engine, and failed in the middle of a stream."""
    key = {CHAT: "messages", TEXT: "prompt", NATIVE: "text", "/v1/responses": "input", "/v1/messages": "messages"}[path]
    body = {key: HI if key == "messages" else "ab"} | ({"max_tokens": 9} if path == "/v1/messages" else {})
    for front, asked, status in (
        (FakeFront(), {}, 400),
        (FakeFront([WorkerError("gone")]), body, 503),
        (FakeFront([*chunks("a", "b")[:1], WorkerError("gone")]), {**body, "stream": True}, 200),
    ):
        async with (
            serving(front) as url,
            aiohttp.ClientSession(url) as session,
            session.post(path, json=asked) as response,
        ):
            assert response.status == status
            if status == 200:
                events = hold_events(content(path)[response.content_type], await response.text())
                assert "gone" in json.dumps(events[-1])
            else:
                hold(content(path, status)[response.content_type]["schema"], await response.json())


async def test_models_are_as_described() -> None:
    async with open_site() as site:
        for path, described in (("/v1/models", "/v1/models"), ("/v1/models/echo", "/v1/models/{model}")):
            status, answer = await site.get(path)
            assert status == 200
            hold(content(described, method="get")["application/json"]["schema"], answer)


def test_every_field_of_a_reply_is_required_but_those_that_may_be_absent() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for name, absent in (
        ("ChatCompletion", {"prompt_logprobs", "prompt_token_ids"}),
        ("DeltaChoice", {"matched_stop", "token_ids"}),
        ("Delta", {"role", "content", "reasoning_content", "tool_calls"}),
        ("AssistantMessage", {"reasoning_content", "tool_calls"}),
        ("ToolCallDelta", {"id", "type"}),
        ("Usage", {"completion_tokens_details"}),
        ("ResponseObject", set()),
        ("MessageReply", set()),
        ("GenerateReply", {"index"}),
        ("HealthReply", {"cause"}),
    ):
        assert set(schemas[name]["properties"]) - set(schemas[name]["required"]) == absent


def test_a_field_that_is_not_described_is_found() -> None:
    schema = content("/v1/models", method="get")["application/json"]["schema"]
    right = {"id": "x", "object": "model", "created": 1, "owned_by": "engine", "max_model_len": None}
    hold(schema, {"object": "list", "data": [right]})
    for wrong in (right | {"more": 1}, {name: right[name] for name in ("id", "object")}):
        with pytest.raises(jsonschema_rs.ValidationError):
            hold(schema, {"object": "list", "data": [wrong]})


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("usage", [True, False])
def test_events_put_together_by_hand_are_as_those_that_are_encoded(chat: bool, usage: bool) -> None:
    told = []
    for asks in (False, True):  # for log-probabilities of a prompt; there are none
        reply = OpenAIReply("r", "\0 m", Wording(chat=chat, usage=usage, choices=2, prompt_logprobs=asks))
        parts = [(index, chunk) for chunk in chunks("a\n", "\0\u2028", '"text"') for index in (0, 1)]
        raw = b"".join(map(reply.event, parts)).decode()
        told.append([event if event == "data: [DONE]" else parsed(event) for event in raw.split("\n\n")[:-1]])
    assert told[0] == told[1] and len(told[0]) == 9 + 2 * chat + usage


def parsed(event: str) -> Any:
    return json.loads(event.removeprefix("data: ")) | {"created": 0}
