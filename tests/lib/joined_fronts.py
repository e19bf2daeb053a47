"""Several fronts of one engine in this process, each with a server and a port, joined as processes are: by a board, a
hub that carries what they ask each other, and a folder of sockets."""

import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import anyio
from anyio.abc import TaskGroup, TaskStatus
from http_front import FakeFront, chunks, serving

from engine.messages.fronts import PeerAnswers, PeerAsk, PeerValue
from engine.runtime.board import Board, Counter
from engine.runtime.peers import Peers


class Hub:
    """Carries each question to all others at once. A front in `gone` answers none."""

    def __init__(self) -> None:
        self.peers: list[Peers] = []
        self.gone: set[int] = set()
        self.asked: list[PeerAsk] = []

    async def send(self, asked: PeerAsk) -> None:
        self.asked.append(asked)
        values = []
        for peers in self.peers:
            if peers.number != asked.asker and peers.number not in self.gone:
                answer = await peers.answer(asked)
                if answer.value is not None:
                    values.append(PeerValue(peers.number, answer.value))
        self.peers[asked.asker].answered(PeerAnswers(asked.number, tuple(values)))


class Joined:
    """The fronts, and a session with each."""

    def __init__(self, fronts: Sequence[FakeFront], board: Board, folder: str, group: TaskGroup) -> None:
        self.fronts = fronts
        self.hub = Hub()
        self.board = board  # the supervisor's
        self.folder = folder
        self.urls: list[str] = []
        self.sessions: list[aiohttp.ClientSession] = []
        self._group = group
        self._ends: dict[int, tuple[anyio.Event, anyio.Event]] = {}  # asked for, and come

    async def start(self, number: int, **options: Any) -> None:
        """A front of this `number` takes requests from now on."""
        await self._group.start(self._serve, number, options)

    async def _serve(self, number: int, options: dict[str, Any], *, task_status: TaskStatus[None]) -> None:
        front = self.fronts[number]
        front.board.set(Counter.BEATS, 1)
        self._ends[number] = asked, come = anyio.Event(), anyio.Event()
        async with serving(front, **options) as url, aiohttp.ClientSession(url) as session:
            self.urls[number:] = [url, *self.urls[number + 1 :]]
            self.sessions[number:] = [session, *self.sessions[number + 1 :]]
            task_status.started()
            await asked.wait()
        come.set()

    async def end(self, number: int) -> None:
        """The front `number` is gone, as the supervisor finds it."""
        asked, come = self._ends.pop(number)
        asked.set()
        await come.wait()
        self.board.clear(number)

    async def aclose(self) -> None:
        for number in list(self._ends):
            await self.end(number)


def join(front: FakeFront, number: int, joined: Joined) -> None:
    """Make `front` the one with this `number`."""
    count = len(joined.fronts)
    assert joined.board.descriptor is not None
    front.board = Board(os.dup(joined.board.descriptor), number, count)
    front.peers = Peers(number, count, joined.hub, folder=joined.folder)
    joined.hub.peers[number:] = [front.peers, *joined.hub.peers[number + 1 :]]


@asynccontextmanager
async def joined_fronts(*fronts: FakeFront, **options: Any) -> AsyncIterator[Joined]:
    """Servers over `fronts`, of one engine."""
    with tempfile.TemporaryDirectory() as folder:
        async with anyio.create_task_group() as group:
            joined = Joined(fronts, Board.shared(len(fronts)), folder, group)
            for number, front in enumerate(fronts):
                join(front, number, joined)
            try:
                for number in range(len(fronts)):
                    await joined.start(number, **options)
                yield joined
            finally:
                with anyio.CancelScope(shield=True):
                    await joined.aclose()


# ── what tests ask them ──────────────────────────────────────────────────────────────────────


async def post(session: aiohttp.ClientSession, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    async with session.post(path, json={} if body is None else body, headers=headers) as response:
        return response.status, await response.json()


async def get(session: aiohttp.ClientSession, path: str) -> tuple[int, Any]:
    async with session.get(path) as response:
        return response.status, await response.json()


async def delete(session: aiohttp.ClientSession, path: str) -> tuple[int, Any]:
    async with session.delete(path) as response:
        return response.status, await response.json()


async def samples(session: aiohttp.ClientSession) -> dict[str, float]:
    """The page of /metrics, by name and labels."""
    async with session.get("/metrics") as response:
        lines = [line for line in (await response.text()).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def hanging() -> FakeFront:
    """A front whose replies begin and do not end."""
    return FakeFront(chunks("a", finish=None), hangs=True)
