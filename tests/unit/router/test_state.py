"""Routes with state reach the worker that holds it; operators' routes reach all; who may call is checked."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from http_front import FakeFront, chunks, serving
from routed import raw_worker, routing, says, until

from engine.router.asked import cached_share
from engine.router.keys import WorkerKeys

pytestmark = pytest.mark.anyio


async def call(
    url: str, body: Any = None, *, method: str = "POST", headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url, json=body, headers=headers) as answer,
    ):
        data = await answer.read()
        return answer.status, json.loads(data) if data else None


def named(name: str) -> Any:
    """Answers with its name."""
    return says(json.dumps({"name": name}).encode())


# ── what one worker holds ────────────────────────────────────────────────────────────────────


async def test_stored_responses_are_found_where_they_are() -> None:
    async with (
        serving(FakeFront(chunks("one"))) as one, serving(FakeFront(chunks("two"))) as two,
        routing(one, two) as (url, router),
    ):  # fmt: skip
        made = [(await call(f"{url}/v1/responses", {"input": "hi"}))[1]["id"] for _ in range(4)]
        assert {router.places.response(id) for id in made} == {one, two}
        for id in made:
            status, body = await call(f"{url}/v1/responses/{id}", method="GET")
            assert (status, body["id"]) == (200, id)
            status, body = await call(f"{url}/v1/responses", {"input": "more", "previous_response_id": id})
            assert (status, body["previous_response_id"]) == (200, id)
            assert router.places.response(body["id"]) == router.places.response(id)
        async with routing(one, two) as (fresh, other):  # which has seen none of them: it asks
            assert (await call(f"{fresh}/v1/responses/{made[0]}/input_items", method="GET"))[0] == 200
            assert (await call(f"{fresh}/v1/responses/{made[1]}", method="DELETE"))[0] == 200
            assert other.places.response(made[0]) in (one, two)
        router.fleet.remove(router.fleet.workers[router.places.response(made[0])])
        status, body = await call(f"{url}/v1/responses/{made[0]}", method="GET")
        assert (status, body["error"]["code"]) == (404, "response_not_found") and "has gone" in body["error"]["message"]
        status, body = await call(f"{url}/v1/responses", {"input": "more", "previous_response_id": made[0]})
        assert (status, body["error"]["param"]) == (404, "previous_response_id")
        odd = {"input": "more", "previous_response_id": "../../flush_cache?x="}  # no way to another route
        assert (await call(f"{url}/v1/responses", odd))[0] == 404
        status, body = await call(f"{url}/v1/responses/resp_unknown", method="GET")
        assert status == 404 and "none of the 1 workers has it" in body["error"]["message"]


async def test_a_streamed_response_is_found_too() -> None:
    async with (
        serving(FakeFront(chunks("a", "b"))) as one,
        serving(FakeFront()) as two,
        routing(one, two) as (url, router),
    ):
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/responses", json={"input": "hi", "stream": True}) as answer,
        ):
            text = await answer.text()
        id = json.loads(text.split("data: ")[1].split("\n")[0])["response"]["id"]
        assert router.places.response(id) == one
        assert (await call(f"{url}/v1/responses/{id}", method="GET"))[1]["id"] == id


async def test_a_request_is_aborted_where_it_runs_or_waits() -> None:
    fronts = [FakeFront(hangs=True), FakeFront(hangs=True)]
    async with (
        serving(fronts[0]) as one, serving(fronts[1]) as two,
        routing(one, two, worker_limit=1) as (url, router), asyncio.TaskGroup() as group,
    ):  # fmt: skip
        tasks = []
        for rid in ("r0", "r1"):
            tasks.append(group.create_task(call(f"{url}/generate", {"text": "a", "rid": rid})))
            await until(lambda rid=rid: any(rid in front.open for front in fronts))
        waiting = group.create_task(call(f"{url}/generate", {"text": "a"}, headers={"X-Request-Id": "r2"}))
        await until(lambda: router.dispatcher.waiting == 1)
        assert await call(f"{url}/abort_request", {"rid": "r2"}) == (200, {"aborted": 1})
        assert (await waiting)[0] == 409
        status, body = await call(f"{url}/abort_request", {"rid": "r1"})
        assert (status, body["aborted"]) == (200, 1)
        assert sorted(front.aborted for front in fronts) == [[], ["r1"]]  # the other one was not asked
        assert (await call(f"{url}/abort_request", {"rid": "r9"}))[1]["aborted"] == 0
        assert (await call(f"{url}/abort_request", {"abort_all": True}))[1]["aborted"] == 2
        for task in tasks:
            task.cancel()


async def test_sessions_stay_and_move_when_their_worker_goes() -> None:
    async with (
        raw_worker(named("one")) as one,
        raw_worker(named("two")) as two,
        routing(one.url, two.url) as (url, router),
    ):
        for headers, field in (
            ({"X-Session-Id": "s"}, {}), ({"X-Program-Id": "p"}, {}), ({}, {"prompt_cache_key": "k"}),
            ({}, {"session_id": "u"}), ({}, {"session_params": {"id": "t"}}),
        ):  # fmt: skip
            said = [
                (await call(f"{url}/v1/completions", {"prompt": "a"} | field, headers=headers))[1] for _ in range(5)
            ]
            assert said == said[:1] * 5
        names = {one.url: "one", two.url: "two"}
        home = router.dispatcher._sessions["s"]
        router.fleet.remove(router.fleet.workers[home])
        status, body = await call(f"{url}/v1/completions", {"prompt": "a"}, headers={"X-Session-Id": "s"})
        assert (status, body["name"] != names[home]) == (200, True)


# ── all workers ──────────────────────────────────────────────────────────────────────────────


async def test_what_is_for_all_is_done_by_all() -> None:
    async with serving(FakeFront()) as one, serving(FakeFront()) as two, routing(one, two) as (url, _):
        status, body = await call(f"{url}/flush_cache")
        assert (status, body["freed"], body["in_use"]) == (200, 24, 6)
        assert body["workers"][one] == {"status": 200, "answer": {"freed": 12, "in_use": 3}}
        status, body = await call(f"{url}/v1/models", method="GET")
        assert [each["id"] for each in body["data"]] == ["fake"] and body["object"] == "list"
        status, body = await call(f"{url}/v1/models", method="GET", headers={"anthropic-version": "2023-06-01"})
        assert [each["display_name"] for each in body["data"]] == ["fake"] and body["has_more"] is False


async def test_workers_see_the_clients_key_where_the_router_asks_them_all() -> None:
    async with serving(FakeFront(), api_key=("k",)) as one, routing(one, wait=False) as (url, router):
        await until(lambda: router.fleet.workers[one].may_take)
        key = {"x-api-key": "k"}
        assert (await call(f"{url}/flush_cache"))[0] == 401
        assert (await call(f"{url}/flush_cache", headers=key))[1]["freed"] == 12
        assert (await call(f"{url}/v1/models", method="GET", headers=key))[1]["data"][0]["id"] == "fake"


async def test_sessions_of_all_workers_are_listed_and_ended() -> None:
    path, told = (
        "/v1/sessions?cache_salt=s",
        {name: f'{{"object": "list", "data": [{{"id": "{name}"}}]}}' for name in "ab"},
    )
    async with (
        raw_worker(says(told["a"].encode())) as one, raw_worker(says(told["b"].encode())) as two,
        routing(one.url, two.url) as (url, _),
    ):  # fmt: skip
        status, body = await call(f"{url}{path}", method="GET")
        assert (status, sorted(each["id"] for each in body["data"])) == (200, ["a", "b"])
        assert one.asked[0][0].startswith(b"GET /v1/sessions?cache_salt=s ")
    unknown = says(b'{"error": {"code": "session_not_found"}}', 404)
    async with (
        raw_worker(says(b'{"id": "a/b", "deleted": true}')) as one, raw_worker(unknown) as two,
        routing(one.url, two.url) as (url, router),
    ):  # fmt: skip
        assert await call(f"{url}/v1/sessions/a%2Fb", method="DELETE") == (200, {"id": "a/b", "deleted": True})
        assert one.asked[0][0].startswith(b"DELETE /v1/sessions/a%2Fb ") and len(two.asked) == 1
        router.fleet.remove(router.fleet.workers[one.url])
        status, body = await call(f"{url}/v1/sessions/a%2Fb", method="DELETE")
        assert (status, body["error"]["code"]) == (404, "session_not_found")


async def test_a_worker_that_does_not_do_it_is_named() -> None:
    async with (
        raw_worker(says(b'{"paused": true}')) as one, raw_worker(says(b'{"error": 1}', 500)) as two,
        routing(one.url, two.url) as (url, _),
    ):  # fmt: skip
        status, body = await call(f"{url}/pause_generation", {"mode": "retract"})
        assert (status, body["paused"], body["workers"][two.url]["status"]) == (502, True, 500)
        assert one.asked[0][1] == two.asked[0][1] == b'{"mode": "retract"}'


# ── figures and words ────────────────────────────────────────────────────────────────────────


async def test_loads_and_metrics_are_told_by_worker() -> None:
    usage = b'{"usage": {"prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 30}}}'
    answered: list[float | None] = []
    async with (
        raw_worker(says(usage)) as one,
        raw_worker(says(b"{}")) as two,
        routing(one.url, two.url) as (url, router),
    ):
        router.policy.answered = lambda arrival, worker, cached: answered.append(cached)  # type: ignore[method-assign]
        for _ in range(4):
            await call(f"{url}/v1/completions", {"prompt": "12345"})
        status, body = await call(f"{url}/v1/loads", method="GET")
        loads = {each["url"]: each for each in body["loads"]}
        assert (status, body["hit_rate"], loads[one.url]["hit_rate"], loads[two.url]["hit_rate"]) == (
            200,
            0.75,
            0.75,
            None,
        )
        assert (loads[one.url]["sent"], loads[one.url]["prompt_chars"], loads[one.url]["running"]) == (2, 10, 0)
        assert sorted(map(str, answered)) == ["0.75", "0.75", "None", "None"]
        async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as answer:
            page = await answer.text()
        assert f'engine_router_cached_tokens_total{{worker="{one.url}"}} 60.0' in page
        assert f'engine_router_requests_total{{worker="{two.url}"}} 2.0' in page
        assert "engine_router_first_byte_seconds_count 4.0" in page and "engine_router_queue 0.0" in page
        targets = (await call(f"{url}/workers/targets", method="GET"))[1]
        assert targets[0]["targets"] == [one.url.removeprefix("http://")] and targets[0]["labels"]["worker"] == one.url


@pytest.mark.parametrize(
    ("end", "found"),
    [
        (b'"usage":{"prompt_tokens":7,"prompt_tokens_details":{"cached_tokens":4}}', (4, 7)),
        (b'"usage":{"input_tokens":3,"cache_read_input_tokens":4}', (4, 7)),
        (b'"usage": {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 4}}', (4, 7)),
        (b'"meta_info":{"prompt_tokens":7,"completion_tokens":64,"cached_tokens":0}', (0, 7)),
        (b'"usage":{"prompt_tokens":7}', None),
        (b'"cached_tokens":9,"prompt_tokens":7', None),
        (b'"cached_tokens":0,"prompt_tokens":0', None),
    ],
)
def test_what_was_cached_is_read_from_the_end_of_an_answer(end: bytes, found: tuple[int, int] | None) -> None:
    assert cached_share(b"x" * 100 + end + b"}") == found


async def test_a_dry_run_says_where_and_why_and_sends_nothing() -> None:
    async with raw_worker(named("one")) as one, routing(one.url) as (url, router):
        body = {"messages": [{"role": "user", "content": "hello"}], "priority": 3, "prompt_cache_key": "k"}
        status, said = await call(f"{url}/v1/route", body)
        assert (status, said["worker"], said["reason"], said["priority"], said["session"]) == (
            200,
            one.url,
            "its turn",
            3,
            "k",
        )
        longer = body | {"messages": [*body["messages"], {"role": "assistant", "content": "x" * 50}]}  # type: ignore[misc]
        assert (await call(f"{url}/v1/route", longer))[1]["characters"] > said["characters"] + 50
        assert (await call(f"{url}/v1/route?path=/generate", {"text": "12345"}))[1]["characters"] == 5
        one.status = 503
        await until(lambda: router.fleet.workers[one.url].state == "unready")
        said = (await call(f"{url}/v1/route", body))[1]
        assert said["worker"] is None and said["reason"].startswith(
            "it would wait: none of 1 worker takes requests, as"
        )
        assert said["workers"][0]["why_not"] == "unready: 503" and not one.asked


async def test_the_access_log_has_the_worker_and_at_debug_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        raw_worker(says(b"{}", headers=b"X-Request-Id: cmpl-1\r\n")) as one,
        routing(one.url, log_requests=True) as (url, _),
    ):
        for level in (logging.INFO, logging.DEBUG):
            caplog.set_level(level, "engine.router")
            caplog.clear()
            await call(f"{url}/v1/completions", {"prompt": "12345"})
            await call(f"{url}/readyz", method="GET")
            (line,) = [each for each in caplog.records if each.name == "engine.router.access"]
            assert line.getMessage().startswith(f"POST /v1/completions 200 worker={one.url} ttfb=")
            assert ("matched=0/5 reason='its turn'" in line.getMessage()) == (level == logging.DEBUG)


# ── who may call ─────────────────────────────────────────────────────────────────────────────


async def test_keys_of_clients_and_of_admins(tmp_path: Path) -> None:
    (tmp_path / "admins").write_text("boss\n")
    async with (
        raw_worker(named("one")) as one,
        routing(one.url, api_key=("client",), admin_key_file=str(tmp_path / "admins")) as (url, router),
    ):
        client, boss = ({"Authorization": f"Bearer {key}"} for key in ("client", "boss"))
        assert (await call(f"{url}/v1/completions", {"prompt": "a"}))[0] == 401
        assert (await call(f"{url}/v1/completions", {"prompt": "a"}, headers=client))[0] == 200
        assert b"Authorization: Bearer client" in one.asked[0][0]  # passed on
        for path in ("/workers", "/router/notes"):
            status, body = await call(url + path, {"url": "http://127.0.0.1:1"}, headers=client)
            assert (status, body["error"]["code"]) == (401, "admin_key_required")
        assert (await call(f"{url}/workers?url={one.url}", method="DELETE", headers=client))[0] == 401
        assert (await call(f"{url}/add_worker?url=http://127.0.0.1:1", headers=boss))[0] == 200
        assert (await call(f"{url}/workers", method="GET"))[0] == 401
        for key in (client, boss):
            assert (await call(f"{url}/workers", method="GET", headers=key))[0] == 200
        assert (await call(f"{url}/v1/completions", {"prompt": "a"}, headers=boss))[0] == 401
        assert (await call(f"{url}/livez", method="GET"))[0] == 200
        assert len(router.fleet.workers) == 2


async def test_without_an_admin_key_only_this_machine_may() -> None:
    async with routing(host="0.0.0.0") as (url, router):
        status, body = await call(f"{url}/workers", {"url": "http://127.0.0.1:1"})
        assert (status, body["error"]["code"]) == (403, "admin_key_required") and "--admin-key" in body["error"][
            "message"
        ]
        assert not router.fleet.workers


async def test_workers_get_keys_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.router.keys.RELOAD_SECONDS", 0.0)
    file = tmp_path / "keys"
    async with raw_worker(named("one")) as one, raw_worker(named("two")) as two:
        file.write_text(f"# keys\nfor-all\n{two.url} for-two\n")
        async with routing(one.url, two.url, worker_key_file=str(file)) as (url, _):
            for _ in range(2):
                await call(
                    f"{url}/v1/completions", {"prompt": "a"}, headers={"Authorization": "Bearer me", "x-api-key": "me"}
                )
            assert b"Authorization: Bearer for-all\r\n" in one.asked[0][0]
            assert b"Authorization: Bearer for-two\r\n" in two.asked[0][0]
            assert b"me" not in one.asked[0][0].replace(b"charset", b"")
    keys = WorkerKeys(str(file))
    file.write_text("a b c\n")
    assert keys.of(two.url) == "for-two"  # a broken file changes nothing


async def test_pages_of_others_are_refused_and_those_allowed_share(tmp_path: Path) -> None:
    async with (
        raw_worker(says(b"{}", headers=b"Access-Control-Allow-Origin: *\r\n")) as one,
        routing(one.url, cors_origins=("http://a:1",)) as (url, _),
        aiohttp.ClientSession() as session,
    ):
        body = {"prompt": "a"}
        async with session.post(f"{url}/v1/completions", json=body, headers={"Origin": "http://evil"}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (403, "origin_not_allowed")
        async with session.post(f"{url}/v1/completions", json=body, headers={"Host": "evil"}) as answer:
            assert answer.status == 403
        assert not one.asked
        async with session.post(f"{url}/v1/completions", json=body, headers={"Origin": "http://a:1"}) as answer:
            assert answer.status == 200
            assert answer.headers.getall("Access-Control-Allow-Origin") == ["http://a:1"]
        assert b"Origin" not in one.asked[0][0]  # the router has judged it
