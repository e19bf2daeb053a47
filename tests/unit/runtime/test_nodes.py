"""Several hosts, as tasks of one process with real sockets and workers without a model: who is let in, who is named."""

import os
import signal
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from nodes import TOKEN_OF_TESTS, Hosts, free_port, open_hosts

from engine.actors.executor import ExecutorActor
from engine.config import resolve
from engine.errors import ConfigError
from engine.messages.control import Fatal, Reset, WorkerLost, WorkerReady
from engine.messages.step import StepDone
from engine.runtime import node as node_module
from engine.runtime import nodes as nodes_module
from engine.runtime.token import NotTrusted

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="several hosts need Linux"),
]


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_TOKEN", TOKEN_OF_TESTS)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    caplog.set_level("INFO")
    return lambda text: [record.message for record in caplog.records if text in record.message]


async def said(lines: Callable[[str], list[str]], text: str) -> str:
    """The first line of the log that has `text`, once there is one."""
    with anyio.fail_after(60):
        while not lines(text):
            await anyio.sleep(0.01)
    return lines(text)[0]


async def test_ranks_of_two_hosts_are_one_group_without_the_secrets_of_the_server(tmp_path: Path) -> None:
    async with open_hosts({"folder": str(tmp_path)}, ranks=4, api_key="sesame") as (hosts, tasks):
        tasks.start_soon(hosts.node, 1)
        assert (await hosts.next(WorkerReady)).device == "4 × none"
        assert {node: len(processes) for node, processes in hosts.processes.items()} == {0: 2, 1: 2}
        places = {(tmp_path / str(rank)).read_text().split()[-1] for rank in range(4)}
        (place,) = places
        assert place.startswith("tcp://127.0.0.1:")
        for number in range(20):
            await hosts.step(number)
            done = await hosts.next(StepDone)
            assert (done.step, array("i", done.tokens)[0]) == (number, 98)


async def test_a_remote_rank_that_dies_is_named_with_its_host_and_all_start_again() -> None:
    async with open_hosts({}) as (hosts, tasks):
        tasks.start_soon(hosts.node, 1)
        await hosts.next(WorkerReady)
        for life in range(1, 4):
            os.kill(hosts.processes[1][-1].pid, signal.SIGKILL)
            lost = await hosts.next(WorkerLost)
            assert lost.cause.startswith("rank 1 of 2 (node 1 at 127.0.0.1): it was killed by SIGKILL")
            assert all(process.poll() is not None for process in hosts.processes[0])
            await hosts.to_executor.send(Reset())
            await hosts.next(WorkerReady)
            await hosts.step(life)
            assert (await hosts.next(StepDone)).step == life


async def test_a_host_that_leaves_is_named_waited_for_and_joins_again(lines: Callable[[str], list[str]]) -> None:
    async with open_hosts({}) as (hosts, tasks):
        scope = anyio.CancelScope()

        async def leaving() -> None:
            with scope:
                await hosts.node(1)

        tasks.start_soon(leaving)
        await hosts.next(WorkerReady)
        scope.cancel()
        lost = await hosts.next(WorkerLost)
        assert lost.cause.startswith("rank 1 of 2 (node 1 at 127.0.0.1): its host is gone")
        await hosts.to_executor.send(Reset())
        await said(lines, "waiting for node 1 of 2")
        tasks.start_soon(hosts.node, 1)
        await hosts.next(WorkerReady)


async def test_when_node_0_ends_the_others_end() -> None:
    codes: list[int] = []
    async with anyio.create_task_group() as others, open_hosts({}) as (hosts, _):

        async def other() -> None:
            codes.append(await hosts.node(1))

        others.start_soon(other)
        await hosts.next(WorkerReady)
    assert codes == [0]


async def test_when_node_0_gives_up_the_others_do(lines: Callable[[str], list[str]]) -> None:
    codes: list[int] = []
    async with open_hosts({"1": {"starts_not": "no memory for the KV cache"}}) as (hosts, tasks):

        async def other() -> None:
            codes.append(await hosts.node(1))

        tasks.start_soon(other)
        cause = "rank 1 of 2 (node 1 at 127.0.0.1): no memory for the KV cache"
        assert (await hosts.next(Fatal)).cause == cause
        await said(lines, f"node 0 has ended: {cause}")
    assert codes == [1]


async def test_a_start_says_for_which_host_it_waits(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[[str], list[str]]
) -> None:
    monkeypatch.setattr(nodes_module, "WAIT_SECONDS", 0.05)
    async with open_hosts({}, ranks=3, nodes=3) as (hosts, tasks):
        await said(lines, "waiting for nodes 1, 2 of 3 to join at 127.0.0.1:")
        tasks.start_soon(hosts.node, 2)
        await said(lines, "waiting for node 1 of 3 to join at 127.0.0.1:")
        tasks.start_soon(hosts.node, 1)
        await hosts.next(WorkerReady)


@pytest.mark.parametrize(
    ("node", "options", "cause"),
    [
        (1, {"page_size": 8}, r"differs from node 0: --page-size 8 there and 16 here"),
        (1, {"max_step_tokens": 64, "kv_tokens": 32}, r"--kv-tokens 32 there and None here, --max-step-tokens 64"),
        (2, {"nnodes": 4, "tp": 4}, r"--node-rank is 2, and node 0 has --nnodes 2"),
    ],
)
async def test_a_host_that_differs_is_refused_with_both_values_on_both_sides(
    node: int, options: dict[str, Any], cause: str, lines: Callable[[str], list[str]]
) -> None:
    async with open_hosts({}) as (hosts, tasks):
        await said(lines, "nodes join at")
        with pytest.raises(ConfigError, match=cause) as told:
            await hosts.node(node, **options)
        assert await said(lines, "turned away") == f"turned away: {told.value}"
        tasks.start_soon(hosts.node, 1)
        await hosts.next(WorkerReady)


async def test_two_hosts_cannot_have_one_number() -> None:
    async with open_hosts({}) as (hosts, tasks):
        tasks.start_soon(hosts.node, 1)
        await hosts.next(WorkerReady)
        with pytest.raises(ConfigError, match=r"node 1 at 127\.0\.0\.1 has joined already"):
            await hosts.node(1)


async def test_a_host_with_another_token_is_refused(
    tmp_path: Path, lines: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("another token, long enough\n")
    async with open_hosts({}) as (hosts, tasks):
        await said(lines, "nodes join at")
        with pytest.raises(NotTrusted, match="has another token"):
            await hosts.node(1, token_file=str(tmp_path / "token"))
        assert "127.0.0.1 does not have our token" in await said(lines, "our token")
        tasks.start_soon(hosts.node, 1)
        await hosts.next(WorkerReady)


async def test_what_answers_must_have_the_token_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger that listens in node 0's place says yes to everyone."""

    async def stranger(stream: anyio.abc.SocketStream) -> None:
        await stream.send(b"engine-1" + bytes(32))
        await stream.receive()
        await stream.send(b"+" + bytes(32))
        await stream.aclose()

    hosts = Hosts({}, 2, 2)
    port = int(hosts.options["rendezvous"].rpartition(":")[2])
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, stranger)
        with pytest.raises(NotTrusted, match="does not have our token"):
            await hosts.node(1)
        tasks.cancel_scope.cancel()


async def test_a_host_gives_up_where_nobody_answers(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[[str], list[str]]
) -> None:
    monkeypatch.setattr(node_module, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(node_module, "CALL_SECONDS", 0.05)
    hosts = Hosts({}, 2, 2)
    assert await hosts.node(1) == 1
    where = hosts.options["rendezvous"]
    assert lines(f"waiting for node 0 at {where}") and lines(f"node 0 has not answered at {where}")


async def test_a_silent_host_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is there, its connection is open, and no word comes."""
    monkeypatch.setattr(nodes_module, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(nodes_module, "PING_SECONDS", 0.1)
    async with open_hosts({}) as (hosts, tasks):
        tasks.start_soon(hosts.node, 1)
        await hosts.next(WorkerReady)
        monkeypatch.setattr(node_module, "PING_SECONDS", 600.0)
        lost = await hosts.next(WorkerLost)
        assert lost.cause.startswith("rank 1 of 2 (node 1 at 127.0.0.1): its host is gone: no word from it for 1 s")


async def test_nobody_is_gone_because_node_0_was_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (nodes_module, node_module):
        monkeypatch.setattr(module, "SILENT_SECONDS", 1.0)
        monkeypatch.setattr(module, "PING_SECONDS", 0.1)
    async with open_hosts({}) as (hosts, tasks):
        tasks.start_soon(hosts.node, 1)
        await hosts.next(WorkerReady)
        time.sleep(2.5)  # noqa: ASYNC251 - that is what it is about
        await hosts.step(0)
        assert (await hosts.next(StepDone)).step == 0
        os.kill(hosts.processes[1][-1].pid, signal.SIGKILL)
        assert "it was killed by SIGKILL" in (await hosts.next(WorkerLost)).cause


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"tp": 3, "nnodes": 2, "rendezvous": "a:1"}, "3 ranks do not divide over 2 hosts"),
        ({"node_rank": 1}, "--node-rank 1 is none of --nnodes 1: they are 0 to 0"),
        ({"tp": 2, "nnodes": 2}, "--nnodes 2 needs --rendezvous host:port"),
        ({"tp": 2, "nnodes": 2, "rendezvous": "host"}, "--rendezvous is 'host', but takes host:port"),
        ({"tp": 2, "nnodes": 2, "rendezvous": "127.0.0.1:9", "node_rank": 1}, "--node-rank 1 is for `engine serve`"),
        ({"tp": 2, "nnodes": 2, "rendezvous": "192.0.2.1:9"}, r"no interface of this host is, or has, 192\.0\.2\.1"),
    ],
)
async def test_numbers_that_do_not_go_together_are_refused(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        ExecutorActor(resolve({"model": "echo", **options}), None, None)  # type: ignore[arg-type]


async def test_a_port_in_use_is_refused(lines: Callable[[str], list[str]]) -> None:
    port = free_port()
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)
    async with listener, open_hosts({}, rendezvous=f"127.0.0.1:{port}") as (hosts, _):
        assert f"cannot listen on 127.0.0.1:{port}" in (await hosts.next(Fatal)).cause
