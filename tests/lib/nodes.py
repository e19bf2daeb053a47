"""Hosts of one engine whose workers have no model: node 0's executor and other nodes, in one event loop and process."""

import json
import socket
import subprocess
import sys
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import fake_worker

from engine.actors.executor import ExecutorActor
from engine.config import Config, resolve
from engine.messages.control import WorkerSilent
from engine.messages.step import TOKEN, SlotAdmit
from engine.params.sampling import Sampling
from engine.runtime.alike import alike
from engine.runtime.channel import channel, open_channel
from engine.runtime.node import Caller, _stay
from engine.testing.steps import step_plan

SECONDS = 60
TOKEN_OF_TESTS = "a token of tests, long enough"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class Hosts:
    """`ranks` fake workers on `nodes` hosts; each host has processes of its own."""

    def __init__(self, script: dict[str, Any], ranks: int, nodes: int, **options: Any) -> None:
        self.script = script
        self.options = {
            **{"model": "echo", "tp": ranks, "nnodes": nodes, "rendezvous": f"127.0.0.1:{free_port()}"},
            **options,
        }
        self.processes: dict[int, list[subprocess.Popen[bytes]]] = {node: [] for node in range(nodes)}
        self.to_executor, inbox = channel(8)
        outbox, self.heard = open_channel()
        self.executor = ExecutorActor(self.config(0), inbox, outbox, self._start_here)

    def config(self, node: int, **options: Any) -> Config:
        return resolve({**self.options, "node_rank": node, **options})

    def _start_here(self) -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
        ours, theirs = socket.socketpair()
        with theirs:
            return ours, self._start(0, theirs)

    def _start(self, node: int, sock: socket.socket) -> "subprocess.Popen[bytes]":
        command = [sys.executable, fake_worker.__file__, json.dumps(self.script), str(sock.fileno())]
        process = subprocess.Popen(command, pass_fds=[sock.fileno()])
        self.processes[node].append(process)
        return process

    async def node(self, node: int, **options: Any) -> int:
        """Be another host until the end; its exit code. Raises what it is refused for."""
        config = self.config(node, **options)
        return await _stay(config, lambda sock: self._start(node, sock), Caller(config), alike(config))

    async def next(self, kind: type[Any]) -> Any:
        """What the executor says next, but for silence that others than this test look for."""
        with anyio.fail_after(SECONDS):
            while isinstance(message := await self.heard.receive(), WorkerSilent) and kind is not WorkerSilent:
                pass
        assert isinstance(message, kind), message
        return message

    async def step(self, number: int) -> None:
        """One row of one token, whose next one is 98."""
        admits = (SlotAdmit(0, array("i", [97]).tobytes(), Sampling(0.0, 0, 1.0, 0.0, 1)),)
        await self.to_executor.send(step_plan(number, [(0, 0, 1, TOKEN)], admits))


@asynccontextmanager
async def open_hosts(
    script: dict[str, Any], ranks: int = 2, nodes: int = 2, **options: Any
) -> AsyncIterator[tuple[Hosts, anyio.abc.TaskGroup]]:
    """Node 0 runs; the others are the caller's to start in the task group. No process is left."""
    hosts = Hosts(script, ranks, nodes, **options)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hosts.executor.run)
        yield hosts, tasks
        tasks.cancel_scope.cancel()
    with anyio.fail_after(SECONDS):  # another host may run elsewhere, and have heard of the end only now
        while any(process.poll() is None for started in hosts.processes.values() for process in started):
            await anyio.sleep(0.01)
