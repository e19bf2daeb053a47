"""Responses that are kept in memory: for retrieval, for going on from, and while they are made in the background.

At most `MAX_RESPONSES` with `MAX_BYTES` between them, all counted that a response holds. Beyond either, those that
ended first are forgotten, but none that still runs: where those that run leave no room, another one is refused. A
restart forgets all.

Each is its owner's alone (`engine.http.keys`): to others it is one that there is not.

Each front stores the responses that it has made, and the limits are those of all fronts together: what they hold is on
the board. The front that holds the one that ended first forgets it, so another one may have to ask for that, and for
the time of a message there is one too many.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any, Literal
from uuid import uuid4

import msgspec
from aiohttp import web

from engine.conversation.parsers import assembled
from engine.conversation.parts import Call, Message, Text
from engine.conversation.reading import NOTHING, Reading
from engine.errors import RequestError, Words
from engine.http.passing import id_at
from engine.http.responses.footprint import footprint
from engine.http.responses.items import InputItem, ItemStatus, OutputItem, Scores, input_items, output_of, together
from engine.http.responses.objects import (
    Asked,
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    ResponseError,
    ResponseObject,
    ResponseUsage,
    Status,
)
from engine.http.sse import OURS, describe_error
from engine.messages.peers import ForgetOldest
from engine.messages.reply import Chunk
from engine.plugin.parsing import Content, Event
from engine.runtime.board import Board, Counter
from engine.runtime.changes import Changes
from engine.runtime.peers import Peers

MAX_RESPONSES = 1000
MAX_BYTES = 64 * 2**20
MARGIN = 1024  # bytes of a response without what was asked and replied
READER = 16 * 1024  # bytes of what reads a reply that goes on, without its text
SLOT = 16  # bytes of a place in a list, and of the room that the list keeps for more

Told = tuple[Chunk, list[Event]]  # a chunk without its text, and what a parser tells of that
STATUSES: dict[str | None, Status] = {"stop": "completed", "length": "incomplete", "abort": "cancelled"}


# ── one response ─────────────────────────────────────────────────────────────────────────────


class Response:
    """One response: what was asked, and the reply as far as it is there.

    `asked` is what never changes; `conversation` the messages it answers; `reading` how replies are read; `scored`
    says that log-probabilities are asked for; `owner` is whose it is. `size` is how many bytes it holds, at most;
    `resized` is told by how much that changes."""

    def __init__(
        self,
        asked: Asked,
        conversation: list[Message],
        reading: Reading = NOTHING,
        *,
        scored: bool = False,
        id: str = "",
        owner: bytes = b"",
    ) -> None:
        self.id = id or id_at(0, "resp")
        self.owner = owner
        self.key = uuid4().hex  # of its items
        self.background: bool = asked.background
        self.status: Status = "queued" if self.background else "in_progress"
        self._asked = asked
        self._conversation = conversation
        self._created = int(time.time())
        self._completed: int | None = None
        self.stored = 0  # when it was stored as ended, by the monotonic clock in ns, which all fronts share
        self._error: ResponseError | None = None
        self._error_status = 0
        self._reader = reading.reader()
        self.namespaces = {tool.name: tool.namespace for tool in reading.wanted.tools if tool.namespace}
        self._scores = Scores() if scored else None
        self._reasoned = 0  # tokens
        self._told: list[Told] = []
        # Of what is not stored nobody asks how large it is.
        self._given = MARGIN + (footprint(asked) + footprint(conversation) if asked.store else 0)
        self.size = self._given + (READER if self._reader is not None else 0)
        self.resized: Callable[[int], None] | None = None
        self._changes = Changes()
        self._task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        return self.status not in ("queued", "in_progress")

    @property
    def _last(self) -> Chunk | None:
        return self._told[-1][0] if self._told else None

    def _events(self) -> Iterator[Event]:
        return (event for _, events in self._told for event in events)

    def continued(self) -> list[Message]:
        """The conversation with the reply at its end."""
        reply = assembled(self._events())
        text = (Text(reply.content),) if reply.content else ()
        calls = (Call(call.name, call.arguments, call.id) for call in reply.calls)
        return [*self._conversation, Message("assistant", (*text, *calls), reasoning=reply.reasoning or None)]

    # ── becoming ─────────────────────────────────────────────────────────────────────────────

    def add(self, chunk: Chunk) -> Told:
        """Take in the next chunk of the reply; what is told of it."""
        events: list[Event] = [Content(chunk.text)] if chunk.text else []
        if self._reader is not None:
            events = self._reader.read(chunk)
        if self._scores is not None:
            events = self._scores.join(chunk, events)
        told = msgspec.structs.replace(chunk, text="", ids=[], logprobs=()), events
        self._told.append(told)
        self.status = "in_progress" if chunk.finish is None else STATUSES[chunk.finish]
        if self.background:  # others are stored once they have ended
            # The reader has the text twice: what it has not told yet, and the arguments of a call.
            held = 0 if self._reader is None else 2 * footprint(chunk.text)
            self._resize(self.size + footprint(told) + SLOT + held)
        if chunk.finish is not None:
            self._completed = int(time.time())
            self._end()
        self._changes.tell()
        return told

    def _end(self) -> None:
        """Let go of what only a reply that goes on needs, and count what is left."""
        if self._reader is not None:
            self._reasoned, self._reader = self._reader.reasoning_tokens, None
        self._scores = None
        if self._told and not self.background:  # nobody will follow it chunk by chunk
            self._told = [(self._told[-1][0], together(self._events()))]
        if self._asked.store:
            self._resize(self._given + footprint(self._told) + footprint(self._error))

    def _resize(self, size: int) -> None:
        grown, self.size = size - self.size, size
        if self.resized is not None:
            self.resized(grown)

    def unstored(self) -> None:
        """Say of it from now on that it is not stored."""
        self._asked = msgspec.structs.replace(self._asked, store=False)

    def fail(self, described: tuple[int, dict[str, Any]]) -> None:
        """End with an error: its HTTP status and its OpenAI error object."""
        status, error = described
        fields = error["error"]
        code: Literal["invalid_prompt", "server_error"] = "invalid_prompt" if status < 500 else "server_error"
        self._error = ResponseError(code, fields["message"], fields["param"])
        self._error_status, self.status = status, "failed"
        self._end()
        self._changes.tell()

    def start(self, chunks: AsyncGenerator[Chunk], words: Words) -> "asyncio.Task[None]":
        """Make the reply in a task of its own; its error is told in `words`."""
        self._task = asyncio.create_task(self._take(chunks, words))
        return self._task

    async def _take(self, chunks: AsyncGenerator[Chunk], words: Words) -> None:
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    self.add(chunk)
        except Exception as error:
            self.fail(describe_error(error, words))

    async def cancel(self) -> None:
        """End it if it still runs, and wait until it has ended."""
        if self._task is not None and not self.ended:
            self._task.cancel()
            await asyncio.wait([self._task])
            if not self.ended:  # nobody else has cancelled it meanwhile
                last = self._last or Chunk(self.id, "", [])
                self.add(msgspec.structs.replace(last, finish="abort"))

    async def follow(self) -> AsyncGenerator[Told]:
        """What is told of it from the first chunk on, as it comes. Raises RequestError where it failed."""
        index = 0
        while True:
            while index < len(self._told):
                yield self._told[index]
                index += 1
            if self._error is not None:
                raise RequestError(**msgspec.structs.asdict(self._error), status=self._error_status)
            if self.ended:
                return
            await self._changes.next()

    # ── as JSON ──────────────────────────────────────────────────────────────────────────────

    def object(self, status: Status | None = None) -> ResponseObject:
        """The response object as it is now, or as it was when it had `status` and no output."""
        early = status is not None
        last = None if early else self._last
        ended = last is not None and last.finish is not None
        cut = ended and self.status == "incomplete"
        output: list[OutputItem] = []
        if not early:
            status_of_last = _item_status(self.status)
            output = output_of(self._events(), self.key, status_of_last, ended=ended, namespaces=self.namespaces)
        return ResponseObject(
            id=self.id,
            created_at=self._created,
            completed_at=self._completed if ended else None,
            status=status or self.status,
            error=None if early else self._error,
            incomplete_details=IncompleteDetails() if cut else None,
            output=output,
            usage=self._usage(last) if last is not None and ended else None,
            **msgspec.structs.asdict(self._asked),
        )

    def input_items(self) -> list[InputItem]:
        """What it answers, in order; what came by reference is among it."""
        return input_items(self._conversation, f"item_{self.key}", self.namespaces)

    def _usage(self, last: Chunk) -> ResponseUsage:
        return ResponseUsage(
            last.prompt_tokens,
            InputTokensDetails(last.cached_tokens),
            last.completion_tokens,
            last.prompt_tokens + last.completion_tokens,
            OutputTokensDetails(self._reasoned),
        )


def _item_status(status: Status) -> ItemStatus:
    return status if status in ("completed", "in_progress") else "incomplete"


class ResponseStore:
    """The stored responses of one front, and the tasks that make those in the background.

    `held` is how many bytes all of them hold, at most. Without `board` and `peers` there are no other fronts."""

    def __init__(self, board: Board | None = None, peers: Peers | None = None) -> None:
        self.held = 0
        self._board = board or Board()
        self._peers = peers or Peers()
        self._running: dict[str, Response] = {}
        self._ended: dict[str, Response] = {}  # those that ended first come first
        self._tasks: set[asyncio.Task[None]] = set()
        self._trimming: asyncio.Task[None] | None = None
        self._peers.answers(ForgetOldest, self._forget_oldest)

    def __len__(self) -> int:
        return len(self._running) + len(self._ended)

    def put(self, response: Response) -> None:
        """Store `response`, which has ended, and forget those before it where that is too much. One that alone would
        be too much is not stored, and says so."""
        if response.size > MAX_BYTES:
            response.unstored()
            return
        self._count(response)
        self._end(response)
        self._trim()

    def run(self, response: Response, chunks: AsyncGenerator[Chunk], words: Words = OURS) -> None:
        """Store `response` and make it in the background; its error is told in `words`.

        Raises RequestError where there is no room for it."""
        self._check_room(response)
        self._count(response)
        self._running[response.id] = response
        self._count_running(1, response.size)
        task = response.start(chunks, words)
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._done(task, response))
        self._trim()

    def _check_room(self, response: Response) -> None:
        if response.size > MAX_BYTES:
            raise RequestError(
                f"this response would take {response.size} bytes in the store of responses, which holds {MAX_BYTES}; "
                "send less, or leave background out",
                param="background",
                code="response_too_large",
                status=413,
            )
        running = self._board.total(Counter.BACKGROUND)
        if running >= MAX_RESPONSES or response.size + self._board.total(Counter.BACKGROUND_BYTES) > MAX_BYTES:
            raise RequestError(
                f"{running} responses are made in the background, and the store has no room for another "
                f"one (of {MAX_RESPONSES} with {MAX_BYTES} bytes between them); try again later, or leave background "
                "out",
                param="background",
                code="store_full",
                status=503,
            )

    # ── what is held ─────────────────────────────────────────────────────────────────────────

    def _count(self, response: Response) -> None:
        response.resized = partial(self._grow, response.id)
        self._hold(1, response.size)

    def _grow(self, id: str, size: int) -> None:
        self._hold(0, size)
        if id in self._running:
            self._count_running(0, size)

    def _hold(self, count: int, size: int) -> None:
        self.held += size
        self._board.add(Counter.STORED, count)
        self._board.add(Counter.STORED_BYTES, size)

    def _count_running(self, count: int, size: int) -> None:
        self._board.add(Counter.BACKGROUND, count)
        self._board.add(Counter.BACKGROUND_BYTES, size)

    def _end(self, response: Response) -> None:
        response.stored = time.monotonic_ns()
        self._ended[response.id] = response
        self._show_oldest()

    def _show_oldest(self) -> None:
        self._board.set(Counter.OLDEST, next(iter(self._ended.values())).stored if self._ended else 0)

    def _done(self, task: "asyncio.Task[None]", response: Response) -> None:
        self._tasks.discard(task)
        if self._running.pop(response.id, None) is not None:  # it was not deleted
            self._count_running(-1, -response.size)
            self._end(response)
            self._trim()

    # ── no more than there is room for ───────────────────────────────────────────────────────

    @property
    def _full(self) -> bool:
        """Whether all fronts together hold too much."""
        total = self._board.total
        return total(Counter.STORED) > MAX_RESPONSES or total(Counter.STORED_BYTES) > MAX_BYTES

    def _trim(self) -> None:
        """Forget what ended first, at whichever front it is."""
        self._forget_own()
        if self._full and self._trimming is None and self._peers.count > 1:
            self._trimming = asyncio.create_task(self._trim_others())

    def _forget_own(self) -> int:
        """Forget those of this front that ended before all others, while there are too many; how many they were."""
        forgotten = 0
        others = [number for number in range(self._board.count) if number != self._board.number]
        while self._full and self._ended:
            oldest = next(iter(self._ended.values()))
            elsewhere = [self._board.of(number, Counter.OLDEST) for number in others]
            if any(0 < ended < oldest.stored for ended in elsewhere):
                break
            self.forget(oldest.id)
            forgotten += 1
        return forgotten

    async def _trim_others(self) -> None:
        try:
            forgotten = 1
            while self._full and forgotten:
                forgotten = sum(await self._peers.ask(ForgetOldest())) + self._forget_own()
            while self._full and self._ended:  # who has the first does not answer: the limit holds all the same
                self.forget(next(iter(self._ended)))
        finally:
            self._trimming = None

    async def _forget_oldest(self, asked: ForgetOldest) -> int:
        return self._forget_own()

    def get(self, id: str, owner: bytes) -> Response:
        """Raises RequestError (404) where `owner` has no such response, or no more."""
        if (response := self._stored(id, owner)) is None:
            message = f"there is no response {id[:200]!r}: it was never stored, was deleted, or is forgotten by now"
            raise RequestError(message, param="response_id", code="response_not_found", status=404)
        return response

    def _stored(self, id: str, owner: bytes = b"") -> Response | None:
        found = self._ended.get(id) or self._running.get(id)
        return found if found is not None and found.owner == owner else None

    def forget(self, id: str) -> None:
        """Hold the response `id` no longer, if it is stored."""
        if (response := self._ended.pop(id, None)) is not None:
            self._show_oldest()
        elif (response := self._running.pop(id, None)) is not None:
            self._count_running(-1, -response.size)
        if response is not None:
            response.resized = None
            self._hold(-1, -response.size)

    def conversation(self, id: str, owner: bytes) -> list[Message]:
        """What was said up to the end of the response `id` of `owner`. Raises RequestError where that cannot be gone on
        from."""
        if (response := self._stored(id, owner)) is None:
            raise RequestError(
                f"previous_response_id is {id[:200]!r}, and no such response is stored; send its messages as input",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        if response.status not in ("completed", "incomplete"):
            raise RequestError(
                f"previous_response_id is {id!r}, which is {response.status}; go on from one that is completed",
                param="previous_response_id",
            )
        return response.continued()

    async def close(self) -> None:
        """End what still runs."""
        tasks = self._tasks if self._trimming is None else {*self._tasks, self._trimming}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


STORE = web.AppKey("responses", ResponseStore)
