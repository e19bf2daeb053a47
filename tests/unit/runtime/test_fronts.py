"""Several front processes, a core in this one and a worker without a model: what kills and halts do, and do not."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest

from engine.config import Config, ServerOptions, resolve
from engine.errors import ConfigError
from engine.http.listening import bound
from engine.runtime import fronts as fronts_module
from engine.runtime import process
from engine.runtime.board import Counter
from engine.runtime.fronts import FrontProcesses
from engine.runtime.process import fronts as fronts_of
from engine.runtime.supervisor import early_fronts, open_fronts

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc"),
]
WORKER = '{"0": {"pages": 8192, "ready": {"slots": 8, "max_model_len": 30000, "max_step_tokens": 512}}}'
LENGTH = 3000


def fake_worker() -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    ours, theirs = socket.socketpair()
    command = [sys.executable, str(Path(__file__).parents[2] / "lib/fake_worker.py"), WORKER, str(theirs.fileno())]
    child = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True)
    theirs.close()
    return ours, child


class Engine:
    """Two fronts that serve at `url`."""

    def __init__(self, fronts: FrontProcesses, url: str) -> None:
        self.fronts = fronts
        self.url = url

    def pid(self, front: int) -> int:
        return self.fronts._lives[front].child.process.pid

    def open(self, front: int) -> int:
        return self.fronts._board.of(front, Counter.REQUESTS)

    @asynccontextmanager
    async def stream_on(self, front: int, length: int = LENGTH, **more: Any) -> AsyncIterator[aiohttp.StreamReader]:
        """A long reply that comes from `front`: the kernel chooses, so others are opened and left until it does."""
        body = {"text": "a", "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": length}, **more}
        for _ in range(50):
            before = self.open(front)
            async with AsyncExitStack() as stack:
                session = await stack.enter_async_context(aiohttp.ClientSession(self.url))
                response = await stack.enter_async_context(session.post("/generate", json=body))
                assert response.status == 200, await response.text()
                assert (await response.content.readline()).startswith(b"data: ")
                if self.open(front) > before:
                    yield response.content
                    return
        raise AssertionError(f"the kernel never chose front {front}")

    async def asked(self, method: str, path: str, **options: Any) -> Any:
        async with aiohttp.ClientSession(self.url) as session, session.request(method, path, **options) as response:
            return await response.json()

    async def settled(self) -> None:
        """Nothing runs or holds a page."""
        with anyio.fail_after(60):
            while self.fronts.open or (await self.asked("POST", "/flush_cache"))["in_use"]:
                await anyio.sleep(0.02)


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Engine]:
    config = resolve({"model": "echo", "port": 0, "fronts": 2, **options})
    with early_fronts(config, 2) as early:
        async with open_fronts(config, early, fake_worker) as fronts:
            with anyio.fail_after(60):
                await fronts.ready()
                await fronts.listening.wait()
            yield Engine(fronts, early.url)


def said(stream: bytes) -> str:
    """The whole text of a reply, from its last event."""
    import json

    lines = [line[6:] for line in stream.splitlines() if line.startswith(b"data: {")]
    return str(json.loads(lines[-1])["text"])


async def test_a_killed_front_takes_its_own_requests_along_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    whole = bytes((ord("a") + 1 + index) % 256 for index in range(LENGTH)).decode(errors="replace")
    logging.getLogger("engine").propagate = True
    async with running(drain_seconds=20) as engine, AsyncExitStack() as stack:
        # Both answer, and each counts for itself.
        kept = await stack.enter_async_context(engine.stream_on(1))
        lost = await stack.enter_async_context(engine.stream_on(0, 25_000))
        assert (engine.open(0), engine.open(1), engine.fronts.open) == (1, 1, 2)
        first = engine.pid(0)
        os.kill(first, signal.SIGSTOP)  # so that a connection waits in its queue
        waiting = [socket.create_connection(("127.0.0.1", int(engine.url.rpartition(":")[2]))) for _ in range(12)]
        for each in waiting:
            each.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        os.kill(first, signal.SIGKILL)
        with pytest.raises(aiohttp.ClientPayloadError):
            await lost.read()
        assert said(await kept.read()) == whole  # no gap, no error
        # Whoever waited is served by the next process.
        for each in waiting:
            each.settimeout(30)
            answer = await anyio.to_thread.run_sync(each.recv, 4096)
            assert answer.startswith(b"HTTP/1.1 200")
            each.close()
        assert engine.pid(0) != first
        await engine.settled()
        (state,) = (await engine.asked("GET", "/server_info"))["internal_states"]
        assert (state["running"], state["waiting"]) == (0, 0)
        again = await stack.enter_async_context(engine.stream_on(0, 50))
        assert said(await again.read()) == whole[:50]
        await anyio.sleep(1.1)  # a heartbeat: the scheduler checks its pages and slots when idle
        assert any("front 0 is gone: it was killed by SIGKILL" in record.message for record in caplog.records)


async def test_a_front_that_stands_still_is_ended_and_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("engine").propagate = True
    async with running(stall_seconds=2) as engine, AsyncExitStack() as stack:
        await stack.enter_async_context(engine.stream_on(0, 25_000))
        first = engine.pid(0)
        os.kill(first, signal.SIGSTOP)
        answered: list[str] = []

        async def ask() -> None:
            body = {"text": "a", "sampling_params": {"temperature": 0, "max_new_tokens": 20}}
            answered.append((await engine.asked("POST", "/generate", json=body))["text"])

        async with anyio.create_task_group() as group:
            for _ in range(6):  # about half of them come to the other front, which answers
                group.start_soon(ask)
            with anyio.fail_after(60):
                while not answered:
                    await anyio.sleep(0.01)
            assert answered[0] == "bcdefghijklmnopqrstu"
            group.cancel_scope.cancel()
        with anyio.fail_after(60):
            while 0 not in engine.fronts._lives or engine.pid(0) == first:
                await anyio.sleep(0.05)
        assert any("it did nothing for 2 s and was ended" in record.message for record in caplog.records)
        await engine.settled()


async def test_a_front_that_leaves_too_much_unread_is_ended(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fronts_module, "MOST_KEPT", 1 << 19)
    logging.getLogger("engine").propagate = True
    async with running(stall_seconds=600) as engine, AsyncExitStack() as stack:
        wide = {"return_logprob": True, "top_logprobs_num": 20}
        await stack.enter_async_context(engine.stream_on(0, 25_000, **wide))
        first = engine.pid(0)
        os.kill(first, signal.SIGSTOP)
        with anyio.fail_after(60):
            while 0 not in engine.fronts._lives or engine.pid(0) == first:
                await anyio.sleep(0.05)
        assert any("that it was sent, and was ended" in record.message for record in caplog.records)
        await engine.settled()


async def test_a_drain_lets_replies_of_all_fronts_end_and_a_close_tells_those_that_are_left() -> None:
    whole = bytes((ord("a") + 1 + index) % 256 for index in range(LENGTH)).decode(errors="replace")
    async with AsyncExitStack() as stack, anyio.create_task_group() as group:
        async with running() as engine:
            for name in (signal.SIGINT, signal.SIGTERM):  # a front heeds none
                os.kill(engine.pid(0), name)
            streams = [await stack.enter_async_context(engine.stream_on(front)) for front in (0, 1)]
            longest = await stack.enter_async_context(engine.stream_on(1, 25_000))
            left, ends = [], []

            async def drain() -> None:
                left.append(await engine.fronts.drain(60))

            async def read() -> None:
                ends.append((await longest.read()).decode())

            group.start_soon(read)
            group.start_soon(drain)
            with anyio.fail_after(60):
                while (await engine.asked("GET", "/health"))["status"] != "draining":
                    await anyio.sleep(0.01)
            refused = await engine.asked("POST", "/generate", json={"text": "a"})
            assert refused["error"]["code"] == "draining"
            for stream in streams:
                assert said(await stream.read()) == whole
            assert engine.fronts.draining and engine.fronts.end() == 1 and not left
        with anyio.fail_after(60):
            while not ends:
                await anyio.sleep(0.01)
        assert "the server is shutting down" in ends[0].strip().split("\n\n")[-1]
        group.cancel_scope.cancel()


async def test_a_limit_is_that_of_the_whole_engine() -> None:
    body = {"text": "a", "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 25_000}}
    async with running(max_waiting=2) as engine, AsyncExitStack() as stack:

        async def ask() -> aiohttp.ClientResponse:
            session = await stack.enter_async_context(aiohttp.ClientSession(engine.url))
            return await session.post("/generate", json=body)

        for number in range(8):  # as many as have a slot
            response = await ask()
            assert response.status == 200 and (await response.content.readline()).startswith(b"data: ")
            assert engine.fronts.open == number + 1
        await engine.asked("POST", "/pause_generation", json={})
        async with anyio.create_task_group() as group:
            for number in range(2):  # as many as may wait
                group.start_soon(ask)
                with anyio.fail_after(60):
                    while engine.fronts.open < 9 + number:
                        await anyio.sleep(0.01)
            for _ in range(6):
                response = await ask()
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (503, "queue_full")
                assert "10 requests are open, and 10 is the limit" in error["message"]
            group.cancel_scope.cancel()


def test_how_many_fronts_there_are_goes_by_cores_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process, "GPUS", (tmp_path,))
    found = {}
    for cores in (1, 2, 3, 4, 7, 8, 12, 16, 31, 32, 200):
        monkeypatch.setattr(process, "processors", lambda cores=cores: cores)
        found[cores] = fronts_of(Config())
    assert found == {1: 1, 2: 1, 3: 1, 4: 1, 7: 1, 8: 2, 12: 3, 16: 4, 31: 7, 32: 8, 200: 8}
    assert fronts_of(resolve({"placement": "split"})) == fronts_of(resolve({"device": "cpu"})) == 1
    assert fronts_of(resolve({"fronts": "3"})) == 3
    monkeypatch.setattr(process, "GPUS", (tmp_path / "none",))
    assert fronts_of(Config()) == 1
    with pytest.raises(ConfigError, match="--placement is split and --fronts is 2"):
        fronts_of(resolve({"placement": "split", "fronts": 2}))
    with pytest.raises(ConfigError, match="--fronts is '17', but takes auto, 1, 2"):
        resolve({"fronts": "17"})


def test_each_front_listens_on_the_one_port_and_another_server_is_not_joined() -> None:
    sockets = bound(ServerOptions(port=0), 3)
    ports = {each.getsockname()[1] for own in sockets for each in own}
    assert len(ports) == 1 and [len(own) for own in sockets] == [1, 1, 1]
    (port,) = ports
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: the port is taken"):
        bound(ServerOptions(port=port), 2)
    for own in sockets:
        own[0].close()
    for own in bound(ServerOptions(port=port), 2):
        own[0].close()
    with pytest.raises(ConfigError, match=r"256\.0\.0\.1:80.*--host"):
        bound(ServerOptions(host="256.0.0.1", port=80), 2)


def serve(*flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "engine.cli", "serve", "--model", "echo", "--port", "0", "--fronts", "2", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_an_option_that_no_front_can_work_with_is_said_once_and_ends_the_start() -> None:
    server = serve("--chat-template", "{% broken")
    output, _ = server.communicate(timeout=60)
    assert server.returncode == 2
    assert output.count("engine: error:") == 1 and "chat template" in output and "Traceback" not in output, output


def fronts_under(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == pid and b"engine." in words:
                found.append(int(entry.name))
    return found


def gone(pid: int) -> bool:
    path = Path(f"/proc/{pid}/cmdline")
    try:
        return not path.read_bytes()  # a zombie, of a parent that has gone
    except FileNotFoundError:
        return True


def test_no_front_outlives_a_supervisor_that_is_killed() -> None:
    server = serve()
    assert server.stdout is not None
    for line in server.stdout:
        if "front processes serve" in line:
            break
    left = fronts_under(server.pid)
    assert len(left) == 3
    server.kill()
    server.communicate()
    deadline = time.monotonic() + 30
    while not all(map(gone, left)):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
