"""Mailboxes: where the detokenizer puts what a request is told, and how that is taken.

    detokenizer ── tokens, chunk ──> Mailbox ──> Taker: at once, in the detokenizer's own step
                                        └──────> take(): gathered, for a task that waits for each chunk

A taker is called for every step and must not wait: HTTP's stream writes to its connection there (`http/streams.py`), so
that no task is woken for a token. `whole` takes replies that nobody reads before they have ended. The other way is that
of `Front.generate`: what its reader has not taken yet is merged, so a slow one holds up nobody, and what waits for it
is bounded by the length of its own reply. Left out: which mailbox is whose (`front.py`).
"""

import asyncio
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Protocol

import msgspec

from engine.errors import RequestError, Words
from engine.messages.reply import Chunk


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """Successive chunks of one reply as one."""
    return msgspec.structs.replace(
        chunks[-1],
        text="".join([chunk.text for chunk in chunks]),
        ids=[id for chunk in chunks for id in chunk.ids],
        logprobs=tuple([token for chunk in chunks for token in chunk.logprobs]),
        prompt_logprobs=tuple([token for chunk in chunks for token in chunk.prompt_logprobs]),
        prompt_ids=b"".join([chunk.prompt_ids for chunk in chunks]),
        prefill_seconds=next((chunk.prefill_seconds for chunk in chunks if chunk.prefill_seconds is not None), None),
    )


class Taker(Protocol):
    """What takes one reply as it comes. Nothing here may wait or raise."""

    watch: "Watch | None"

    def tokens(self, text: str, ids: list[int], now: float) -> None:
        """The text of new tokens that came at `now` (as perf_counter has it), with nothing beside them, neither the
        first nor the last of the reply. `watch` is to be told."""

    def chunk(self, chunk: Chunk) -> None:
        """Any other part of the reply, of which `watch` knows; the last has a finish reason."""

    def fail(self, error: Exception) -> None:
        """The reply ends with `error`."""


class Watch(Protocol):
    """What is told when parts of one reply come."""

    def tokens(self, count: int, now: float) -> None: ...

    def chunk(self, chunk: Chunk, now: float) -> None: ...

    def fail(self, error: Exception) -> None: ...


class Gathered:
    """Successive parts of one reply, until they are taken as one chunk. A chunk comes before any plain tokens."""

    __slots__ = ("_chunks", "_ids", "_last", "_texts", "_tokens", "watch")

    def __init__(self) -> None:
        self.watch: Watch | None = None
        self._chunks: list[Chunk] = []
        self._texts: list[str] = []  # of plain tokens after those chunks
        self._ids: list[int] = []
        self._last: Chunk | None = None
        self._tokens = 0  # that came after `_last`

    def __bool__(self) -> bool:
        return bool(self._chunks or self._ids)

    def tokens(self, text: str, ids: list[int], now: float) -> None:
        """Take in plain tokens."""
        if (watch := self.watch) is not None:
            watch.tokens(len(ids), now)
        self._texts.append(text)
        self._ids += ids
        self._tokens += len(ids)

    def chunk(self, chunk: Chunk) -> None:
        """Take in any other part."""
        if self._ids:
            self._chunks.append(self._plain())
        self._chunks.append(chunk)
        self._last, self._tokens = chunk, 0

    def parts(self) -> list[Chunk]:
        """All that is here, plain tokens in a row as one chunk."""
        if self._ids:
            self._chunks.append(self._plain())
        chunks, self._chunks = self._chunks, []
        return chunks

    def take(self) -> Chunk:
        """All that is here, as one chunk."""
        chunks = self.parts()
        return chunks[0] if len(chunks) == 1 else joined(chunks)

    def _plain(self) -> Chunk:
        last = self._last
        assert last is not None, "the first part of a reply is a chunk"
        texts, ids, self._texts, self._ids = self._texts, self._ids, [], []
        text = texts[0] if len(texts) == 1 else "".join(texts)
        completed = last.completion_tokens + self._tokens
        counts = (last.prompt_tokens, last.cached_tokens, completed)
        return Chunk(last.rid, text, ids, None, None, *counts, shown=last.shown)


class Inbox(Gathered):
    """Gathers a reply for a task that waits for each part.

    A bare future wakes it: with hundreds of replies a step, an event made anew for each costs more than all the
    scheduling."""

    __slots__ = ("_wanted", "error")

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None  # until it is raised
        self._wanted: asyncio.Future[None] | None = None

    def tokens(self, text: str, ids: list[int], now: float) -> None:
        """Take in plain tokens."""
        super().tokens(text, ids, now)
        self._wake()

    def chunk(self, chunk: Chunk) -> None:
        """Take in any other part."""
        super().chunk(chunk)
        self._wake()

    def fail(self, error: Exception) -> None:
        """The reply ends with `error`."""
        self.error = error
        self._wake()

    async def part(self) -> Chunk:
        """What has arrived, merged into one chunk; raises the request's error once all else is taken."""
        while not self:
            if self.error is not None:
                raise self.taken_error()
            self._wanted = asyncio.get_running_loop().create_future()
            await self._wanted
        return self.take()

    def taken_error(self) -> Exception:
        """The error, which is held here no longer: its traceback leads to this mailbox, and to the whole request."""
        error, self.error = self.error, None
        assert error is not None, "an error is taken once"
        return error

    def _wake(self) -> None:
        if (wanted := self._wanted) is not None and not wanted.done():
            wanted.set_result(None)


class Nobody:
    """Takes what comes for a reader that has left."""

    watch: Watch | None = None

    def tokens(self, text: str, ids: list[int], now: float) -> None: ...

    def chunk(self, chunk: Chunk) -> None: ...

    def fail(self, error: Exception) -> None: ...


class Mailbox:
    """What one request is told. The detokenizer gives plain tokens to `taker` itself, all else to `put` and `fail`."""

    __slots__ = ("_inbox", "ended", "failed", "key", "rid", "taker", "watch", "words")

    def __init__(self, rid: str, key: str) -> None:
        self.rid = rid  # as its client calls it, and perhaps whose it is
        self.key = key
        self.failed = False
        self.ended = False  # the last chunk is here
        self.watch: Watch | None = None
        self.words: Callable[[], Words] | None = None  # how errors are told, of one of several prompts
        self._inbox = Inbox()
        self.taker: Taker = self._inbox

    def put(self, chunk: Chunk, now: float | None = None) -> None:
        """A part of the reply that is more than plain tokens."""
        self.ended = self.ended or chunk.finish is not None
        if (watch := self.watch) is not None:
            watch.chunk(chunk, perf_counter() if now is None else now)
        self.taker.chunk(chunk)

    def fail(self, error: Exception) -> None:
        """End the reply with `error`."""
        self.failed = True
        if (watch := self.watch) is not None:
            watch.fail(error)
        if self.words is not None and isinstance(error, RequestError):
            error = error.worded(self.words())
        self.taker.fail(error)

    def hand_to(self, taker: Taker) -> None:
        """Let `taker` have what is here, and from now on all that comes."""
        self.taker, inbox = taker, self._inbox
        taker.watch = self.watch
        if inbox:
            taker.chunk(inbox.take())
        if inbox.error is not None:
            taker.fail(inbox.taken_error())

    def close(self) -> None:
        """Its reader has left: nothing is kept, and nobody is told."""
        self.taker, self.watch, self.words, self._inbox = Nobody(), None, None, Inbox()

    async def take(self) -> Chunk:
        """What has arrived, merged into one chunk; raises the request's error once all else is taken."""
        return await self._inbox.part()


# ── replies that are read once they have ended ───────────────────────────────────────────────


class _Wholes:
    """How many of several replies have not ended, and the error of one that failed."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.error: Exception | None = None
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def check(self) -> None:
        if (self.error is not None or not self.left) and not self.over.done():
            self.over.set_result(None)


class _Whole(Gathered):
    """Takes one of them."""

    __slots__ = ("_of",)

    def __init__(self, of: _Wholes) -> None:
        super().__init__()
        self._of = of

    def chunk(self, chunk: Chunk) -> None:
        super().chunk(chunk)
        if chunk.finish is not None:
            self._of.left -= 1
            self._of.check()

    def fail(self, error: Exception) -> None:
        self._of.error = self._of.error or error
        self._of.check()


async def whole(boxes: Sequence[Mailbox]) -> list[Chunk]:
    """The replies of `boxes`, each as one chunk, once all have ended; what one raises ends the wait."""
    return [taker.take() for taker in await _ended(boxes)]


async def whole_parts(box: Mailbox) -> list[Chunk]:
    """As `whole`, of one reply, in its parts."""
    (taker,) = await _ended([box])
    return taker.parts()


async def _ended(boxes: Sequence[Mailbox]) -> Sequence[Gathered]:
    of = _Wholes(len(boxes))
    takers = [_Whole(of) for _ in boxes]
    for box, taker in zip(boxes, takers, strict=True):
        box.hand_to(taker)
    await of.over
    if (error := of.error) is not None:
        of.error = None
        raise error
    return takers
