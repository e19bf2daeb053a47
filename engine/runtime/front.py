"""The front: what HTTP and the offline API talk to. Requests go in, streams of chunks come out.

Each open request has a mailbox (`mailbox.py`), into which the detokenizer puts the reply. Inside, a request goes by a
short number of ours, so that a client may reuse its own id as soon as its request has ended.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import anyio
import msgspec
from msgspec import Struct

from engine.config import Config
from engine.errors import EngineError, RequestError, WorkerError, counted, shut_down
from engine.messages import FromFront, ToHttp, ToTokenizer
from engine.messages.cache import CacheChanges, FollowCache
from engine.messages.control import Answer, Ask, Fatal, Flush, Flushed, Pause, Stats, WorkerReady
from engine.messages.looking import ChannelLook, Look, Snapshot
from engine.messages.questions import Question, Value
from engine.messages.reply import Chunk
from engine.messages.request import Abort, EndPrograms, Generate, Job
from engine.messages.sessions import EndSession, KeptSession, ListSessions
from engine.runtime.board import Board, Counter
from engine.runtime.channel import Outbox, Receiver, Sender
from engine.runtime.mailbox import Mailbox
from engine.runtime.mailbox import joined as joined  # callers take it from here
from engine.runtime.peers import Peers
from engine.runtime.readiness import Readiness
from engine.text.pool import TextPool
from engine.text.tokenizer import Text

if TYPE_CHECKING:
    from engine.media.store import MediaStore

log = logging.getLogger("engine.runtime.front")

OWNER = "\0"  # in a rid: what comes behind it says whose the request is, and is told to nobody
HEARTBEAT_LIMIT = 10.0

Status = Literal["starting", "ready", "restarting", "stalled", "failed", "draining", "paused"]


class Health(Struct, frozen=True):
    """What /health says; `ok` while requests are answered."""

    status: Status
    cause: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "ready"


class Place(NamedTuple):
    """Where a front stands among others. `numbers` are those that no other front gives to a request or a question."""

    peers: Peers
    board: Board
    numbers: Iterator[int]


class Front(Readiness):
    """One engine, seen from its clients. Made by `engine.runtime.launch.open_front`."""

    name = "front"

    def __init__(
        self,
        config: Config,
        model_name: str,
        inbox: Receiver[ToHttp],
        *,
        tokenizer: Sender[ToTokenizer],
        scheduler: Outbox[FromFront],
        place: Place | None = None,
    ) -> None:
        place = place or Place(Peers(), Board(), itertools.count())
        super().__init__()
        self.config = config
        self.model_name = model_name
        self.peers = place.peers
        self.board = place.board
        self.text: Text | None = None  # once it is read
        self.texts: TextPool | None = None  # the same, for what needs no device: counting tokens
        self.media: MediaStore | None = None  # where the model sees, once its text is read
        self.created = int(time.time())
        self.stats = Stats("starting")
        self.on_stats: list[Callable[[Stats], None]] = []
        self.draining = False
        self._inbox = inbox
        self._tokenizer = tokenizer
        self.senders: dict[str, Sender[Any]] = {"tokenizer": tokenizer}  # to actors beside it, to look at
        self._scheduler = scheduler
        self._numbers = place.numbers
        self._open: dict[str, Mailbox] = {}
        self.boxes: dict[str, Mailbox] = {}  # the same, by their keys: the detokenizer puts replies there
        self._heard = time.monotonic()
        self._asked: dict[int, asyncio.Future[Answer]] = {}  # who waits for the answer of that number

    # ── the actor ────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        async for message in self._inbox:
            match message:
                case Stats():
                    self._heard = time.monotonic()
                    self.stats = message
                    for listener in self.on_stats:
                        listener(message)
                case Answer():
                    answer = self._asked.get(message.number)  # who asked may have left
                    if answer is not None and not answer.done():
                        answer.set_result(message)
                case WorkerReady():
                    await self._tokenizer.send(message)
                    self.info = message
                    self._changes.tell()
                case Fatal():
                    self.fail(f"the {message.actor} cannot go on: {message.cause}")

    def fail(self, cause: str) -> None:
        """Nothing more will come: every open request ends with `cause`."""
        self.failure = self.failure or cause
        self._fail_open(lambda: WorkerError(cause))

    def end(self) -> int:
        """Let in nothing more, and end every open request with an error that says so; how many were open."""
        self.draining = True
        self._fail_open(shut_down)
        return len(self._open)

    def _fail_open(self, error: Callable[[], EngineError]) -> None:
        """End each open request, and each question, with an `error` of its own; what has one already keeps it."""
        for box in self._open.values():
            if not box.failed:
                box.fail(error())
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(error())
        self._changes.tell()

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template, once its text is read."""
        return self.text is not None and self.text.has_template

    @property
    def open(self) -> int:
        """How many requests of this front are open."""
        return len(self._open)

    # ── for clients ──────────────────────────────────────────────────────────────────────────

    def health(self) -> Health:
        if self.failure:
            return Health("failed", self.failure)
        if self.draining:
            return Health("draining", "the server is shutting down")
        if cause := self.dead():
            return Health("stalled", cause)
        if self.stats.worker == "ready" and self.stats.paused:
            return Health("paused", "generation is paused, and requests wait; POST /continue_generation lets them run")
        return Health(self.stats.worker, self.stats.cause)

    def dead(self) -> str:
        """Why nothing but a new process will answer; empty while the engine lives, ready or not."""
        quiet = time.monotonic() - self._heard
        silent = f"no heartbeat from the scheduler for {quiet:.0f} s" if quiet > HEARTBEAT_LIMIT else ""
        return self.failure or silent

    @property
    def most_open(self) -> int:
        """How many requests may be open at once, at all fronts; 0 until the device is ready."""
        return 0 if self.info is None else self.info.slots + self.config.schedule.max_waiting

    def begin(self, request: Job) -> Mailbox:
        """Open `request`: its reply comes into the mailbox until the last chunk or an error, or until `leave`, which
        must follow. Raises RequestError when it is refused at once, WorkerError when nothing runs any more."""
        box = self._admit(request)
        try:
            self._tokenizer.send_nowait(msgspec.structs.replace(request, rid=box.key))
        except BaseException:
            self._forget(box)
            raise
        return box

    def leave(self, box: Mailbox) -> None:
        """Close the request of `box`, and abort it if its reply goes on."""
        self._forget(box)
        if not box.ended and not box.failed:
            self._tokenizer.send_nowait(Abort(box.key))
        if self.media is not None:
            self.media.release(box.key)
        box.close()
        self._changes.tell()

    def _forget(self, box: Mailbox) -> None:
        del self._open[box.rid]
        del self.boxes[box.key]
        self.board.add(Counter.REQUESTS, -1)

    async def generate(self, request: Job) -> AsyncGenerator[Chunk, None]:
        """The reply to `request`, chunk by chunk, the last with a finish reason. That to an Embed is one chunk.

        Closing or cancelling the generator aborts the request. Raises RequestError when it is refused,
        WorkerError when the device fails it.
        """
        box = self.begin(request)
        try:
            del request  # a prompt may be long, and is not held while its reply is made
            ended = False
            while not ended:
                chunk = await box.take()
                ended = chunk.finish is not None
                yield chunk
        finally:
            self.leave(box)

    def abort(self, rid: str | None) -> int:
        """End the request `rid`, or all with None, as its client's `abort`; how many were open."""
        boxes = list(self._open.values()) if rid is None else [box for box in (self._open.get(rid),) if box]
        for box in boxes:
            self._tokenizer.send_nowait(Abort(box.key))
        return len(boxes)

    async def end_programs(self, owner: bytes, cache_salt: str, programs: Sequence[str]) -> None:
        """No more calls of these programs of `owner` will come, so nothing is kept for them."""
        await self._scheduler.send(EndPrograms(owner, cache_salt, tuple(programs)))

    async def flush(self) -> Flushed:
        """Forget the cached prefixes that nothing uses."""
        value = await self._answer(Flush(next(self._numbers)))
        return msgspec.msgpack.decode(value, type=Flushed)

    async def pause(self, paused: bool, *, retract: bool = False) -> None:
        """Plan no more steps, or go on; returns once it is so, and when pausing, nothing runs on the device.

        With `retract`, what runs goes back to the queue and holds no page meanwhile."""
        await self._answer(Pause(next(self._numbers), paused, retract))

    async def ask(self, question: Question[Value]) -> Value:
        """The worker's answer to `question`.

        Raises RequestError with the worker's cause when it has none, WorkerError when the engine ends first."""
        return question.read(await self._answer(Ask(next(self._numbers), question.packed())))

    async def cache_changes(self, after: int) -> CacheChanges:
        """What has changed in the cache after the change with that number, where --cache-events is set. It comes within
        about a second, and may be nothing."""
        assert self.config.cache.cache_events, "no account of the cache is kept"
        value = await self._answer(FollowCache(next(self._numbers), after))
        return msgspec.msgpack.decode(value, type=CacheChanges)

    async def look(self) -> Snapshot:
        """What is going on in the core, for people. It is made for the first who asks in half a second."""
        value = await self._answer(Look(next(self._numbers)))
        return msgspec.msgpack.decode(value, type=Snapshot)

    def channels(self) -> list[ChannelLook]:
        """The fill of what leads to actors of this front."""
        beside = [ChannelLook(actor, *sender.fill) for actor, sender in self.senders.items()]
        return [*beside, ChannelLook("front", len(self._inbox), self._inbox.capacity)]

    async def sessions(self, owner: bytes, cache_salt: str) -> list[KeptSession]:
        """The sessions of `owner` under `cache_salt`, the one used last first."""
        value = await self._answer(ListSessions(next(self._numbers), owner, cache_salt))
        return msgspec.msgpack.decode(value, type=list[KeptSession])

    async def end_session(self, owner: bytes, cache_salt: str, id: str) -> bool:
        """End a session; whether there was one."""
        value = await self._answer(EndSession(next(self._numbers), owner, cache_salt, id))
        return msgspec.msgpack.decode(value, type=bool)

    async def _answer(self, asked: Flush | Pause | Ask | FollowCache | Look | ListSessions | EndSession) -> bytes:
        """The value of the Answer to `asked`."""
        if self.failure:
            raise WorkerError(self.failure)
        future = self._asked[asked.number] = asyncio.get_running_loop().create_future()
        try:
            await self._scheduler.send(asked)
            answer = await future
        finally:
            del self._asked[asked.number]
        if answer.cause:
            raise RequestError(answer.cause)
        return answer.value

    async def drain(self, seconds: float) -> int:
        """Let in nothing more and wait at most `seconds` for open requests; how many are left."""
        self.draining = True
        with anyio.move_on_after(seconds):
            while self._open and not self.failure:
                await self._changes.next()
        return len(self._open)

    def _admit(self, request: Job) -> Mailbox:
        if self.failure:
            raise WorkerError(self.failure)
        if self.draining:
            raise RequestError("the server is shutting down; send the request elsewhere", code="draining", status=503)
        if self.info is None:
            raise RequestError("the model is still loading; try again in a moment", code="starting", status=503)
        check_task(request, self.model_name, self.info)
        limit, everywhere = self.most_open, self.board.total(Counter.REQUESTS)
        if everywhere >= limit:
            raise RequestError(
                f"{counted(everywhere, 'request is', 'requests are')} open, and {limit} is the limit; try again later "
                "or raise --max-waiting",
                code="queue_full",
                status=503,
            )
        if request.rid in self._open:
            raise in_use(request.rid)
        box = Mailbox(request.rid, format(next(self._numbers), "x"))
        self._open[request.rid] = self.boxes[box.key] = box
        self.board.add(Counter.REQUESTS)
        return box


def in_use(rid: str) -> RequestError:
    """The error of a request whose `rid` another one has."""
    message = f"a request with rid {rid.partition(OWNER)[0]!r} is still running; use another rid"
    return RequestError(message, param="rid", code="rid_in_use", status=409)


def check_task(request: Job, model: str, info: WorkerReady) -> None:
    """Raises RequestError when `request` is not for a model such as this: one generates, another makes vectors."""
    if isinstance(request, Generate) and info.embedding_size:
        raise RequestError(
            f"the model {model!r} makes embeddings and generates no text; send the text to /v1/embeddings or "
            "/v1/score, or ask a server with a model that generates",
            code="wrong_task",
        )
    if not isinstance(request, Generate) and not info.embedding_size:
        raise RequestError(
            f"the model {model!r} generates text and makes no embeddings; use /v1/completions, or ask a server with "
            "an embedding model: engine serve --model all-minilm-l6-v2",
            code="wrong_task",
        )
