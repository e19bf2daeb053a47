"""Real processes, with the echo model: what a kill, a signal or a client that leaves does, and does not do."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest

from engine import AsyncEngine, Engine, RequestError, SamplingParams, WorkerError

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc"),
]
LONG = {"text": "a", "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 4000}}


def children(pid: int) -> dict[int, str]:
    """Process id to module (`engine.worker`) of the engine's processes under `pid`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid and b"-m" in words:
            child = int(entry.name)
            found |= {child: words[words.index(b"-m") + 1].decode(), **children(child)}
    return found


class Server:
    """`engine serve` in a process of its own; `log` is what it has written."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "engine.cli", "serve", "--model", "echo", "--port", "0", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.log = ""
        self.url = ""

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log += line
            if found := re.search(r"ready after .* on (http://\S+)", line):
                self.url = found[1]
                return
        raise AssertionError(f"the server ended before it was ready:\n{self.log}")

    def wait_end(self) -> int:
        rest, _ = self.process.communicate(timeout=30)
        self.log += rest
        return self.process.returncode


def only(server: Server, module: str) -> int:
    (pid,) = (pid for pid, name in children(server.process.pid).items() if name == module)
    return pid


@contextmanager
def serving(*flags: str) -> Iterator[Server]:
    server = Server(*flags)
    try:
        server.wait_ready()
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module", params=["single", "split"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serving("--placement", request.param, "--max-running", "8") as server:
        yield server


@asynccontextmanager
async def streaming(session: aiohttp.ClientSession) -> AsyncIterator[aiohttp.StreamReader]:
    """A long reply whose first event has come."""
    async with session.post("/generate", json=LONG) as response:
        assert response.status == 200, await response.text()
        assert (await response.content.readline()).startswith(b"data: ")
        yield response.content


def events(stream: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in stream.splitlines() if line.startswith(b"data: {")]


async def pages_in_use(session: aiohttp.ClientSession) -> int:
    async with session.post("/flush_cache") as response:
        return int((await response.json())["in_use"])


async def eventually_free(session: aiohttp.ClientSession) -> None:
    with anyio.fail_after(60):
        while await pages_in_use(session):
            await anyio.sleep(0.01)


async def test_fifty_clients_killed_in_mid_stream_leave_no_page(server: Server) -> None:
    async with aiohttp.ClientSession(server.url) as session:

        async def killed() -> None:
            async with aiohttp.ClientSession(server.url) as own, streaming(own) as stream:
                await stream.readline()
                # closing the session cuts the connection

        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(killed)
        await eventually_free(session)
        body = {"text": "a", "sampling_params": {"temperature": 0, "max_new_tokens": 5}}
        async with session.post("/generate", json=body) as response:
            assert (await response.json())["text"] == "bcdef"


async def test_a_killed_client_process_leaves_no_page(server: Server) -> None:
    """The same, by SIGKILL of a real process: no goodbye is sent but the kernel's."""
    curl = f"""
import http.client, json, os, signal, urllib.parse
url = urllib.parse.urlsplit({server.url!r})
connection = http.client.HTTPConnection(url.hostname, url.port)
connection.request("POST", "/generate", json.dumps({LONG!r}), {{"Content-Type": "application/json"}})
connection.getresponse().readline()
os.kill(os.getpid(), signal.SIGKILL)
"""
    for _ in range(3):
        done = await anyio.run_process([sys.executable, "-c", curl], check=False)
        assert done.returncode == -signal.SIGKILL
    async with aiohttp.ClientSession(server.url) as session:
        await eventually_free(session)


async def test_a_killed_worker_is_said_and_restarted(server: Server) -> None:
    async with aiohttp.ClientSession(server.url) as session, streaming(session) as stream:
        os.kill(only(server, "engine.worker"), signal.SIGKILL)
        error = events(await stream.read())[-1]["error"]
        assert error["code"] == "worker_lost"
        assert "SIGKILL" in error["message"] and "send the request again" in error["message"]
        seen = set()
        with anyio.fail_after(60):
            while True:
                async with session.get("/health") as response:
                    body = await response.json()
                seen.add((response.status, body["status"]))
                if response.status == 200:
                    break
                assert "SIGKILL" in body["cause"]
                await anyio.sleep(0.02)
        assert seen == {(503, "restarting"), (200, "ready")}
        body = {"text": "a", "sampling_params": {"temperature": 0, "max_new_tokens": 5}}
        async with session.post("/generate", json=body) as response:
            assert (await response.json())["text"] == "bcdef"
        assert not await pages_in_use(session)


async def restarted(session: aiohttp.ClientSession, times: int) -> None:
    """Wait until so many workers have taken the place of dead ones."""
    while True:
        async with session.get("/server_info") as response:
            (state,) = (await response.json())["internal_states"]
        if state["restarts_total"] == times:
            assert not times or state["restart_seconds"] > 0
            return
        await anyio.sleep(0.02)


POOL = 8  # threads that a server may keep for later


def held_by(pid: int, kind: str) -> int:
    """How many descriptors ("fd") or threads ("task") a process has."""
    return len(list(Path("/proc", str(pid), kind).iterdir()))


async def test_kills_under_load_leave_every_other_reply_right_and_nothing_behind() -> None:
    """Workers die as soon as they run something: replies that end well are right, the others say why they do not."""
    with serving("--placement", "single", "--max-running", "8") as server:
        descriptors, threads = held_by(server.process.pid, "fd"), held_by(server.process.pid, "task")
        whole = "".join(chr(ord("a") + 1 + index) for index in range(20))
        ends = {"whole": 0, "cut": 0}
        loading = True

        async def client(session: aiohttp.ClientSession) -> None:
            body = {"text": "a", "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 20}}
            while loading:
                async with session.post("/generate", json=body) as response:
                    if response.status == 503:
                        assert "SIGKILL" in await response.text()
                        await anyio.sleep(0.05)
                        continue
                    said = events(await response.read())
                text = next((event["text"] for event in reversed(said) if "text" in event), "")
                if "error" in said[-1]:
                    assert said[-1]["error"]["code"] == "worker_lost" and whole.startswith(text)
                    ends["cut"] += 1
                else:
                    assert text == whole
                    ends["whole"] += 1

        async with aiohttp.ClientSession(server.url) as session:
            with anyio.fail_after(120):
                async with anyio.create_task_group() as group:
                    for _ in range(6):
                        group.start_soon(client, session)
                    for kills in range(4):
                        await restarted(session, kills)
                        done = ends["whole"]
                        while ends["whole"] < done + 6:
                            await anyio.sleep(0.01)
                        os.kill(only(server, "engine.worker"), signal.SIGKILL)
                    loading = False
                await restarted(session, 4)
            await eventually_free(session)
        assert ends["whole"] >= 24
        with anyio.fail_after(60):
            while held_by(server.process.pid, "fd") > descriptors:  # sockets of the clients are being closed
                await anyio.sleep(0.05)
        assert held_by(server.process.pid, "task") <= threads + POOL


def test_no_process_outlives_a_server_that_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINE_SPARE_WORKER")  # a server has a spare worker by default
    with serving("--placement", "split", "--log-level", "debug") as server:
        assert server.process.stdout is not None
        for line in server.process.stdout:
            if "has imported all it needs" in line:
                break
        left = children(server.process.pid)
        assert sorted(left.values()) == ["engine.runtime.core", "engine.worker", "engine.worker"]
        server.process.kill()
        server.process.wait()
        for pid in left:
            for _ in range(3000):
                if not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes():
                    break  # the latter is a zombie, of a parent that has gone
                time.sleep(0.01)
            else:
                raise AssertionError(f"process {pid}, {left[pid]}, is still there")


async def test_traces_of_steps_hold_so_many_steps(tmp_path: Path) -> None:
    with serving("--profile-dir", str(tmp_path)) as server:
        async with aiohttp.ClientSession(server.url) as session:

            async def post(path: str, body: object = None) -> tuple[int, Any]:
                async with session.post(path, json=body or {}) as response:
                    return response.status, await response.json()

            def steps(path: str) -> int:
                assert Path(path).is_relative_to(tmp_path)
                with gzip.open(path) as trace:
                    events = json.load(trace)["traceEvents"]
                return sum(str(event["name"]).startswith("step ") and "tokens" in event["name"] for event in events)

            reply = {"text": "a", "sampling_params": {"temperature": 0, "max_new_tokens": 30}}
            begun = await post("/start_profile", {"num_steps": 7, "output_dir": "some"})
            assert begun[0] == 200 and begun[1]["running"]
            status, answer = await post("/start_profile")
            assert status == 400 and "running already" in answer["error"]["message"]
            assert (await post("/generate", reply))[0] == 200
            assert await post("/stop_profile") == (200, {"path": begun[1]["path"], "running": False})
            assert 7 <= steps(begun[1]["path"]) <= 9  # two more may be launched before the seventh is over
            status, answer = await post("/stop_profile")
            assert status == 400 and "no profile is running" in answer["error"]["message"]
            second = (await post("/start_profile"))[1]["path"]
            assert (await post("/generate", reply))[0] == 200
            assert (await post("/stop_profile"))[1]["path"] == second
            assert steps(second) >= 30
            (tmp_path / "file").touch()
            status, answer = await post("/start_profile", {"output_dir": "file"})
            assert status == 400 and "cannot be written to" in answer["error"]["message"]


async def test_sigterm_lets_open_replies_end() -> None:
    with serving() as server:
        async with aiohttp.ClientSession(server.url) as session, streaming(session) as stream:
            server.process.send_signal(signal.SIGTERM)
            rest = await stream.read()
        last = events(rest)[-1]
        assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 4000}
        assert server.wait_end() == 0, server.log
        assert not children(server.process.pid)


STREAMS: dict[str, dict[str, Any]] = {
    "/generate": LONG,
    "/v1/completions": {"prompt": "a", "max_tokens": 4000, "n": 2, "stream": True},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4000, "stream": True},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4000, "stream": True},
    "/v1/responses": {"input": "a", "max_output_tokens": 4000, "stream": True},
    "/v1/responses?": {"input": "a", "max_output_tokens": 4000, "stream": True, "background": True},
}


@pytest.mark.parametrize(
    ("flags", "signals"), [(["--drain-seconds", "0"], [signal.SIGTERM]), ([], [signal.SIGINT] * 2)]
)
async def test_what_is_left_after_the_drain_ends_with_an_error(flags: list[str], signals: list[int]) -> None:
    with serving(*flags) as server:
        async with aiohttp.ClientSession(server.url) as session, AsyncExitStack() as stack:
            streams = {}
            for path, body in STREAMS.items():
                streams[path] = await stack.enter_async_context(session.post(path, json=body))
                assert (await streams[path].content.readline()).startswith((b"data: {", b"event: "))
            await (await session.post("/pause_generation")).read()  # or they might come to their own end
            whole = anyio.create_task_group()
            async with whole:
                answers: list[tuple[int, dict[str, str], Any]] = []

                async def ask() -> None:
                    async with session.post("/generate", json=LONG | {"stream": False}) as response:
                        answers.append((response.status, dict(response.headers), await response.json()))

                whole.start_soon(ask)
                with anyio.fail_after(60):
                    while not await waiting(session):
                        await anyio.sleep(0.01)
                server.process.send_signal(signals[0])
                for name in signals[1:]:
                    with anyio.fail_after(60):
                        while "draining" not in await (await session.get("/health")).text():
                            await anyio.sleep(0.01)
                    server.process.send_signal(name)
            ends = {path: (await stream.read()).decode().strip().split("\n\n")[-1] for path, stream in streams.items()}
        assert server.wait_end() == 0, server.log
    ((status, headers, answer),) = answers
    assert (status, answer["error"]["code"], "Retry-After" in headers) == (503, "draining", True)
    assert "shutting down" in answer["error"]["message"]
    for path, end in ends.items():
        data = json.loads(end.rpartition("data: ")[2])
        error = data["response"]["error"] if "response" in data else data["error"]
        assert "shutting down" in error["message"]
        assert error.get("code") == ("server_error" if "responses" in path else "draining")
    assert ends["/v1/messages"].startswith("event: error\n")
    assert all(ends[path].startswith("event: response.failed\n") for path in ends if "responses" in path)
    assert "8 requests are still open and now ended" in server.log
    if len(signals) == 2:
        assert "draining: 8 requests are open and may go on for up to 30 s; a second signal ends" in server.log


async def waiting(session: aiohttp.ClientSession) -> bool:
    """Whether all the requests of `STREAMS` and one more are known to the scheduler."""
    async with session.get("/server_info") as response:
        (figures,) = (await response.json())["internal_states"]
    return bool(figures["running"] + figures["waiting"] >= len(STREAMS) + 2)  # one of them has two replies


def test_a_core_that_dies_ends_the_server_and_says_why() -> None:
    with serving("--placement", "split") as server:
        os.kill(only(server, "engine.runtime.core"), signal.SIGKILL)
        assert server.wait_end() == 1
        assert "core process cannot go on: it was killed by SIGKILL" in server.log


async def test_the_worker_is_asked_for_its_experts(server: Server) -> None:
    async with aiohttp.ClientSession(server.url) as session:
        for path in ("start", "dump"):
            async with session.post(f"/expert_distribution/{path}") as response:
                assert response.status == 400 and "has no experts" in await response.text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kv-tokens", "8"], "--kv-tokens 8 is less than one page of 16 tokens"),
        (["--max-model-len", "5000"], "--max-model-len 5000 is over the model's own limit of 4096"),
        (["--port", "1", "--host", "256.0.0.1"], "256.0.0.1"),
    ],
)
def test_a_start_that_cannot_work_says_why_and_ends(flags: list[str], said: str) -> None:
    server = Server(*flags)
    assert server.wait_end() != 0
    assert said in server.log
    assert "Traceback" not in server.log, server.log


def test_a_wrong_policy_is_said_before_anything_starts() -> None:
    server = Server("--placement", "split", "--policy", "nonsense")
    assert server.wait_end() == 2
    assert "'nonsense'" in server.log and "fcfs" in server.log and "Traceback" not in server.log


@pytest.mark.parametrize("wait_for", ["loading", "streaming"])
def test_ctrl_c_ends_generate(wait_for: str) -> None:
    flags = ["--model", "echo", "--raw", "--max-tokens", "4000", "--temperature", "0"]
    command = [sys.executable, "-m", "engine.cli", "generate", "a", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    if wait_for == "streaming":
        assert process.stdout.read(1) == b"b"
    else:
        while not children(process.pid):
            assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert len(output) < 4000


async def test_clients_that_leave_during_a_flush_hurt_nobody(server: Server) -> None:
    async with aiohttp.ClientSession(server.url) as session:
        for _ in range(100):
            with anyio.move_on_after(0.0005):
                await session.post("/flush_cache")
        assert await pages_in_use(session) == 0


def test_closing_the_engine_ends_open_requests() -> None:
    engine = Engine(model="echo", log_level="error")
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(engine.generate, "a", SamplingParams(temperature=0, max_tokens=4000))
        while not engine.stats().running:
            assert not reply.done()
        engine.close()
        with pytest.raises(WorkerError, match="the engine is closed"):
            reply.result(timeout=20)


async def test_the_split_engine_leaves_no_process() -> None:
    before = children(os.getpid())
    async with AsyncEngine(model="echo", placement="split", log_level="error") as engine:
        assert sorted({*children(os.getpid()).values()} - {*before.values()}) in (
            [],
            ["engine.runtime.core", "engine.worker"],
        )
        for priority in (None, 1 << 40, "high"):
            with pytest.raises(RequestError, match="priority is"):
                await anext(engine.stream("a", priority=priority))  # type: ignore[arg-type]
        assert (await engine.generate("a", SamplingParams(temperature=0, max_tokens=2))).text == "bc"
        for wrong in (["a", [1, 1.5]], ["a", [1, 1 << 20]]):  # before it is sent, and by the tokenizer
            with pytest.raises(RequestError, match=r"^prompt\[1\]: ") as refused:
                await engine.generate(wrong)
            assert refused.value.param == "prompt[1]"
        with pytest.raises(RequestError, match=r"^token id 1048576"):
            await engine.generate([1, 1 << 20])
    assert children(os.getpid()) == before


async def test_the_offline_engine_fails_clearly_and_leaves_no_process() -> None:
    before = children(os.getpid())
    with pytest.raises(WorkerError, match="--kv-tokens 8 is less than one page"), Engine(model="echo", kv_tokens=8):
        pass
    async with AsyncEngine(model="echo") as engine:
        reply = await engine.generate([97, 98], SamplingParams(temperature=0, max_tokens=3))
        assert (reply.text, reply.finish) == ("cde", "length")
        replies = await engine.generate(["a", [98]], SamplingParams(temperature=0, max_tokens=2))
        assert [reply.text for reply in replies] == ["bc", "cd"]
        async for chunk in (stream := engine.stream("a", SamplingParams(temperature=0))):
            assert chunk.text.startswith("b")
            break
        await stream.aclose()
        assert len(children(os.getpid())) > len(before)
    assert children(os.getpid()) == before
