"""Mailboxes: where the detokenizer puts what a request is told, and how that is taken.

    detokenizer ── tokens, chunk ──> Mailbox ──> Taker: at once, in the detokenizer's own step
                                        └──────> take(): gathered, for a task that waits for each chunk

A taker is called for every step and must not wait: HTTP's stream writes to its connection there (`http/streams.py`), so
that no task is woken for a token. `whole` takes replies that nobody reads before they have ended. The other way is that
of `Front.generate`: what its reader has not taken yet is merged, so a slow one holds up nobody, and what waits for it
is bounded by the length of its own reply. Left out: which mailbox is whose (`front.py`).
"""

import asyncio
from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

import msgspec

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

    def tokens(self, text: str, ids: list[int]) -> None:
        """The text of new tokens with nothing beside them, neither the first nor the last of the reply."""

    def chunk(self, chunk: Chunk) -> None:
        """Any other part of the reply; the last has a finish reason."""

    def fail(self, error: Exception) -> None:
        """The reply ends with `error`."""


class Watch(Protocol):
    """What is told when parts of one reply came, `now` as perf_counter has it."""

    def tokens(self, count: int, now: float) -> None: ...

    def chunk(self, chunk: Chunk, now: float) -> None: ...

    def fail(self, error: Exception) -> None: ...


class Gathered:
    """Successive parts of one reply, until they are taken as one chunk. A chunk comes before any plain tokens."""

    __slots__ = ("_chunks", "_ids", "_last", "_texts", "_tokens")

    def __init__(self) -> None:
        self._chunks: list[Chunk] = []
        self._texts: list[str] = []  # of plain tokens after those chunks
        self._ids: list[int] = []
        self._last: Chunk | None = None
        self._tokens = 0  # that came after `_last`

    def __bool__(self) -> bool:
        return bool(self._chunks or self._ids)

    def tokens(self, text: str, ids: list[int]) -> None:
        """Take in plain tokens."""
        self._texts.append(text)
        self._ids += ids
        self._tokens += len(ids)

    def passed(self, count: int) -> None:
        """Count plain tokens that went another way."""
        self._tokens += count

    def chunk(self, chunk: Chunk) -> None:
        """Take in any other part."""
        if self._ids:
            self._chunks.append(self._plain())
        self._chunks.append(chunk)
        self._last, self._tokens = chunk, 0

    def take(self) -> Chunk:
        """All that is here, as one chunk."""
        if self._ids:
            self._chunks.append(self._plain())
        chunks, self._chunks = self._chunks, []
        return chunks[0] if len(chunks) == 1 else joined(chunks)

    def _plain(self) -> Chunk:
        last = self._last
        assert last is not None, "the first part of a reply is a chunk"
        texts, ids, self._texts, self._ids = self._texts, self._ids, [], []
        text = texts[0] if len(texts) == 1 else "".join(texts)
        completed = last.completion_tokens + self._tokens
        return Chunk(last.rid, text, ids, None, None, last.prompt_tokens, last.cached_tokens, completed)


class Mailbox:
    """What one request is told.

    A bare future wakes its reader: with hundreds of replies a step, an event made anew for each costs more than
    all the scheduling.
    """

    __slots__ = ("_closed", "_gathered", "_taker", "_wanted", "ended", "error", "failed", "key", "rid", "watch")

    def __init__(self, rid: str, key: str) -> None:
        self.rid = rid  # as its client calls it
        self.key = key
        self.error: Exception | None = None  # until it is raised
        self.failed = False
        self.ended = False  # the last chunk is here
        self.watch: Watch | None = None
        self._gathered = Gathered()
        self._taker: Taker | None = None
        self._wanted: asyncio.Future[None] | None = None
        self._closed = False

    def tokens(self, text: str, ids: list[int], now: float) -> None:
        """New tokens that came at `now`, of which there is nothing to say but this."""
        if (watch := self.watch) is not None:
            watch.tokens(len(ids), now)
        if (taker := self._taker) is not None:
            taker.tokens(text, ids)
        elif not self._closed:
            self._gathered.tokens(text, ids)
            self._wake()

    def put(self, chunk: Chunk, now: float | None = None) -> None:
        """Any other part of the reply."""
        self.ended = self.ended or chunk.finish is not None
        if (watch := self.watch) is not None:
            watch.chunk(chunk, perf_counter() if now is None else now)
        if (taker := self._taker) is not None:
            taker.chunk(chunk)
        elif not self._closed:
            self._gathered.chunk(chunk)
            self._wake()

    def fail(self, error: Exception) -> None:
        """End the reply with `error`."""
        if self._closed:
            return
        self.failed = True
        if (watch := self.watch) is not None:
            watch.fail(error)
        if (taker := self._taker) is not None:
            taker.fail(error)
        else:
            self.error = error
            self._wake()

    def hand_to(self, taker: Taker) -> None:
        """Let `taker` have what is here, and from now on all that comes."""
        self._taker = taker
        if self._gathered:
            taker.chunk(self._gathered.take())
        if self.error is not None:
            taker.fail(self._taken_error())

    def close(self) -> None:
        """Its reader has left: nothing is kept, and nobody is told."""
        self._closed = True
        self._taker = self.watch = self.error = None
        self._gathered = Gathered()

    async def take(self) -> Chunk:
        """What has arrived, merged into one chunk; raises the request's error once all else is taken."""
        while not self._gathered:
            if self.failed:
                raise self._taken_error()
            self._wanted = asyncio.get_running_loop().create_future()
            await self._wanted
        return self._gathered.take()

    def _wake(self) -> None:
        if (wanted := self._wanted) is not None and not wanted.done():
            wanted.set_result(None)

    def _taken_error(self) -> Exception:
        """The error, which is held here no longer: its traceback leads to this mailbox, and to the whole request."""
        error, self.error = self.error, None
        assert error is not None, "an error is taken once"
        return error


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
    of = _Wholes(len(boxes))
    takers = [_Whole(of) for _ in boxes]
    for box, taker in zip(boxes, takers, strict=True):
        box.hand_to(taker)
    await of.over
    if (error := of.error) is not None:
        of.error = None
        raise error
    return [taker.take() for taker in takers]
