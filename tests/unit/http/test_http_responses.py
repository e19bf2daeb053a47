"""The Responses API through the real openai client, over the real actors and the echo model."""

import json
from typing import Any

import anyio
import openai
import pytest
from house import counted
from openai.types.responses import response_create_params
from test_http_routes import Site, open_site
from typing_extensions import get_type_hints

from engine.conversation.reading import Wanted
from engine.http.responses import store as stored
from engine.http.responses.bodies import ResponsesBody
from engine.http.responses.events import ResponseEvents
from engine.http.responses.responses import described
from engine.messages.reply import Chunk
from engine.params.sampling import SamplingParams

pytestmark = pytest.mark.anyio
GREEDY: dict[str, Any] = {"model": "echo", "temperature": 0}
ORDER = [
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    "response.output_text.delta", "response.output_text.done", "response.content_part.done",
    "response.output_item.done", "response.completed",
]  # fmt: skip


def client(site: Site) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="any", max_retries=0, timeout=20)


def merged(types: list[str]) -> list[str]:
    """`types` with successive equals as one."""
    return [kind for index, kind in enumerate(types) if index == 0 or kind != types[index - 1]]


def test_every_field_of_the_openai_client_is_known() -> None:
    assert set(get_type_hints(response_create_params.ResponseCreateParamsStreaming)) <= {
        *ResponsesBody.__struct_fields__
    }


async def test_create_and_retrieve() -> None:
    async with open_site() as site, client(site) as api:
        answer = await api.responses.create(
            **GREEDY, input="a", max_output_tokens=5, metadata={"who": "me"}, extra_body={"seed": 1, "top_k": 3}
        )
        assert (answer.status, answer.object, answer.model) == ("incomplete", "response", "echo")
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert answer.output_text == counted("\n", 5)
        assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (2, 5, 7)
        assert (answer.metadata, answer.temperature, answer.error) == ({"who": "me"}, 0, None)
        (item,) = answer.output
        assert (item.type, item.role, item.status) == ("message", "assistant", "incomplete")
        assert await api.responses.retrieve(answer.id) == answer
        stopped = await api.responses.create(**GREEDY, input="a", extra_body={"stop": "\x0e"})
        assert (stopped.status, stopped.output_text) == ("completed", counted("\n", 3))
        await site.house.settled()


async def test_the_item_of_an_empty_reply_is_completed() -> None:
    async with open_site() as site, client(site) as api:
        ask: dict[str, Any] = {**GREEDY, "input": "a", "extra_body": {"stop": counted("\n", 1)}}
        answer = await api.responses.create(**ask)
        assert (answer.status, answer.output_text) == ("completed", "")
        (item,) = answer.output
        assert item.type == "message" and item.status == "completed"
        assert (await api.responses.retrieve(answer.id)).output == answer.output
        events = [event async for event in await api.responses.create(**ask, stream=True)]
        done = [event.item for event in events if event.type == "response.output_item.done"]
        assert [each.status for each in (*done, *events[-1].response.output)] == ["completed"] * 2


async def test_the_event_sequence() -> None:
    async with open_site() as site, client(site) as api:
        stream = await api.responses.create(**GREEDY, input="a", stream=True, extra_body={"stop": "\x0e"})
        events = [event async for event in stream]
        assert merged([event.type for event in events]) == ORDER
        assert [event.sequence_number for event in events] == list(range(len(events)))
        created, last = events[0].response, events[-1].response
        assert (created.status, created.output, created.usage) == ("in_progress", [], None)
        assert "".join(event.delta for event in events if event.type == ORDER[4]) == counted("\n", 3)
        assert (last.status, last.output_text, last.usage.output_tokens) == ("completed", counted("\n", 3), 4)
        assert last.id == created.id and await api.responses.retrieve(last.id) == last


async def test_a_conversation_by_reference() -> None:
    async with open_site() as site, client(site) as api:

        async def prompt(**asked: Any) -> str:
            """What a request makes of its conversation: the prompt is counted from the usage and its own text."""
            answer = await api.responses.create(**GREEDY, max_output_tokens=1, **asked)
            seen.append(answer.id)
            return str(answer.usage.input_tokens)

        seen: list[str] = []
        # "be\n" "hi\n"; then "hi\n" + one byte + "\n" + "ho\n": instructions are not carried over
        assert await prompt(instructions="be", input="hi") == "6"
        parts = [
            {"role": "developer", "content": "x"},
            {"role": "user", "content": [{"type": "input_text", "text": "ho"}]},
        ]
        assert await prompt(previous_response_id=seen[0], input=parts) == str(3 + 2 + 2 + 3)
        assert await prompt(previous_response_id=seen[1], input="!") == str(10 + 2 + 2)
        output = (await api.responses.retrieve(seen[0])).output
        spoken = [{"role": "user", "content": "hi"}, *(item.model_dump() for item in output)]
        assert await prompt(input=spoken) == "5"


async def test_input_tokens_are_those_that_a_response_reads() -> None:
    tool = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}}
    async with open_site(tool_parser="hermes") as site:
        _, first = await site.post("/v1/responses", {"input": "hello", "max_output_tokens": 2})
        for body in (
            {"input": "hi"},
            {"input": [{"role": "user", "content": "hi"}], "instructions": "be brief"},
            {"input": "hi", "tools": [tool], "tool_choice": "auto", "parallel_tool_calls": False},
            {"input": "hi", "previous_response_id": first["id"], "model": "echo"},
        ):
            status, counted = await site.post("/v1/responses/input_tokens", body)
            assert (status, counted["object"]) == (200, "response.input_tokens")
            _, answer = await site.post("/v1/responses", {**body, "max_output_tokens": 1})
            assert counted["input_tokens"] == answer["usage"]["input_tokens"] > 0
        for body, param in (({"input": []}, "input"), ({"input": "a", "model": "b"}, "model")):
            status, answer = await site.post("/v1/responses/input_tokens", body)
            assert (status in (400, 404), answer["error"]["param"]) == (True, param)
        async with client(site) as api:
            assert (await api.responses.input_tokens.count(input="hi")).input_tokens == 3
        await site.house.settled()


async def test_input_items_page_by_page() -> None:
    async with open_site() as site, client(site) as api:
        given = [{"role": role, "content": role} for role in ("developer", "user", "assistant", "user")]
        first = await api.responses.create(**GREEDY, input=given, max_output_tokens=2)
        then = await api.responses.create(**GREEDY, input="go on", previous_response_id=first.id)
        everything = [*("developer", "user", "assistant", "user"), first.output_text, "go on"]
        page = await api.responses.input_items.list(then.id, order="asc", limit=4)
        assert (page.has_more, [item.content[0].text for item in page.data]) == (True, everything[:4])
        assert [item.role for item in page.data] == ["system", "user", "assistant", "user"]
        assert {item.content[0].type for item in page.data} == {"input_text", "output_text"}
        listed = [item async for item in api.responses.input_items.list(then.id, limit=4)]
        assert [item.content[0].text for item in listed] == everything[::-1]  # from the end, over several pages
        path = f"/v1/responses/{then.id}/input_items"
        for query, param in (("?limit=0", "limit"), ("?after=nobody", "after"), ("?order=up", "order"), ("?x=1", "x")):
            status, answer = await site.get(path + query)
            assert (status, answer["error"]["param"]) == (400, param)
        assert (await site.get("/v1/responses/resp_x/input_items"))[0] == 404


async def test_store_false_and_delete() -> None:
    async with open_site() as site, client(site) as api:
        answer = await api.responses.create(**GREEDY, input="a", max_output_tokens=1, store=False)
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            await api.responses.retrieve(answer.id)
        with pytest.raises(openai.BadRequestError, match="no such response is stored") as caught:
            await api.responses.create(**GREEDY, input="a", previous_response_id=answer.id)
        assert caught.value.param == "previous_response_id"
        kept = await api.responses.create(**GREEDY, input="a", max_output_tokens=1)
        await api.responses.delete(kept.id)
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(kept.id)


async def test_background() -> None:
    async with open_site(seconds=0.001) as site, client(site) as api:
        answer = await api.responses.create(**GREEDY, input="a", background=True, max_output_tokens=40)
        assert answer.status in ("queued", "in_progress") and answer.background
        with anyio.fail_after(60):
            while (answer := await api.responses.retrieve(answer.id)).status in ("queued", "in_progress"):
                await anyio.sleep(0.005)
        assert (answer.status, answer.output_text) == ("incomplete", counted("\n", 40))
        assert (await api.responses.cancel(answer.id)).status == "incomplete"  # it has ended: nothing happens
        # the same stream again, whole and from the middle
        whole = [event async for event in await api.responses.retrieve(answer.id, stream=True)]
        assert [event.sequence_number for event in whole] == list(range(len(whole)))
        assert whole[0].type == "response.queued" and whole[-1].response == answer
        rest = [event async for event in await api.responses.retrieve(answer.id, stream=True, starting_after=9)]
        assert rest == whole[10:]
        await site.house.settled()


async def test_a_background_stream_goes_on_without_its_client() -> None:
    async with open_site(seconds=0.001) as site, client(site) as api:
        stream = await api.responses.create(**GREEDY, input="a", background=True, stream=True, max_output_tokens=60)
        first = await anext(aiter(stream))
        await stream.close()
        events = [event async for event in await api.responses.retrieve(first.response.id, stream=True)]
        assert events[-1].response.output_text == counted("\n", 60)


async def test_cancel() -> None:
    async with open_site(seconds=0.001) as site, client(site) as api:
        running = await api.responses.create(**GREEDY, input="a", background=True)
        stream = await api.responses.retrieve(running.id, stream=True)
        await anext(aiter(stream))
        cancelled = await api.responses.cancel(running.id)
        assert cancelled.status == "cancelled"
        events = [event async for event in stream]
        assert events[-1].type == "response.incomplete" and events[-1].response == cancelled
        await site.house.settled()
        with pytest.raises(openai.BadRequestError, match="which is cancelled"):
            await api.responses.create(**GREEDY, input="a", previous_response_id=running.id)
        running = await api.responses.create(**GREEDY, input="a", background=True)
        await api.responses.delete(running.id)
        await site.house.settled()
        kept = await api.responses.create(**GREEDY, input="a", max_output_tokens=1)
        with pytest.raises(openai.BadRequestError, match="background: true"):
            await api.responses.cancel(kept.id)


async def test_a_background_response_that_fails_says_why() -> None:
    async with open_site() as site, client(site) as api:
        answer = await api.responses.create(**GREEDY, input="a" * 5000, background=True)
        with anyio.fail_after(60):
            while (answer := await api.responses.retrieve(answer.id)).status != "failed":
                await anyio.sleep(0.005)
        assert answer.error.code == "invalid_prompt"
        assert "5001 tokens" in answer.error.message and "4096" in answer.error.message


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"max_output_tokens": 5000}, "max_output_tokens", "max_output_tokens is 5000, but the maximum"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"not": {"const": 1}}}}},
            "text.format",
            '"not"',
        ),
    ],
)
async def test_what_the_engine_refuses_is_named_as_the_client_does(asked: dict, param: str, says: str) -> None:
    async with open_site() as site, client(site) as api:
        for background in (False, True):
            body = {"model": "echo", "input": "a", "background": background, **asked}
            status, answer = await site.post("/v1/responses", body)
            assert status == (200 if background else 400)
            while answer.get("status") in ("queued", "in_progress"):
                await anyio.sleep(0.005)
                answer = (await api.responses.retrieve(answer["id"])).to_dict()
            assert answer["error"]["param"] == param and says in answer["error"]["message"]


async def test_a_stream_that_fails_ends_with_response_failed() -> None:
    async with open_site(seconds=0.001) as site, client(site) as api:
        stream = await api.responses.create(**GREEDY, input="a", stream=True)
        events = aiter(stream)
        await anext(events)
        await site.house.executor.lose("pulled the plug")
        last = [event async for event in events][-1]
        assert (last.type, last.response.status, last.response.error.code) == (
            "response.failed",
            "failed",
            "server_error",
        )
        assert "pulled the plug" in last.response.error.message


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, None, "missing required field `input`"),
        ({"input": []}, "input", "empty"),
        ({"input": [{"role": "boss", "content": ""}]}, "input[0].role", "'boss'"),
        ({"input": [{"type": "image", "role": "user", "content": ""}]}, "input[0].type", "'image'"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments", "is missing"),
        ({"input": [{"role": "user", "content": "a", "output": "b"}]}, "input[0].output", "does not go with"),
        ({"input": [{"role": "user"}]}, "input[0].content", "a message needs one"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens", "0; it must be"),
        ({"input": "a", "temperature": 3}, "temperature", "from 0 to 2"),
        ({"input": "a", "tools": [{"type": "file_search"}]}, "tools[0].type", "'file_search'"),
        ({"input": "a", "tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "'f', which is no tool"),
        ({"input": "a", "truncation": "some"}, "truncation", "not supported yet"),
        ({"input": "a", "background": True, "store": False}, "store", "is stored"),
        ({"input": "a", "metadata": {"k" * 65: "v"}}, "metadata", "64"),
        ({"input": "a", "model": "gpt"}, "model", "'gpt'"),
        ({"input": "a" * 5000}, "input", "5001 tokens, and the model's maximum context length is 4096 tokens"),
    ],
)
async def test_refusals(body: dict, param: str | None, says: str) -> None:
    async with open_site() as site:
        status, answer = await site.post("/v1/responses", body)
        assert status == (404 if param == "model" else 400)
        assert says in answer["error"]["message"]
        assert (answer["error"]["param"] or "").startswith(param or "")
        await site.house.settled()


async def test_bad_queries() -> None:
    async with open_site() as site:
        answer = (await site.post("/v1/responses", {"input": "a", "max_output_tokens": 1}))[1]
        path = f"/v1/responses/{answer['id']}"
        for query, param in (("stream=maybe", "stream"), ("starting_after=x", "starting_after"), ("a=b", "a")):
            status, refused = await site.get(f"{path}?{query}")
            assert (status, refused["error"]["param"]) == (400, param)
        assert (await site.get(f"{path}?stream=true"))[0] == 400


async def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MAX_RESPONSES", 3)
    async with open_site(seconds=0.001) as site, client(site) as api:
        running = await api.responses.create(**GREEDY, input="a", background=True)
        ids = [(await api.responses.create(**GREEDY, input="a", max_output_tokens=1)).id for _ in range(4)]
        found = [(await site.get(f"/v1/responses/{id}"))[0] for id in (running.id, *ids)]
        assert found == [200, 404, 404, 200, 200]  # what runs is kept
        monkeypatch.setattr(stored, "MAX_BYTES", 40_000)
        await api.responses.create(**GREEDY, input="a" * 3000, instructions="b" * 900, max_output_tokens=1)
        found = [(await site.get(f"/v1/responses/{id}"))[0] for id in (running.id, *ids)]
        assert found[1:] == [404] * 4
        await api.responses.cancel(running.id)


async def test_the_server_may_end_while_a_background_response_runs() -> None:
    async with open_site(seconds=0.001) as site:
        assert (await site.post("/v1/responses", {"input": "a", "background": True}))[0] == 200
    assert not site.house.front._open


def test_events_are_json_on_one_line() -> None:
    asked = described(ResponsesBody(input="a"), SamplingParams(), "m", Wanted())
    response = stored.Response(asked, [])
    raw = ResponseEvents(response).event(response.add(Chunk("r", "a\n\x85\u2028\u2029\n", [1]))).decode()
    for event in raw.removesuffix("\n\n").split("\n\n"):
        name, data = event.splitlines()
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
