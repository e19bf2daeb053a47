"""Two fronts of one engine: what a client asks means all of it, at whichever front it asks."""

import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import anyio
import pytest
from http_front import FakeFront, chunks
from joined_fronts import Joined, get, hanging, join, joined_fronts, post, samples

from engine.http.keys import CLIENT, client_name
from engine.messages.control import Stats
from engine.messages.questions import CountExperts, ExpertCounts
from engine.runtime.board import Counter

pytestmark = pytest.mark.anyio
BODY = {"input": "Hi."}


@pytest.fixture
async def engine() -> AsyncIterator[Joined]:
    """Two fronts; the replies of each say its number."""
    async with joined_fronts(FakeFront(chunks("I am ", "0")), FakeFront(chunks("I am ", "1"))) as joined:
        yield joined


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


async def test_a_request_and_a_response_are_those_of_who_asked_at_any_front() -> None:
    """A key, or the client that a router names beside its key."""
    whose = [{"Authorization": f"Bearer {key}"} for key in ("one", "two")]
    whose += [whose[1] | {CLIENT: client_name(client, "two")} for client in ("alice", "bob")]
    async with (
        joined_fronts(hanging(), hanging(), api_key=("one", "two")) as engine,
        anyio.create_task_group() as group,
    ):
        for own in whose:
            _, made = await post(engine.sessions[0], "/v1/responses", BODY | {"background": True}, **own)
            for other in sorted(whose, key=lambda other, own=own: other is own):
                status, said = await post(engine.sessions[1], f"/v1/responses/{made['id']}/cancel", **other)
                assert (status, said["error"] and said["error"]["code"]) == (
                    (200, None) if other is own else (404, "response_not_found")
                )
        for own in whose:
            sent = own | {"X-Request-Id": "shared"}
            group.start_soon(lambda sent=sent: post(engine.sessions[0], "/v1/completions", {"prompt": "x"}, **sent))
        while len(engine.fronts[0].open) < len(whose):
            await anyio.lowlevel.checkpoint()
        for own in whose:
            assert await post(engine.sessions[1], "/abort_request", {"rid": "shared"}, **own) == (200, {"aborted": 1})
        rid = next(iter(engine.fronts[0].open))  # whose it is as well as by its client's id
        told = [(await post(engine.sessions[1], "/abort_request", {"rid": rid}, **own))[1]["aborted"] for own in whose]
        assert sorted(told) == [0, 0, 0, 1]
        assert await post(engine.sessions[1], "/abort_request", {"abort_all": True}, **whose[0]) == (
            200,
            {"aborted": 4},
        )
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
        _, said = await post(engine.sessions[1], "/generate", {"text": ["x", "y"], "rid": ["free", "mine"]})
        assert said["error"]["message"] == "a request with rid 'mine' is still running; use another rid"
        assert (await post(engine.sessions[1], "/generate", {"text": "x", "rid": "other"}))[0] == 200
        group.cancel_scope.cancel()
        await engine.fronts[0].closed.wait()
    async with joined_fronts(FakeFront(), FakeFront()) as engine:
        for session in (*engine.sessions, *engine.sessions):
            assert (await post(session, "/generate", {"text": "x", "rid": "mine"}))[0] == 200


async def test_each_owner_has_rids_of_its_own() -> None:
    """What others call their requests is neither told nor in the way."""
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    body = {"text": "x", "rid": "mine"}
    async with (
        joined_fronts(hanging(), FakeFront(), api_key=("one", "two")) as engine,
        anyio.create_task_group() as group,
    ):
        group.start_soon(lambda: post(engine.sessions[0], "/generate", body, **one))
        await engine.fronts[0].began.wait()
        status, said = await post(engine.sessions[1], "/generate", body, **one)
        assert (status, said["error"]["code"]) == (409, "rid_in_use")
        assert said["error"]["message"] == "a request with rid 'mine' is still running; use another rid"
        status, said = await post(engine.sessions[1], "/generate", body, **two)
        assert (status, said["meta_info"]["id"]) == (200, "mine")
        for key, aborted in ((two, 0), (one, 1)):
            assert await post(engine.sessions[1], "/abort_request", {"rid": "mine"}, **key) == (
                200,
                {"aborted": aborted},
            )
        group.cancel_scope.cancel()


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


@pytest.mark.parametrize("bound", ["max_body_memory", "max_open_memory"])
async def test_a_body_that_is_passed_on_counts_where_it_is_answered(bound: str) -> None:
    """Also one that is larger than half of what all may have. It is of no use to send it again later."""
    async with joined_fronts(FakeFront(), FakeFront(), **{bound: 200_000}) as engine:
        _, made = await post(engine.sessions[0], "/v1/responses", BODY)
        for session in engine.sessions:
            more = {"input": "x" * 150_000, "previous_response_id": made["id"]}
            assert (await post(session, "/v1/responses", more))[0] == 200
        while engine.board.total(Counter.OPEN_BYTES):
            await anyio.lowlevel.checkpoint()
        assert engine.board.total(Counter.BODY_BYTES) == 0


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
