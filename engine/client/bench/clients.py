"""Several client processes that play one load together, so that the load generator is not what is measured.

    parent ──Job, Begin──> client 1 … n ──raw sockets──> server
           <──Replied, Played──┘

Conversations are dealt to the clients in turn, and the number of open requests is divided. Left out: clients on other
machines.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
from msgspec import Struct

from engine.client.bench.asking import Target
from engine.client.bench.jobs import Begin, FromClient, Job, Played, Ready, Replied
from engine.client.bench.load import Run, run_of
from engine.client.bench.traffic import Conversation
from engine.errors import ConfigError, WorkerError
from engine.runtime.actor import first_failure
from engine.runtime.process import Child, spawn
from engine.runtime.processors import processors

MODULE = "engine.client.bench.client_process"
MOST = 8  # clients that `auto` takes
STREAMS = 64  # open requests for which `auto` takes one more
LEAD = 0.02  # seconds from the word to begin until all begin
BUSY = 0.9  # share of a core from which a client may be what is measured
LATE = 0.02  # seconds; likewise


class ClientLoad(Struct, frozen=True):
    """How one client process fared: the share of a core that it used, and by how many seconds it woke too late."""

    cpu: float
    late_p99: float
    late_most: float


def clients_of(asked: str, streams: int | None) -> int:
    """How many client processes --clients asks for, where `streams` requests are open at a time (None: any number).

    Raises ConfigError for what is no number."""
    most = max(1, MOST * STREAMS if streams is None else streams)
    if asked == "auto":
        return max(1, min(MOST, processors() // 4, -(-most // STREAMS)))
    if not asked.isdigit() or not int(asked):
        raise ConfigError(f"--clients is {asked!r}, but takes a number of processes, at least 1, or auto")
    return min(int(asked), most)


class Clients:
    """Client processes that run; `play` may be called several times."""

    def __init__(self, children: Sequence[Child[FromClient]]) -> None:
        self._children = [(child, aiter(child.frames)) for child in children]

    async def play(
        self,
        target: Target,
        conversations: Sequence[Conversation],
        *,
        concurrency: int | None = None,
        rate: float | None = None,
        seed: int = 0,
        on_replies: Callable[[int], None] = lambda count: None,
    ) -> tuple[Run, list[ClientLoad]]:
        """As engine.client.bench.load.play, with all clients together; and how each of these fared."""
        count = len(self._children)
        for number, (child, _) in enumerate(self._children):
            own = list(conversations[number::count])
            if concurrency is None:
                open_at_a_time = None
            else:
                open_at_a_time = max(1, concurrency // count + (number < concurrency % count))
            await child.frames.send(Job(target, own, open_at_a_time, rate, seed, number, count))
        for child, messages in self._children:
            message = await self._next(child, messages)
            assert isinstance(message, Ready), f"a client answered a job with {type(message).__name__}"
        begin = Begin(time.perf_counter() + LEAD)
        for child, _ in self._children:
            await child.frames.send(begin)
        played: dict[int, Played] = {}

        async def wait(number: int, child: Child[FromClient], messages: AsyncIterator[FromClient]) -> None:
            while isinstance(message := await self._next(child, messages), Replied):
                on_replies(message.count)
            assert isinstance(message, Played), f"a client ended its load with {type(message).__name__}"
            played[number] = message

        try:
            async with anyio.create_task_group() as group:
                for number, (child, messages) in enumerate(self._children):
                    group.start_soon(wait, number, child, messages)
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None
        each = [played[number] for number in range(count)]
        records = sorted((record for one in each for record in one.records), key=lambda record: record.sent)
        return run_of(records, sum(one.asked for one in each)), [ClientLoad(one.cpu, *one.late) for one in each]

    async def _next(self, child: Child[FromClient], messages: AsyncIterator[FromClient]) -> FromClient:
        message = await anext(messages, None)
        if message is None:
            raise WorkerError(f"a client process of the load generator is gone: {await child.exit_cause()}")
        return message


@asynccontextmanager
async def started(count: int) -> AsyncIterator[Clients]:
    """`count` client processes, until the block ends."""
    children: list[Child[FromClient]] = []
    try:
        for _ in range(count):
            children.append(await Child[FromClient].start(lambda: spawn(MODULE), FromClient))
        yield Clients(children)
    finally:
        for child in children:
            await child.end()


def warnings(loads: Sequence[ClientLoad]) -> list[str]:
    """A sentence for each client process that may be what was measured."""
    said = []
    for number, load in enumerate(loads, 1):
        found = []
        if load.cpu >= BUSY:
            found.append(f"used {load.cpu:.0%} of a core")
        if load.late_p99 >= LATE:
            found.append(f"woke {load.late_p99 * 1e3:.0f} ms too late (p99)")
        if found:
            what = " and ".join(found)
            said.append(
                f"client process {number} of {len(loads)} {what}: the figures may be its own; use more --clients"
            )
    return said
