"""Stored responses of two fronts: any front answers for each of them, and their limits are those of both together."""

import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import anyio
import pytest
from http_front import FakeFront, chunks, text_of
from joined_fronts import Joined, delete, get, hanging, joined_fronts, post

from engine.http.responses import store as stored
from engine.runtime.board import Counter

pytestmark = pytest.mark.anyio
BODY = {"input": "Hi."}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
async def engine() -> AsyncIterator[Joined]:
    """Two fronts; the replies of each say its number."""
    async with joined_fronts(FakeFront(chunks("I am ", "0")), FakeFront(chunks("I am ", "1"))) as joined:
        yield joined


async def test_any_front_answers_for_a_stored_response(engine: Joined) -> None:
    first, second = engine.sessions
    status, made = await post(first, "/v1/responses", BODY | {"metadata": {"a": "b"}})
    path = f"/v1/responses/{made['id']}"
    assert status == 200 and made["id"].startswith("resp_00")
    assert await get(second, path) == await get(first, path) == (200, made)
    items = await get(second, f"{path}/input_items?order=asc")
    assert items == await get(first, f"{path}/input_items?order=asc") and items[1]["data"][0]["role"] == "user"
    assert (await get(second, f"{path}/input_items?limit=0"))[0] == 400
    async with second.get(path, headers={"X-Request-Id": "mine"}) as response:
        assert response.headers["X-Request-Id"] == "mine" and response.headers["Content-Type"].startswith(
            "application/"
        )
    assert await post(second, f"{path}/cancel") == await post(first, f"{path}/cancel")
    assert (await post(second, f"{path}/cancel"))[1]["error"]["code"] == "not_cancellable"
    assert await delete(second, path) == (200, {"id": made["id"], "object": "response", "deleted": True})
    for session in engine.sessions:
        status, said = await get(session, path)
        assert (status, said["error"]["code"]) == (404, "response_not_found")


async def test_a_conversation_goes_on_at_the_front_that_has_it(engine: Joined) -> None:
    first, second = engine.sessions
    _, made = await post(second, "/v1/responses", BODY)
    asked = {"input": "And?", "previous_response_id": made["id"], "temperature": 0.25}
    status, more = await post(first, "/v1/responses", asked)
    assert status == 200 and more["output"][0]["content"][0]["text"] == "I am 1"
    assert more["id"].startswith("resp_01") and engine.fronts[0].asked == []
    job = engine.fronts[1].asked[-1]
    assert [message.text for message in job.messages or ()] == ["Hi.", "I am 1", "And?"]
    assert job.sampling.temperature == 0.25
    async with first.post("/v1/responses", json=asked | {"stream": True}) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        events = re.findall(r"^event: (.*)$", await response.text(), re.MULTILINE)
    assert events[0] == "response.created" and events[-1] == "response.completed"
    assert (await get(first, f"/v1/responses/{more['id']}/input_items"))[1]["data"][0]["content"][0]["text"] == "And?"
    long = "x" * 3_000_000
    status, more = await post(first, "/v1/responses", asked | {"input": long})
    assert status == 200 and (engine.fronts[1].asked[-1].messages or ())[-1].text == long
    assert engine.board.total(Counter.BODY_BYTES) == 0
    status, said = await post(first, "/v1/responses", asked | {"temperature": 9})
    assert (status, said["error"]["param"]) == (400, "temperature")


async def test_tokens_of_a_conversation_are_counted_where_it_is() -> None:
    fronts = FakeFront(), FakeFront()
    for front in fronts:
        front.text = text_of("{% for message in messages %}{{ message.content }}{% endfor %}")
    async with joined_fronts(*fronts) as engine:
        _, made = await post(engine.sessions[0], "/v1/responses", BODY)
        asked = {"input": "And?", "previous_response_id": made["id"]}
        counts = [await post(session, "/v1/responses/input_tokens", asked) for session in engine.sessions]
        assert counts[0] == counts[1] and counts[0][0] == 200
        short = await post(engine.sessions[1], "/v1/responses/input_tokens", {"input": "And?"})
        assert counts[1][1]["input_tokens"] > short[1]["input_tokens"]


async def test_a_background_response_is_followed_and_cancelled_from_the_other_front() -> None:
    async with joined_fronts(FakeFront(chunks("a", "b", finish=None), hangs=True), FakeFront()) as engine:
        first, second = engine.sessions
        status, made = await post(first, "/v1/responses", BODY | {"background": True})
        path = f"/v1/responses/{made['id']}"
        assert status == 200
        async with second.get(f"{path}?stream=true") as response:
            lines: list[bytes] = []
            async for line in response.content:
                lines.append(line)
                if b'"delta":"b"' in line:
                    break
            assert lines[0] == b"event: response.queued\n"
            assert (await get(second, path))[1]["status"] == "in_progress"
            status, ended = await post(second, f"{path}/cancel")
            assert (status, ended["status"]) == (200, "cancelled")
            rest = await response.text()
        assert "event: response.incomplete" in rest
        number = len(re.findall(rb"event: ", b"".join(lines))) - 1
        async with second.get(f"{path}?stream=true&starting_after={number}") as response:
            again = await response.text()
        assert f'"sequence_number":{number + 1},' in again and f'"sequence_number":{number},' not in again
        assert engine.fronts[0].open == set()


async def test_a_client_that_leaves_ends_its_request_at_the_front_that_has_it() -> None:
    async with joined_fronts(FakeFront(), FakeFront()) as engine:
        first, second = engine.sessions
        _, made = await post(first, "/v1/responses", BODY)
        front = engine.fronts[0]
        front.hangs, front.closed, front.began = True, anyio.Event(), anyio.Event()
        front.script = chunks("a", finish=None)
        asked = BODY | {"previous_response_id": made["id"], "stream": True}
        async with second.post("/v1/responses", json=asked) as response:
            await response.content.readline()
            assert len(front.open) == 1
        with anyio.fail_after(60):
            await front.closed.wait()
        assert not front.open and engine.board.total(Counter.CONNECTIONS) <= 2


async def test_what_a_dead_front_had_stored_is_not_there(engine: Joined) -> None:
    _, made = await post(engine.sessions[0], "/v1/responses", BODY)
    _, kept = await post(engine.sessions[1], "/v1/responses", BODY)
    await engine.end(0)
    second = engine.sessions[1]
    status, said = await get(second, f"/v1/responses/{made['id']}")
    assert (status, said["error"]["code"]) == (404, "response_not_found")
    status, said = await post(second, "/v1/responses", BODY | {"previous_response_id": made["id"]})
    assert (status, said["error"]["code"]) == (400, "previous_response_not_found")
    assert (await get(second, f"/v1/responses/{kept['id']}"))[0] == 200
    assert engine.board.total(Counter.STORED) == 1
    for id in ("resp_07" + "0" * 30, "resp_zz", "x" * 300):  # that of a front that there never was
        assert (await get(second, f"/v1/responses/{id}"))[0] == 404


@pytest.mark.parametrize("said", [b"", HEAD[:20], HEAD, HEAD + b"5\r\nevent\r\n"])
async def test_an_answer_whose_front_dies_does_not_look_whole(engine: Joined, said: bytes) -> None:
    await engine.end(0)

    async def dies(stream: Any) -> None:
        async with stream:
            await stream.receive()
            await stream.send(said)

    async with await anyio.create_unix_listener(f"{engine.folder}/0") as listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, dies)
        asked = BODY | {"previous_response_id": "resp_00" + "a" * 30, "stream": True}
        if HEAD in said:
            async with engine.sessions[1].post("/v1/responses", json=asked) as response:
                assert response.status == 200
                with pytest.raises(aiohttp.ClientError):
                    await response.read()
        else:
            status, told = await post(engine.sessions[1], "/v1/responses", asked)
            assert (status, told["error"]["code"]) == (503, "engine_unavailable")
            assert told["error"]["message"].startswith("front 0, which has what the request is about, did not answer")
        group.cancel_scope.cancel()


# ── limits ─────────────────────────────────────────────────────────────────────────────────


async def test_the_response_that_ended_first_is_forgotten_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MAX_RESPONSES", 3)
    async with joined_fronts(FakeFront(), FakeFront()) as engine:
        first, second = engine.sessions
        made = [(await post(session, "/v1/responses", BODY))[1]["id"] for session in (first, second, first)]

        async def still_there() -> list[str]:
            with anyio.fail_after(60):
                while engine.board.total(Counter.STORED) > 3:
                    await anyio.lowlevel.checkpoint()
            return [id for id in made if (await get(first, f"/v1/responses/{id}"))[0] == 200]

        for session in (second, second, second, first):
            made.append((await post(session, "/v1/responses", BODY))[1]["id"])
            assert await still_there() == made[-3:]
        assert engine.board.total(Counter.STORED_BYTES) > 0
        engine.hub.gone.add(0)  # the limit holds although the front that has the first of them says nothing
        before = await still_there()
        for _ in range(2):
            made.append((await post(second, "/v1/responses", BODY))[1]["id"])
        assert [id for id in await still_there() if id.startswith("resp_00")] == [
            id for id in before if id.startswith("resp_00")
        ]


async def test_room_in_the_store_is_that_of_all_fronts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MAX_RESPONSES", 2)
    async with joined_fronts(hanging(), hanging()) as engine:
        body = BODY | {"background": True}
        made = [(await post(session, "/v1/responses", body))[1]["id"] for session in engine.sessions]
        for session in engine.sessions:
            status, said = await post(session, "/v1/responses", body)
            assert (status, said["error"]["code"]) == (503, "store_full")
            assert said["error"]["message"].startswith("2 responses are made in the background")
        assert (await delete(engine.sessions[1], f"/v1/responses/{made[0]}"))[0] == 200
        assert (await post(engine.sessions[1], "/v1/responses", body))[0] == 200
        await post(engine.sessions[0], f"/v1/responses/{made[1]}/cancel")
        assert engine.board.total(Counter.BACKGROUND) == 1
