"""Workers come and go, fail and hang; the queue before them is bounded."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import aiohttp
import pytest
from routed import STREAM, RawWorker, chunk, raw_worker, routing, says, until, whole

from engine.router.breaker import Breaker
from engine.router.policy import Arrival, Choice, RoutingPolicy, View
from engine.router.router import Router
from engine.router.workers import Worker

pytestmark = pytest.mark.anyio


class Held:
    """A script that answers once it is told to."""

    def __init__(self, name: bytes = b"held") -> None:
        self.name = name
        self.go = asyncio.Event()

    async def __call__(self, worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        await self.go.wait()
        writer.write(whole(b'"%b"' % self.name))


async def ask(url: str, headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, Any, dict[str, str]]:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as session,
        session.post(f"{url}/v1/completions", json={"prompt": "a"} | fields, headers=headers) as answer,
    ):
        return answer.status, json.loads(await answer.read()), dict(answer.headers)


async def call(method: str, url: str, body: Any = None, key: str = "") -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession() as session, session.request(method, url, json=body, headers=headers) as answer:
        return answer.status, json.loads(await answer.read())


def running(router: Router) -> int:
    return sum(each.view.running for each in router.fleet.workers.values())


# ── come and go ──────────────────────────────────────────────────────────────────────────────


async def test_workers_are_added_drained_and_removed_while_requests_run() -> None:
    held = Held(b"one")
    async with raw_worker(held) as one, raw_worker(says(b'"two"')) as two, routing(one.url) as (url, router):
        async with asyncio.TaskGroup() as group:
            first = group.create_task(ask(url))
            await until(lambda: bool(one.asked))
            status, body = await call("POST", f"{url}/workers", {"url": two.url + "/"})
            assert (status, body["url"], body["source"]) == (200, two.url, "HTTP")
            await until(lambda: router.fleet.workers[two.url].may_take)
            removed = group.create_task(call("DELETE", f"{url}/workers?url={one.url}"))
            await until(lambda: router.fleet.workers[one.url].draining)
            for _ in range(3):
                assert (await ask(url))[1] == "two"
            assert not removed.done() and not first.done()  # it waits for what runs
            held.go.set()
        assert first.result()[:2] == (200, "one")
        assert removed.result() == (200, {"url": one.url, "removed": True, "running": 0})
        assert (await call("GET", f"{url}/list_workers"))[1] == {"urls": [two.url]}
        assert (await call("DELETE", f"{url}/workers?url={one.url}"))[0] == 404


async def test_a_drained_worker_that_is_added_again_stays() -> None:
    held = Held()
    async with raw_worker(held) as one, routing(one.url) as (url, router), asyncio.TaskGroup() as group:
        first = group.create_task(ask(url))
        await until(lambda: bool(one.asked))
        assert (await call("POST", f"{url}/remove_worker?url={one.url}"))[1]["removed"] is False
        assert (await call("GET", f"{url}/workers"))[1]["workers"][0]["cause"] == "draining"
        assert (await call("POST", f"{url}/add_worker?url={one.url}"))[1]["draining"] is False
        held.go.set()
        assert (await first)[0] == 200
        assert (await ask(url))[0] == 200
        assert list(router.fleet.workers) == [one.url]


async def test_a_worker_that_an_operator_removed_does_not_come_back_by_itself() -> None:
    async with raw_worker(says(b"1")) as one, routing(one.url) as (url, router):
        itself = {"url": one.url, "registered": True}
        assert (await call("DELETE", f"{url}/workers?url={one.url}&registered=true"))[1]["removed"] is True
        assert (await call("POST", f"{url}/workers", itself))[1]["source"] == "registration"
        assert (await call("DELETE", f"{url}/workers?url={one.url}"))[1]["removed"] is True
        status, body = await call("POST", f"{url}/workers", itself)
        assert (status, body["error"]["code"]) == (409, "worker_barred") and not router.fleet.workers
        assert (await call("POST", f"{url}/workers", {"url": one.url}))[0] == 200
        assert (await call("POST", f"{url}/workers", itself))[0] == 200


async def test_after_its_seconds_a_drain_breaks_off_what_runs() -> None:
    async with raw_worker(Held()) as one, routing(one.url, retries=0) as (url, router), asyncio.TaskGroup() as group:
        first = group.create_task(ask(url))
        await until(lambda: bool(one.asked))
        status, body = await call("DELETE", f"{url}/workers?url={one.url}&seconds=0.1")
        assert (status, body["removed"]) == (200, True) and not router.fleet.workers
        status, body, _ = await first
        assert status == 502 and "was removed" in body["error"]["message"]


async def test_without_workers_a_request_is_told_so_at_once() -> None:
    async with routing() as (url, _):
        status, body, headers = await ask(url)
        assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "no_worker", "1")
        assert (await call("GET", f"{url}/readyz"))[0] == 503 and (await call("GET", f"{url}/livez"))[0] == 200
        assert (await call("POST", f"{url}/workers", {"url": "ftp://a"}))[0] == 400


# ── health ───────────────────────────────────────────────────────────────────────────────────


async def test_a_worker_that_is_not_ready_gets_nothing_until_it_is() -> None:
    async with (
        raw_worker(says(b'"one"')) as one,
        raw_worker(says(b'"two"')) as two,
        routing(one.url, two.url) as (url, router),
    ):
        one.status = 503
        await until(lambda: router.fleet.workers[one.url].state == "unready")
        assert [(await ask(url))[1] for _ in range(3)] == ["two"] * 3
        one.status = 200
        await until(lambda: router.fleet.workers[one.url].state == "ready")
        assert {(await ask(url))[1] for _ in range(4)} == {"one", "two"}


async def test_what_a_hanging_worker_has_not_begun_is_answered_elsewhere() -> None:
    """As with SIGSTOP: its connections stay open, and nothing comes."""
    async with (
        raw_worker(Held()) as hung, raw_worker(says(b'"well"')) as well,
        routing(hung.url, well.url, health_timeout=0.1) as (url, router),
    ):  # fmt: skip
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(ask(url)) for _ in range(6)]
            await until(lambda: len(hung.asked) == 3)
            hung.hangs = True
        assert [each.result()[:2] for each in asked] == [(200, "well")] * 6
        worker = router.fleet.workers[hung.url]
        assert (worker.state, worker.counts.moved, worker.view.running) == ("hung", 3, 0)


async def test_a_stream_of_a_worker_that_hangs_for_too_long_is_broken_off(caplog: pytest.LogCaptureFixture) -> None:
    async def half(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        writer.write(STREAM + chunk(b"data: half\n\n"))
        worker.hangs = True
        await asyncio.sleep(30)

    async with (
        raw_worker(half) as hung,
        routing(hung.url, health_timeout=0.1, broken_seconds=0.2) as (url, router),
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as session,
    ):
        with pytest.raises(aiohttp.ClientPayloadError):
            async with session.post(f"{url}/v1/completions", json={}) as answer:
                await answer.read()
        await until(lambda: bool(router.fleet.workers[hung.url].counts.failed))
        assert f"the worker {hung.url} is hung and has been so for too long; its answer had begun" in caplog.text


async def test_a_router_that_is_its_own_worker_is_asked_nothing() -> None:
    async with raw_worker(says(b'"well"')) as well, routing(well.url) as (url, router):
        itself = router.fleet.add(url, "test")
        await until(lambda: itself.state == "unready")
        assert itself.cause == "its URL leads back to this router"
        assert [(await ask(url))[:2] for _ in range(3)] == [(200, "well")] * 3
        await ask(url, {"Via": "1.0 before"})
        said = [line for line in well.asked[-1][0].split(b"\r\n") if line.startswith(b"Via: ")]
        assert said == [b"Via: 1.0 before", b"Via: " + router.via.encode()]
        status, body, _ = await ask(url, {"Via": f"1.0 before, {router.via}"})
        assert (status, body["error"]["code"]) == (508, "loop") and "remove the worker" in body["error"]["message"]
        assert len(well.asked) == 4


async def test_two_routers_that_are_workers_of_each_other_send_a_request_round_once() -> None:
    async with (
        raw_worker(says(b'"well"')) as well,
        routing(well.url) as (one, first), routing(one) as (two, second),
    ):  # fmt: skip
        await until(lambda: first.fleet.add(two, "test").may_take)
        said = [await ask(one) for _ in range(4)]
        assert {(status, body if status == 200 else body["error"]["code"]) for status, body, _ in said} == {
            (200, "well"), (508, "loop"),
        }  # fmt: skip
        assert [each["id"] for each in (await call("GET", f"{two}/v1/models"))[1]["data"]] == ["fake"]
        await until(lambda: not running(first) and not running(second))


async def test_a_hung_worker_is_not_asked_for_a_response(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        raw_worker(says(b"{}", 404)) as hung, raw_worker(says(b"{}")) as well,
        routing(hung.url, well.url, health_timeout=0.1) as (url, router),
    ):  # fmt: skip
        hung.hangs = True
        await until(lambda: router.fleet.workers[hung.url].state == "hung")
        asked, ask_worker = [], router.health.ask

        async def noted(worker: Worker, path: str, **more: Any) -> tuple[int, bytes]:
            if "responses" in path:
                asked.append(worker.url)
            return await ask_worker(worker, path, **more)

        monkeypatch.setattr(router.health, "ask", noted)
        assert (await call("GET", f"{url}/v1/responses/resp_1"))[0] == 200
        assert asked == [well.url]


async def test_a_breaker_opens_tries_one_request_and_closes() -> None:
    fails = True

    async def flaky(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        if fails:
            writer.transport.abort()
        else:
            writer.write(whole(b'"again"'))

    async with raw_worker(flaky) as one, raw_worker(says(b'"well"')) as two, routing(one.url, two.url) as (url, router):
        worker = router.fleet.workers[one.url]
        while worker.breaker.state != "open":
            assert (await ask(url))[:2] == (200, "well")
        failed = len(one.asked)
        assert failed == 3 and "its last requests failed" in worker.why_not()
        assert [(await ask(url))[1] for _ in range(4)] == ["well"] * 4 and len(one.asked) == failed
        fails = False
        await until(lambda: worker.may_take)
        assert {(await ask(url))[1] for _ in range(4)} == {"again", "well"}
        assert worker.breaker.state == "closed"


def test_a_breaker_backs_off() -> None:
    breaker = Breaker(2, 1.0)
    assert [breaker.failed(0.0), breaker.allows(0.0), breaker.failed(0.0), breaker.allows(0.5)] == [
        False,
        True,
        True,
        False,
    ]
    waits = []
    now = 0.0
    for _ in range(8):
        waits.append(breaker.left(now))
        now += breaker.left(now)
        assert breaker.allows(now)
        assert breaker.sent()
        assert not breaker.allows(now)  # one at a time
        assert not breaker.failed(now) and not breaker.allows(now)  # another one, sent before
        assert breaker.failed(now, trial=True)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    now += 60.0
    breaker.sent()
    breaker.undecided()  # another one
    assert not breaker.allows(now)
    breaker.undecided(trial=True)
    assert breaker.allows(now)
    breaker.sent()
    breaker.succeeded()
    assert breaker.state == "closed" and not breaker.failed(now)


# ── the queue ────────────────────────────────────────────────────────────────────────────────


async def test_the_queue_is_bounded_and_says_its_numbers() -> None:
    held = Held()
    async with (
        raw_worker(held) as one,
        routing(one.url, worker_limit=1, max_queue=2) as (url, router),
        asyncio.TaskGroup() as group,
    ):
        tasks = [group.create_task(ask(url)) for _ in range(3)]
        await until(lambda: router.dispatcher.waiting == 2)
        status, body, headers = await ask(url)
        assert (status, body["error"]["code"]) == (429, "queue_full") and int(headers["Retry-After"]) >= 1
        assert "2 requests wait for a worker, and at most 2 may (--max-queue)" in body["error"]["message"]
        assert "1 worker takes requests, of 1, and 1 of at most 1 requests run there" in body["error"]["message"]
        held.go.set()
        assert [(await task)[0] for task in tasks] == [200] * 3
        assert (running(router), router.dispatcher.waiting) == (0, 0)
        assert len(one.asked) == 3


async def test_a_request_waits_no_longer_than_its_deadline_or_its_client() -> None:
    async with (
        raw_worker(Held()) as one,
        routing(one.url, worker_limit=1) as (url, router),
        asyncio.TaskGroup() as group,
    ):
        first = group.create_task(ask(url))
        await until(lambda: bool(one.asked))
        status, body, headers = await ask(url, {"X-Queue-Seconds": "0.05"})
        assert (status, body["error"]["code"]) == (503, "queue_timeout") and "Retry-After" in headers
        assert "within 0.05 s (X-Queue-Seconds); 1 worker takes requests, of 1" in body["error"]["message"]
        next(iter(router.fleet.workers.values())).draining = True
        assert router.dispatcher.state() == f"none of 1 worker takes requests, as {one.url} is draining"
        next(iter(router.fleet.workers.values())).draining = False
        assert (await ask(url, {"X-Queue-Seconds": "soon"}))[0] == 400
        waiting = group.create_task(ask(url))
        await until(lambda: router.dispatcher.waiting == 1)
        waiting.cancel()
        await until(lambda: router.dispatcher.waiting == 0)
        first.cancel()
        await until(lambda: running(router) == 0)


async def test_higher_priority_goes_first_then_who_came_first() -> None:
    held = Held()
    async with (
        raw_worker(held) as one,
        routing(one.url, worker_limit=1) as (url, router),
        asyncio.TaskGroup() as group,
    ):
        for number, priority in enumerate((0, 0, 5, -1, 5)):
            group.create_task(ask(url, priority=priority, seed=number))
            await until(lambda number=number: router.dispatcher.waiting + len(one.asked) == number + 1)
        held.go.set()
    assert [json.loads(body)["seed"] for _, body in one.asked] == [0, 2, 4, 1, 3]


async def test_requests_that_wait_find_a_worker_that_comes() -> None:
    async with (
        raw_worker(Held()) as full, raw_worker(says(b'"new"')) as new,
        routing(full.url, worker_limit=1) as (url, router), asyncio.TaskGroup() as group,
    ):  # fmt: skip
        first = group.create_task(ask(url))
        await until(lambda: bool(full.asked))
        second = group.create_task(ask(url))
        await until(lambda: router.dispatcher.waiting == 1)
        router.fleet.add(new.url, "test")
        assert (await second)[1] == "new"
        first.cancel()


async def test_models_are_sent_where_they_are_served() -> None:
    async with (
        raw_worker(says(b'"a"'), "model-a") as one, raw_worker(says(b'"b"'), "model-b") as two,
        routing(one.url, two.url) as (url, _),
    ):  # fmt: skip
        assert {(await ask(url, model="model-b"))[1] for _ in range(4)} == {"b"}
        assert {(await ask(url, model="model-a"))[1] for _ in range(4)} == {"a"}
        assert {(await ask(url, model="unheard-of"))[1] for _ in range(4)} == {"a", "b"}
        models = (await call("GET", f"{url}/v1/models"))[1]["data"]
        assert [each["id"] for each in models] == ["model-a", "model-b"]


async def test_models_that_were_not_told_are_asked_for_with_the_next_heartbeat() -> None:
    async with raw_worker(says(b"{}")) as one:
        one.mute = 2
        async with routing(one.url) as (_, router):  # which waits 10 s for them
            assert router.fleet.workers[one.url].models == ("fake",)
            assert one.mute == 0


async def test_a_policy_that_fails_costs_no_request(caplog: pytest.LogCaptureFixture) -> None:
    class Bad(RoutingPolicy):
        def choose(self, arrival: Arrival, workers: Sequence[View]) -> Choice:
            if arrival.text == "a":
                raise ZeroDivisionError
            return Choice(worker=7, matched=0, reason="no such worker")

        def sent(self, arrival: Arrival, worker: str) -> None:
            raise ZeroDivisionError

        def answered(self, arrival: Arrival, worker: str, cached: float | None) -> None:
            raise ZeroDivisionError

    async with raw_worker(says(b"1")) as one, routing(one.url) as (url, router):
        router.dispatcher.policy = Bad()
        assert (await ask(url))[0] == (await ask(url, prompt="b"))[0] == 200
        assert running(router) == 0 and "the policy chose worker 7 of 1" in caplog.text


async def test_a_restarted_worker_is_forgotten_by_the_policy() -> None:
    async with raw_worker(says(b"1")) as one, routing(one.url) as (_, router):
        reset: list[str] = []
        router.fleet.on_reset.append(reset.append)
        worker = router.fleet.workers[one.url]
        router.health._become(worker, "gone", "test")
        await until(lambda: worker.state == "ready")
        assert reset == [one.url]
