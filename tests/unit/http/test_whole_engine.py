"""Two fronts of one engine: what a client asks means all of it, at whichever front it asks."""

import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import anyio
import pytest
from http_front import FakeFront, chunks, text_of
from joined_fronts import Joined, join, joined_fronts

from engine.http.responses import store as stored
from engine.messages.control import Stats
from engine.messages.questions import CountExperts, ExpertCounts
from engine.runtime.board import Counter

pytestmark = pytest.mark.anyio
BODY = {"input": "Hi."}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def post(session: aiohttp.ClientSession, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    async with session.post(path, json={} if body is None else body, headers=headers) as response:
        return response.status, await response.json()


async def get(session: aiohttp.ClientSession, path: str) -> tuple[int, Any]:
    async with session.get(path) as response:
        return response.status, await response.json()


async def delete(session: aiohttp.ClientSession, path: str) -> tuple[int, Any]:
    async with session.delete(path) as response:
        return response.status, await response.json()


async def samples(session: aiohttp.ClientSession) -> dict[str, float]:
    """The page of /metrics, by name and labels."""
    async with session.get("/metrics") as response:
        lines = [line for line in (await response.text()).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@pytest.fixture
async def engine() -> AsyncIterator[Joined]:
    """Two fronts; the replies of each say its number."""
    async with joined_fronts(FakeFront(chunks("I am ", "0")), FakeFront(chunks("I am ", "1"))) as joined:
        yield joined


def hanging() -> FakeFront:
    """A front whose replies begin and do not end."""
    return FakeFront(chunks("a", finish=None), hangs=True)


# ── metrics and health ───────────────────────────────────────────────────────────────────────


async def test_a_scrape_of_any_front_tells_what_all_have_counted(engine: Joined) -> None:
    first, second = engine.sessions
    for session in (first, second, second):
        assert (await post(session, "/v1/completions", {"prompt": "x"}))[0] == 200
    assert (await post(second, "/generate", {"text": "x"}))[0] == 200
    for session in (first, second):
        assert (await post(session, "/v1/completions", {"prompt": "x", "n": 0}))[0] == 400
    stats = Stats("ready", running=5, generated_tokens_total=70, step_seconds=bytes(4 * 3))
    for front in engine.fronts:  # each is told of each heartbeat
        front.stats = stats
        for listener in front.on_stats:
            listener(stats)
    pages = [await samples(session) for session in engine.sessions]
    assert pages[0] == pages[1]
    for name, value in {
        'engine_requests_total{endpoint="completions",reason="stop"}': 3,
        'engine_requests_total{endpoint="generate",reason="stop"}': 1,
        'engine_http_errors_total{status="400"}': 2,
        "engine_time_to_first_token_seconds_count": 4,
        "engine_inter_token_seconds_count": 4,
        "engine_request_seconds_count": 4,
        "engine_step_seconds_count": 3,
        "engine_requests_running": 5,
        "engine_generated_tokens_total": 70,
    }.items():
        assert pages[0][name] == value, name


async def test_what_a_dead_front_had_counted_stays(engine: Joined) -> None:
    for session in engine.sessions:
        await post(session, "/v1/completions", {"prompt": "x"})
    stats = Stats("ready", generated_tokens_total=70, step_seconds=bytes(4))
    for listener in engine.fronts[0].on_stats:
        listener(stats)
    engine.fronts[1].stats = Stats("ready", generated_tokens_total=30)  # it has not heard of it yet
    await samples(engine.sessions[1])  # which counts what it has held back
    before = await samples(engine.sessions[0])
    await engine.end(0)
    other = await samples(engine.sessions[1])
    counted = {name for name in before if re.search(r"_(total|count|sum|bucket)\b", name)}
    assert {name: other[name] for name in counted} == {name: before[name] for name in counted}
    assert before["engine_generated_tokens_total"] == 70 and before["engine_step_seconds_count"] == 1
    new = FakeFront()
    engine.fronts = [new, engine.fronts[1]]
    join(new, 0, engine)
    await engine.start(0)
    await post(engine.sessions[0], "/v1/completions", {"prompt": "x"})
    for session in engine.sessions:
        assert (await samples(session))['engine_requests_total{endpoint="completions",reason="stop"}'] == 3


async def test_a_front_whose_peer_starts_is_healthy_and_says_so(engine: Joined) -> None:
    assert await get(engine.sessions[1], "/health") == (200, {"status": "ready"})
    await engine.end(0)
    status, said = await get(engine.sessions[1], "/health")
    assert (status, said["status"]) == (200, "ready")
    assert said["cause"] == "of 2 fronts, 0 (from 0) starts; the others answer"
    assert (await samples(engine.sessions[1]))["engine_ready"] == 1


class Mixture(FakeFront):
    """Counts experts as the one device of several fronts."""

    def __init__(self, asked: list[str]) -> None:
        super().__init__()
        self.questions = asked

    async def ask(self, question: CountExperts) -> ExpertCounts:
        self.questions.append(question.action)
        counting = "stop" not in self.questions
        return ExpertCounts(counting, (3,), len(self.questions).to_bytes(8, "little"))


async def test_experts_that_one_front_was_told_to_count_are_on_every_page() -> None:
    asked: list[str] = []
    choices = 'engine_expert_choices_total{expert="0",layer="3"}'
    async with joined_fronts(Mixture(asked), Mixture(asked)) as engine:
        first, second = engine.sessions
        assert choices not in await samples(second) and asked == []
        assert await post(first, "/expert_distribution/start") == (200, {"counting": True})
        assert (await samples(second))[choices] == 2
        assert await post(second, "/expert_distribution/stop") == (200, {"counting": False})
        assert (await samples(first))[choices] == 4
        assert (await samples(first))[choices] == 4  # nothing has changed, and nobody is asked again


# ── abort, pause and ids ─────────────────────────────────────────────────────────────────────


async def test_abort_reaches_the_front_that_has_the_request() -> None:
    async with (
        joined_fronts(hanging(), hanging()) as engine,
        anyio.create_task_group() as group,
    ):
        first, second = engine.fronts
        for session in engine.sessions:
            group.start_soon(post, session, "/v1/completions", {"prompt": "x"})
        group.start_soon(post, engine.sessions[0], "/generate", {"text": "x", "rid": "mine"})
        for front, count in ((first, 2), (second, 1)):
            while len(front.open) < count:
                await anyio.lowlevel.checkpoint()
        assert await post(engine.sessions[1], "/abort_request", {"rid": "mine"}) == (200, {"aborted": 1})
        assert first.aborted == second.aborted == ["mine"]
        assert await post(engine.sessions[1], "/abort_request", {"rid": "unknown"}) == (200, {"aborted": 0})
        for session in engine.sessions:
            assert await post(session, "/abort_request", {"abort_all": True}) == (200, {"aborted": 3})
        engine.hub.gone.add(0)  # one that does not answer has nothing open
        assert await post(engine.sessions[1], "/abort_request", {"abort_all": True}) == (200, {"aborted": 1})
        group.cancel_scope.cancel()


async def test_an_id_that_clients_share_ends_all_choices_at_every_front() -> None:
    async with (
        joined_fronts(hanging(), hanging()) as engine,
        anyio.create_task_group() as group,
    ):
        for session in engine.sessions:
            headers = {"X-Request-Id": "shared"}
            group.start_soon(
                lambda session=session, headers=headers: post(
                    session, "/v1/completions", {"prompt": "x", "n": 2}, **headers
                )
            )
        for front in engine.fronts:
            while len(front.open) < 2:
                await anyio.lowlevel.checkpoint()
        assert await post(engine.sessions[0], "/abort_request", {"rid": "shared"}) == (200, {"aborted": 4})
        group.cancel_scope.cancel()


class Pausing(FakeFront):
    """Notes what comes to it, as the core would in one list for all fronts."""

    def __init__(self, came: list[str]) -> None:
        super().__init__()
        self.came = came
        self.pause = self.hold  # type: ignore[assignment]

    def abort(self, rid: str | None) -> int:
        self.came.append("abort")
        return super().abort(rid)

    async def hold(self, paused: bool, *, retract: bool = False) -> None:
        self.came.append("pause" if paused else "continue")


async def test_a_pause_that_aborts_ends_the_requests_of_all_first() -> None:
    came: list[str] = []
    async with joined_fronts(Pausing(came), Pausing(came)) as engine:
        assert await post(engine.sessions[1], "/pause_generation", {"mode": "abort"}) == (200, {"paused": True})
    assert came == ["abort", "abort", "pause"]


async def test_a_rid_belongs_to_one_request_of_the_whole_engine() -> None:
    async with joined_fronts(hanging(), FakeFront()) as engine, anyio.create_task_group() as group:
        group.start_soon(post, engine.sessions[0], "/generate", {"text": "x", "rid": "mine"})
        await engine.fronts[0].began.wait()
        status, said = await post(engine.sessions[1], "/generate", {"text": "x", "rid": ["mine"]})
        assert (status, said["error"]["code"], said["error"]["param"]) == (409, "rid_in_use", "rid")
        assert (await post(engine.sessions[1], "/generate", {"text": "x", "rid": "other"}))[0] == 200
        group.cancel_scope.cancel()
        await engine.fronts[0].closed.wait()
    async with joined_fronts(FakeFront(), FakeFront()) as engine:
        for session in (*engine.sessions, *engine.sessions):
            assert (await post(session, "/generate", {"text": "x", "rid": "mine"}))[0] == 200


async def test_of_two_that_claim_an_id_at_once_one_has_it() -> None:
    async with joined_fronts(hanging(), hanging()) as engine:
        statuses: list[int] = []
        send, both = engine.hub.send, anyio.Event()

        async def together(asked: Any) -> None:  # no question is carried before both are asked
            if {"ClaimIds"} == {one.kind for one in waiting} and len(waiting) == 1:
                both.set()
            waiting.append(asked)
            await both.wait()
            await send(asked)

        waiting: list[Any] = []
        engine.hub.send = together  # type: ignore[method-assign]

        async def one(session: aiohttp.ClientSession) -> None:
            status, _ = await post(session, "/generate", {"text": "x", "rid": "mine"})
            statuses.append(status)

        async with anyio.create_task_group() as group:
            group.cancel_scope.deadline = anyio.current_time() + 10
            for session in engine.sessions:
                group.start_soon(one, session)
            while not statuses:
                await anyio.sleep(0.005)
            await engine.fronts[0].began.wait()
            assert statuses == [409] and engine.fronts[1].asked == []
            group.cancel_scope.cancel()
        assert engine.fronts[0].asked, "the lower number has the id"


# ── stored responses ─────────────────────────────────────────────────────────────────────────


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
        with anyio.fail_after(10):
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


# ── limits ───────────────────────────────────────────────────────────────────────────────────


async def test_connections_are_limited_at_all_fronts_together() -> None:
    two = joined_fronts(FakeFront(), FakeFront(), max_connections=2)
    async with two as engine, aiohttp.ClientSession() as client:
        first, second = engine.sessions
        assert (await get(first, "/health"))[0] == (await get(second, "/health"))[0] == 200
        assert engine.board.total(Counter.CONNECTIONS) == 2
        for url in engine.urls:
            async with client.get(f"{url}/health") as response:
                assert response.status == 503
                assert (await response.json())["error"]["code"] == "too_many_connections"
        # What fronts pass on to each other is no connection of a client's.
        _, made = await post(first, "/v1/responses", BODY)
        assert (await get(second, f"/v1/responses/{made['id']}"))[0] == 200


async def test_bytes_of_bodies_are_limited_at_all_fronts_together() -> None:
    async with joined_fronts(FakeFront(), FakeFront(), max_body_memory=200_000) as engine:
        engine.fronts[0].board.add(Counter.BODY_BYTES, 150_000)
        status, said = await post(engine.sessions[1], "/v1/completions", {"prompt": "x" * 100_000})
        assert (status, said["error"]["code"]) == (503, "too_many_bytes")
        assert "holds 1" in said["error"]["message"]
        engine.board.clear(0)  # it died
        assert (await post(engine.sessions[1], "/v1/completions", {"prompt": "x" * 100_000}))[0] == 200
        assert engine.board.total(Counter.BODY_BYTES) == 0


async def test_the_response_that_ended_first_is_forgotten_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MAX_RESPONSES", 3)
    async with joined_fronts(FakeFront(), FakeFront()) as engine:
        first, second = engine.sessions
        made = [(await post(session, "/v1/responses", BODY))[1]["id"] for session in (first, second, first)]

        async def still_there() -> list[str]:
            with anyio.fail_after(10):
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


# ── what is said once ────────────────────────────────────────────────────────────────────────


async def test_a_request_that_is_passed_on_is_checked_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "engine.requests")
    async with joined_fronts(FakeFront(), FakeFront(), log_requests=True, api_key=("secret",)) as engine:
        first, second = engine.sessions
        key = {"Authorization": "Bearer secret"}
        _, made = await post(first, "/v1/responses", BODY, **key)
        path = f"/v1/responses/{made['id']}"
        assert (await get(second, path))[0] == 401
        caplog.clear()
        async with second.get(path, headers=key) as response:
            assert response.status == 200
        async with second.get(f"{path}?starting_after=-9", headers=key) as response:
            assert response.status == 400
        lines = [record.getMessage() for record in caplog.records if record.name == "engine.requests"]
        assert [line.partition(" seconds")[0] for line in lines] == [
            "GET /v1/responses/{response_id} 200",
            "GET /v1/responses/{response_id} 400",
        ]
        page = await samples(first)
        assert page['engine_http_errors_total{status="401"}'] == page['engine_http_errors_total{status="400"}'] == 1
