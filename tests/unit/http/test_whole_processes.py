"""Two front processes on one port: a client may reach either, and each answers for the engine; and one is killed."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest

from engine.conversation.canonical import chained

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc"),
]
BODY = {"input": "Hi.", "max_output_tokens": 4}
LONG = {"text": "a", "sampling_params": {"temperature": 0, "max_new_tokens": 4000}}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The URL of `engine serve --fronts 2`, and its process."""
    command = [sys.executable, "-m", "engine.cli", "serve", "--model", "echo", "--port", "0", "--fronts", "2"]
    command += ["--cache-events"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        log = ""
        assert process.stdout is not None
        for line in process.stdout:
            log += line
            if found := re.search(r"ready after .* on (http://\S+)", line):
                break
        else:
            raise AssertionError(f"the server ended before it was ready:\n{log}")
        yield found[1], process
    finally:
        process.kill()
        process.communicate()


def fronts_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """The process ids of the fronts, by their numbers, which their connections to the supervisor do not tell: by the
    sockets in the folder that each listens on."""
    found = {}
    listening = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if len(words) == 8 and words[3] == "00010000" and re.search(r"/engine-[^/]*/\d+$", words[7]):
            listening[words[6]] = int(words[7].rpartition("/")[2])
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent != process.pid:
                continue
            links = [os.readlink(each) for each in (entry / "fd").iterdir()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for link in links:
            if link.startswith("socket:[") and link[8:-1] in listening:
                found[listening[link[8:-1]]] = int(entry.name)
    return found


async def call(session: aiohttp.ClientSession, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    async with session.request(method, path, json=body) as response:
        return response.status, await response.json()


async def anew(url: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """As `call`, over a connection of its own: at whichever front the kernel chooses."""
    async with aiohttp.ClientSession(url) as session:
        return await call(session, method, path, body)


@asynccontextmanager
async def each_front(url: str) -> AsyncIterator[tuple[dict[int, aiohttp.ClientSession], dict[int, str]]]:
    """A connection to each front, and a response that each has stored, by number."""
    async with AsyncExitStack() as stack:
        sessions: dict[int, aiohttp.ClientSession] = {}
        made: dict[int, str] = {}
        for _ in range(100):
            one = aiohttp.TCPConnector(limit=1)
            session = await stack.enter_async_context(aiohttp.ClientSession(url, connector=one))
            status, response = await call(session, "POST", "/v1/responses", BODY)
            assert status == 200, response
            number = int(response["id"][5:7], 16)
            sessions[number], made[number] = session, response["id"]
            if sessions.keys() == {0, 1}:
                break
        else:
            raise AssertionError(f"a hundred connections all reached {sessions}")
        yield sessions, made


async def samples(session: aiohttp.ClientSession) -> dict[str, float]:
    async with session.get("/metrics") as response:
        lines = [line for line in (await response.text()).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def test_every_route_means_the_engine_over_any_connection(server: tuple[str, Any]) -> None:
    url, _ = server
    async with each_front(url) as (at, made):
        for number, id in made.items():
            path, other = f"/v1/responses/{id}", at[1 - number]
            _, response = await call(at[number], "GET", path)
            assert [await anew(url, "GET", path) for _ in range(6)] == [(200, response)] * 6
            assert await call(other, "GET", path) == (200, response)
            items = await call(at[number], "GET", f"{path}/input_items")
            assert items[0] == 200 and await call(other, "GET", f"{path}/input_items") == items
            status, more = await call(other, "POST", "/v1/responses", BODY | {"previous_response_id": id})
            assert status == 200 and int(more["id"][5:7], 16) == number and more["previous_response_id"] == id
        models = [await anew(url, "GET", "/v1/models") for _ in range(6)]
        assert models == models[:1] * 6
        started = [(await call(session, "GET", "/server_info"))[1]["created"] for session in at.values()]
        assert started[0] == started[1]
        for path in (f"/v1/responses/{made[0]}", f"/v1/responses/{made[1]}"):
            assert (await call(at[0], "DELETE", path))[0] == 200
            assert [(await anew(url, "GET", path))[0] for _ in range(4)] == [404] * 4


async def test_each_front_tells_of_the_whole_cache(server: tuple[str, Any]) -> None:
    url, _ = server
    texts = [f"{number} " + "a prompt that goes to one front or the other. " * 6 for number in range(6)]
    for text in texts:
        assert (await anew(url, "POST", "/v1/completions", {"prompt": text, "max_tokens": 1}))[0] == 200
    wanted = {block.to_bytes(8, "little").hex() for text in texts for block in chained(text)}
    numbers = set()
    for _ in range(6):
        async with aiohttp.ClientSession(url) as session, session.get("/v1/cache/events") as response:
            event = json.loads((await response.content.readline()).removeprefix(b"data: "))
            numbers.add(event["number"])
            reset, *stored = event["changes"]
            blocks = "".join(change["blocks"] for change in stored)
            assert reset["kind"] == "reset" and {change["kind"] for change in stored} == {"stored"}
            assert wanted <= {blocks[at : at + 16] for at in range(0, len(blocks), 16)}
    assert len(numbers) == 1


async def test_a_background_response_is_streamed_and_cancelled_over_new_connections(server: tuple[str, Any]) -> None:
    url, _ = server
    asked = BODY | {"background": True, "max_output_tokens": 4000}
    async with each_front(url) as (at, _):
        status, made = await call(at[0], "POST", "/v1/responses", asked)
        path = f"/v1/responses/{made['id']}"
        assert status == 200
        async with at[1].get(path, params={"stream": "true"}) as response:
            async for line in response.content:
                if line.startswith(b"event: response.output_text.delta"):
                    break
            assert (await anew(url, "POST", f"{path}/cancel"))[1]["status"] == "cancelled"
            assert b"event: response.incomplete" in await response.read()
        assert [(await anew(url, "GET", path))[1]["status"] for _ in range(4)] == ["cancelled"] * 4


async def test_abort_pause_and_metrics_over_new_connections(server: tuple[str, Any]) -> None:
    url, _ = server
    async with each_front(url) as (at, _), anyio.create_task_group() as group:
        ended: list[Any] = []

        async def run(session: aiohttp.ClientSession, rid: str) -> None:
            _, reply = await call(session, "POST", "/generate", LONG | {"rid": rid})
            ended.append((rid, reply["meta_info"]["finish_reason"]["type"]))

        async def running(count: int) -> None:
            with anyio.fail_after(60):
                while (await samples(watching))["engine_requests_running"] != count:
                    await anyio.sleep(0.02)

        watching = aiohttp.ClientSession(url)
        async with watching:
            for number, session in at.items():
                group.start_soon(run, session, f"mine-{number}")
            await running(2)
            assert await anew(url, "POST", "/pause_generation", {}) == (200, {"paused": True})
            for number in at:  # neither ends by itself from here on
                status, said = await anew(url, "POST", "/generate", LONG | {"rid": f"mine-{number}"})
                assert (status, said["error"]["code"]) == (409, "rid_in_use")
            with anyio.fail_after(60):
                while [(await anew(url, "GET", "/health"))[1]["status"] for _ in range(4)] != ["paused"] * 4:
                    await anyio.sleep(0.02)
            assert await anew(url, "POST", "/abort_request", {"rid": "mine-0"}) == (200, {"aborted": 1})
            await running(1)
            assert await anew(url, "POST", "/abort_request", {"rid": "mine-0"}) == (200, {"aborted": 0})
            assert await anew(url, "POST", "/abort_request", {"abort_all": True}) == (200, {"aborted": 1})
            await running(0)
            assert await anew(url, "POST", "/continue_generation") == (200, {"paused": False})
    assert sorted(ended) == [("mine-0", "abort"), ("mine-1", "abort")]
    async with each_front(url) as (at, _):
        pages = [await samples(session) for session in at.values()]
        counted = 'engine_requests_total{endpoint="generate",reason="abort"}'
        assert pages[0][counted] == pages[1][counted] == 2
        assert pages[0]["engine_request_seconds_count"] == pages[1]["engine_request_seconds_count"] > 4


async def test_what_is_left_when_a_front_is_killed(server: tuple[str, Any]) -> None:
    url, process = server
    async with each_front(url) as (at, made):
        before = await samples(at[1])
        pid = fronts_of(process)[0]
        os.kill(pid, signal.SIGKILL)
        counters = {name for name in before if re.search(r"_(total|count|bucket|sum)\b", name)}
        with anyio.fail_after(60):
            while True:
                status, said = await call(at[1], "GET", "/health")
                assert (status, said["status"]) == (200, "ready")
                assert said.get("cause") in (None, "of 2 fronts, 0 (from 0) starts; the others answer")
                after = await samples(at[1])
                assert {name for name in counters if after[name] < before[name]} == set()
                before = after
                if fronts_of(process).get(0, pid) != pid and "cause" not in said:
                    break
                await anyio.sleep(0.05)
        assert (await call(at[1], "GET", f"/v1/responses/{made[1]}"))[0] == 200
        status, said = await call(at[1], "GET", f"/v1/responses/{made[0]}")
        assert (status, said["error"]["code"]) == (404, "response_not_found")
    async with each_front(url) as (at, made):  # both are there again
        pages = {number: await samples(session) for number, session in at.items()}
        assert {name for name in counters if pages[0][name] < before[name] or pages[1][name] < before[name]} == set()
        assert (await call(at[0], "GET", f"/v1/responses/{made[1]}"))[0] == 200
        assert (await call(at[1], "GET", f"/v1/responses/{made[0]}"))[0] == 200
