"""Several routers of the same workers tell each other what they did, loosely: in batches, and without an answer.

A batch has the prompts that were sent, each with its worker (so that another router's policy knows whose cache holds
them), stored responses with their worker, and how many requests run where (a router counts those of its peers as load).
Batches to a peer that is slow or gone are dropped; what is lost costs a cache hit, or a question to all workers. A
count that is old counts no more. Left out: who is a peer (`--peers`), and agreement: two routers may choose the same
worker in the same moment.
"""

import asyncio
import logging
import time
from collections import deque
from typing import Final
from uuid import uuid4

import aiohttp
import msgspec
from msgspec import Struct

from engine.errors import RequestError
from engine.http.keys import own_key
from engine.options.listening import ListenOptions
from engine.router.dispatch import Dispatcher
from engine.router.places import Places
from engine.router.policy import Arrival

BATCH_SECONDS: Final = 0.25
MOST_NOTES: Final = 2000  # of a batch; the oldest are dropped
MOST_CHARS: Final = 32 * 2**10  # of a prompt: its beginning is true of it too
STALE_SECONDS: Final = 5.0
SEND_SECONDS: Final = 2.0
PATH: Final = "/router/notes"
log = logging.getLogger("engine.router")


class Note(Struct, frozen=True, array_like=True):
    """A prompt was sent to a worker."""

    arrival: Arrival
    worker: str


class Notes(Struct, frozen=True, kw_only=True):
    """One batch. `router` names the process that says it, `running` has its requests by worker."""

    router: str
    running: dict[str, int]
    sent: list[Note]
    responses: list[tuple[str, str]]


class Peers:
    """What is told to the routers that --peers names, and what they tell."""

    def __init__(self, dispatcher: Dispatcher, places: Places) -> None:
        self._dispatcher = dispatcher
        self._fleet = dispatcher.fleet
        self._places = places
        self._name = uuid4().hex
        options = self._fleet.config.router
        self._key = own_key(ListenOptions(api_key=options.admin_key, api_key_file=options.admin_key_file))
        self._urls = [url.rstrip("/") for url in options.peers]
        self._sent: deque[Note] = deque(maxlen=MOST_NOTES)
        self._responses: deque[tuple[str, str]] = deque(maxlen=MOST_NOTES)
        self._running: dict[str, tuple[float, dict[str, int]]] = {}  # by router: when it said so, and what
        self._decoder = msgspec.msgpack.Decoder(Notes)
        if self._urls:
            dispatcher.on_sent.append(self._note)
            places.on_learned.append(lambda id, url: self._responses.append((id, url)))

    def _note(self, arrival: Arrival, worker: str) -> None:
        if len(arrival.text) > MOST_CHARS:
            arrival = msgspec.structs.replace(arrival, text=arrival.text[:MOST_CHARS])
        if arrival.text or arrival.program:
            self._sent.append(Note(arrival, worker))

    async def run(self) -> None:
        """Send batches until cancelled."""
        if not self._urls:
            return
        said: dict[str, int] = {}
        while True:
            await asyncio.sleep(BATCH_SECONDS)
            running = {each.url: each.view.running for each in self._fleet.workers.values() if each.view.running}
            if not (self._sent or self._responses or running or said):
                continue
            said = running
            notes = Notes(router=self._name, running=running, sent=list(self._sent), responses=list(self._responses))
            self._sent.clear()
            self._responses.clear()
            data = msgspec.msgpack.encode(notes)
            await asyncio.gather(*(self._post(url, data) for url in self._urls))

    async def _post(self, url: str, data: bytes) -> None:
        session, key = self._fleet.session, self._key
        assert session is not None, "it is opened with the router"
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            async with session.post(
                url + PATH, data=data, headers=headers, timeout=aiohttp.ClientTimeout(total=SEND_SECONDS)
            ) as answer:
                if answer.status != 204:
                    log.warning("the peer %s answered %d to what it was told", url, answer.status)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.debug("the peer %s was not told: %s", url, type(error).__name__)

    def take(self, data: bytes) -> None:
        """A batch of another router's. Raises RequestError for what is none."""
        try:
            notes = self._decoder.decode(data)
        except msgspec.DecodeError as error:
            raise RequestError(f"this is no batch of a router's notes: {error}", code="invalid_notes") from None
        if notes.router == self._name:  # --peers may name all routers, this one among them
            return
        for note in notes.sent:
            if note.worker in self._fleet.workers:
                self._dispatcher.learn(note.arrival, note.worker)
        for id, url in notes.responses:
            self._places.learn(id, url, told=True)
        self._running[notes.router] = (time.monotonic(), notes.running)
        self.outside()

    def outside(self) -> None:
        """Count the requests of other routers that were heard of lately."""
        now, total = time.monotonic(), dict[str, int]()
        self._running = {name: said for name, said in self._running.items() if now - said[0] < STALE_SECONDS}
        for _, running in self._running.values():
            for url, count in running.items():
                total[url] = total.get(url, 0) + count
        self._dispatcher.outside = total
