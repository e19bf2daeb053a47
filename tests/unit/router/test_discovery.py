"""Workers that a file, a name or they themselves tell of; routers that tell each other; all of it by one command."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from routed import STREAM, RawWorker, chunk, raw_worker, routing, says, until

from engine.cli import main
from engine.config import resolve
from engine.errors import ConfigError
from engine.options.listening import ListenOptions
from engine.router import discovery
from engine.router.discovery import read_workers
from engine.router.options import RegisterOptions, resolve_router
from engine.router.register import Registration
from engine.router.router import Router
from engine.router.up import shares

pytestmark = pytest.mark.anyio


# ── files and names ──────────────────────────────────────────────────────────────────────────


async def test_a_file_of_workers_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "FILE_SECONDS", 0.01)
    file = tmp_path / "workers"
    async with raw_worker(says(b"1")) as one, raw_worker(says(b"2")) as two, raw_worker(says(b"3")) as three:
        file.write_text(f"# ours\n{one.url}/\n\n{two.url}\n")
        async with routing(three.url, workers_file=str(file)) as (_, router):
            assert sorted(router.fleet.workers) == sorted([one.url, two.url, three.url])
            file.write_text(f"{two.url}\n")
            await until(lambda: sorted(router.fleet.workers) == sorted([two.url, three.url]))
            file.write_text("what\n")  # half written, say
            await anyio.sleep(0.05)
            assert sorted(router.fleet.workers) == sorted([two.url, three.url])
            file.write_text(f"{one.url}\n{two.url}\n{three.url}\n")
            await until(lambda: one.url in router.fleet.workers)
            file.write_text("")
            await until(lambda: list(router.fleet.workers) == [three.url])  # which --workers names


def test_a_file_that_names_no_url_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "workers").write_text("localhost:8000\n")
    for path, said in ((tmp_path / "workers", "should be a URL like"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(ConfigError, match=said):
            read_workers(str(path))


async def test_each_address_of_a_name_is_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "DNS_SECONDS", 0.01)
    found: list[str] = ["127.0.0.1", "::1"]

    async def addresses(name: str, port: int, type: int) -> list[Any]:
        assert (name, port, type) == ("workers.test", 8000, socket.SOCK_STREAM)
        if not found:
            raise socket.gaierror(-2, "unknown")
        return [(0, 0, 0, "", (address, port)) for address in found for _ in range(2)]

    async with routing(wait=False) as (_, router):
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", addresses)
        task = asyncio.create_task(discovery.follow_name(router.fleet, "workers.test", 8000))
        await until(lambda: sorted(router.fleet.workers) == ["http://127.0.0.1:8000", "http://[::1]:8000"])
        found.remove("::1")
        await until(lambda: list(router.fleet.workers) == ["http://127.0.0.1:8000"])
        found.clear()
        await anyio.sleep(0.05)
        assert list(router.fleet.workers) == ["http://127.0.0.1:8000"]
        task.cancel()


# ── registration ─────────────────────────────────────────────────────────────────────────────


async def test_an_engine_registers_and_leaves() -> None:
    async with raw_worker(says(b"1")) as one, routing(admin_key=("boss",)) as (url, router):
        server = ListenOptions()
        wrong = Registration(RegisterOptions(register=(url,), register_key="no"), server)
        right = Registration(RegisterOptions(register=(url + "/",), register_key="boss"), server)
        async with anyio.create_task_group() as group:
            group.start_soon(wrong.run, "http://127.0.0.1:1")
            group.start_soon(right.run, one.url)
            await until(lambda: one.url in router.fleet.workers and router.fleet.workers[one.url].may_take)
            assert list(router.fleet.workers) == [one.url]
            assert router.fleet.workers[one.url].source == "registration"
            await wrong.leave()
            await right.leave()  # both `run` end with it
        await until(lambda: not router.fleet.workers)


async def test_a_router_that_starts_anew_learns_of_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.router.register.AGAIN_SECONDS", 0.01)
    monkeypatch.setattr("engine.router.register.RETRY_SECONDS", 0.01)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with raw_worker(says(b"1")) as one:
        engine = Registration(RegisterOptions(register=(f"http://127.0.0.1:{port}",)), ListenOptions())
        task = asyncio.create_task(engine.run(one.url))
        for _ in range(2):
            async with routing(port=port, wait=False) as (_, router):
                await until(lambda router=router: one.url in router.fleet.workers)
        await engine.leave()
        await task


def test_options_that_cannot_work_stop_the_start(tmp_path: Path) -> None:
    everywhere = ListenOptions(host="0.0.0.0")
    Registration(RegisterOptions(register=("http://127.0.0.1:1",)), everywhere)
    Registration(RegisterOptions(register=("http://router:1",), register_as="http://me:1"), everywhere)
    for options, said in (
        (RegisterOptions(register=("http://router:1",)), "--register-as"),
        (RegisterOptions(register=("router:1",)), "is no URL"),
        (RegisterOptions(register=("http://a",), register_key_file=str(tmp_path / "none")), "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=said):
            Registration(options, everywhere)
    for given, said in (
        ({"policy": "round_robbin"}, "did you mean 'round_robin'"),
        ({"worker_key_file": str(tmp_path / "none")}, "cannot be read"),
        ({"admin_key_file": str(tmp_path / "none")}, "--admin-key-file"),
    ):
        with pytest.raises(ConfigError, match=said):
            Router(resolve_router({"policy": "round_robin"} | given, {}))
    with pytest.raises(ConfigError, match="did you mean 'ENGINE_ROUTER_POLICY'"):
        resolve_router({}, {"ENGINE_ROUTER_POLICI": "x"})
    config = resolve_router(
        {}, {"ENGINE_ROUTER_PORT": "9", "ENGINE_PORT": "7", "ENGINE_ROUTER_WORKERS": "http://a,http://b"}
    )
    assert (config.server.port, config.router.workers) == (9, ("http://a", "http://b"))


# ── several routers ──────────────────────────────────────────────────────────────────────────


async def test_routers_tell_each_other_what_they_did() -> None:
    held = asyncio.Event()

    async def answer(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        if b"wait" in body:
            await held.wait()
        await says(b'{"id": "resp_1"}')(worker, writer, head, body)

    async with raw_worker(answer) as one, raw_worker(answer) as two, routing(one.url, two.url) as (url, told):
        sent: list[tuple[str, str]] = []
        told.policy.sent = lambda arrival, worker: sent.append((arrival.text, worker))  # type: ignore[method-assign]
        async with routing(one.url, two.url, peers=(url,)) as (other, _), aiohttp.ClientSession() as session:
            await session.post(f"{other}/v1/responses", json={"input": "x" * 40_000, "prompt_cache_key": "k"})
            waiting = asyncio.create_task(session.post(f"{other}/v1/completions", json={"prompt": "wait"}))
            await until(lambda: len(sent) == 2 and bool(told.dispatcher.outside))
            assert [worker for _, worker in sent] == [one.url, two.url]
            assert len(sent[0][0]) == 32 * 2**10 and sent[1][0] == "wait"
            assert told.places.response("resp_1") == one.url and told.dispatcher._sessions == {"k": one.url}
            assert told.dispatcher.outside == {two.url: 1}
            held.set()
            await waiting
            await until(lambda: not told.dispatcher.outside)
        async with aiohttp.ClientSession() as session, session.post(f"{url}/router/notes", data=b"?") as refused:
            assert (refused.status, (await refused.json())["error"]["code"]) == (400, "invalid_notes")


async def test_what_workers_tell_of_their_caches_reaches_the_policy() -> None:
    held = asyncio.Event()

    async def tells(worker: RawWorker, writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
        assert head.startswith(b"GET /v1/cache/events?after=0 ")
        changes = [{"kind": "stored", "space": "ab", "blocks": "00" * 16}, {"kind": "evicted", "blocks": "11" * 8}]
        event = b"data: " + json.dumps({"after": 0, "number": 2, "changes": changes}).encode() + b"\n\n"
        writer.write(STREAM + chunk(event))
        await held.wait()

    async with raw_worker(tells) as one, raw_worker(says(b"{}")) as two, routing(wait=False) as (_, router):
        told: list[tuple[Any, ...]] = []
        for name in ("stored", "evicted", "reset"):
            setattr(router.policy, name, lambda *what, name=name: told.append((name, *what)))
        one.tells = True
        for each in (one, two):
            router.fleet.add(each.url, "test")
        await until(lambda: len(told) == 2)
        assert (told[0][:3], list(told[0][3])) == (("stored", one.url, b"\xab"), [0, 0])
        assert (told[1][:2], list(told[1][2])) == (("evicted", one.url), [0x1111111111111111])
        assert router.fleet.workers[one.url].counts.evictions == 1
        router.fleet.remove(router.fleet.workers[one.url])
        await until(lambda: one.left == 1)
        assert router.fleet.workers[two.url].may_take and not two.asked


# ── engine up ────────────────────────────────────────────────────────────────────────────────


def test_replicas_share_the_gpus(tmp_path: Path) -> None:
    config = resolve({"tp": 2})
    assert shares(config, 2, {}, tmp_path) == [None, None]
    for number in (0, 1, 2, 10):
        (tmp_path / f"nvidia{number}").touch()
    (tmp_path / "nvidiactl").touch()
    assert shares(config, 2, {}, tmp_path) == ["0,1", "2,10"]
    assert shares(config, 1, {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}, tmp_path) == ["GPU-a,GPU-b"]
    assert shares(resolve({"device": "cpu"}), 3, {}, tmp_path) == [None] * 3
    assert shares(config, 2, {"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == [None, None]
    with pytest.raises(ConfigError, match="there are 4 GPUs; ask for at most 2"):
        shares(config, 3, {}, tmp_path)


def children_of(pid: int) -> list[int]:
    """The processes below `pid`, at any depth."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(word) for word in path.read_text().split()]
    return found + [each for child in found for each in children_of(child)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_one_command_starts_engines_and_a_router_and_ends_them(how: signal.Signals, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    words = ["up", "--replicas", "2", "--model", "echo", "--port", str(port), "--routing", "round_robin"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-m", "engine.cli", *words],
            stdout=log,
            stderr=log,
            env=os.environ | {"ENGINE_THREADS": "1"},
        )
    below: list[int] = []
    try:
        with anyio.fail_after(60):
            while b"all 2 engines are ready" not in (tmp_path / "log").read_bytes():
                assert process.poll() is None, (tmp_path / "log").read_text()
                await anyio.sleep(0.1)
        async with aiohttp.ClientSession() as session:
            for _ in range(2):
                async with session.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 3}) as answer:
                    assert json.loads(await answer.read())["choices"][0]["text"] == "bcd"
            async with session.get(f"{url}/v1/loads") as answer:
                assert [each["answered"] for each in (await answer.json())["loads"]] == [1, 1]
        below = children_of(process.pid)
        assert len(below) >= 4  # two engines, each with a worker
        process.send_signal(how)
        code = await anyio.to_thread.run_sync(process.wait)
        assert code == (0 if how == signal.SIGTERM else -how)
        with anyio.fail_after(60):
            while any(map(alive, below)):
                await anyio.sleep(0.05)
    finally:
        process.kill()
        process.wait()
        for pid in filter(alive, below):
            os.kill(pid, signal.SIGKILL)


def test_what_cannot_work_ends_the_command_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("serve", "up"):  # of this process, other tests read the log
        monkeypatch.setattr(f"engine.router.{module}.set_up_logging", lambda level: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, said in (
            (["router", "--workers", "a:1", "--port", "0"], "a worker is 'a:1', but should be a URL"),
            (["router", "--workers-dns", "name", "--port", "0"], "--workers-dns is 'name', but takes NAME:PORT"),
            (["router", "--port", port], f"cannot listen on 127.0.0.1:{port}: the port is taken"),
            (["up", "--model", "echo", "--port", port], f"cannot listen on 127.0.0.1:{port}: the port is taken"),
        ):
            assert main(words) == 2
            assert f"engine: error: {said}" in capsys.readouterr().err
