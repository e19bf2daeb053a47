"""Values that come later: the variables of a program, read from threads and from the event loop.

The event loop sets them. A thread waits for them; a task awaits them. Both may follow the text as it comes. Left out:
what makes them (state.py).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock
from typing import Any

import msgspec
from msgspec import Struct


class ScoredToken(Struct, frozen=True):
    """A token and its log-probability. `top` are the likeliest at its place. `id` and `rank`, from 1 for the likeliest
    of the vocabulary, are None where a server of another make does not tell them."""

    text: str
    bytes: bytes
    logprob: float
    id: int | None = None
    rank: int | None = None
    top: "tuple[ScoredToken, ...]" = ()


class Meta(Struct, frozen=True):
    """What is known of a call besides its text. Of a gen with `n` above 1 the counts are sums, the rest is the first's;
    of one with tools, the last reply's. `matched` is the stop string or the token id that ended the reply, where the
    backend says so. `logprobs` are of the reply's tokens, `prompt_logprobs` of the prompt's but the first, both where
    they are asked for. Of a select, `scores` are the log-probabilities of each choice's tokens, and `finish` is empty.
    """

    finish: str = ""
    matched: int | str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    logprobs: tuple[ScoredToken, ...] = ()
    prompt_logprobs: tuple[ScoredToken, ...] = ()
    scores: tuple[Any, ...] = ()


COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens")


def summed(metas: Sequence[Meta]) -> Meta:
    """The first, with the tokens of all."""
    totals = {name: sum(getattr(meta, name) for meta in metas) for name in COUNTS}
    return msgspec.structs.replace(metas[0], **totals)


class Usage(Struct):
    """Calls of a program, forks included, and their tokens; those that the cache held are among the prompts'."""

    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, meta: Meta, calls: int = 1) -> None:
        """Count `calls` that `meta` tells of."""
        self.calls += calls
        self.prompt_tokens += meta.prompt_tokens
        self.cached_tokens += meta.cached_tokens
        self.completion_tokens += meta.completion_tokens


class Decision(Struct, frozen=True):
    """The answer to a `decide`: the likeliest of what was offered (True or False of a statement), how likely it is, and
    what each of them is. Of levels, `score` is the mean of their places, the lowest is 0."""

    answer: Any
    confidence: float
    probabilities: dict[Any, float]
    score: float | None = None


class Feed:
    """Pieces of a text as they come, for any number of readers; each gets them from the first. The event loop alone
    puts them."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._ended = False
        self._readers: list[Callable[[str | None], None]] = []
        self._lock = Lock()

    @property
    def followed(self) -> bool:
        """Whether anybody reads it as it comes."""
        return bool(self._readers)

    def put(self, piece: str) -> None:
        """The next piece."""
        with self._lock:
            self._pieces.append(piece)
            for tell in self._readers:
                tell(piece)

    def end(self) -> None:
        """There is no more; readers go on."""
        with self._lock:
            if not self._ended:
                self._ended = True
                for tell in self._readers:
                    tell(None)

    def _read_with(self, tell: Callable[[str | None], None]) -> None:
        with self._lock:
            for piece in self._pieces:
                tell(piece)
            self._readers.append(tell)
            if self._ended:
                tell(None)

    def __iter__(self) -> Iterator[str]:
        """For a thread other than the event loop's."""
        arrived: SimpleQueue[str | None] = SimpleQueue()
        self._read_with(arrived.put)
        yield from iter(arrived.get, None)

    async def __aiter__(self) -> AsyncIterator[str]:
        arrived: asyncio.Queue[str | None] = asyncio.Queue()
        self._read_with(arrived.put_nowait)
        while (piece := await arrived.get()) is not None:
            yield piece


NO_CALL = Meta()


class Variable:
    """One variable. `place` is the line of the program that makes it."""

    def __init__(self, name: str, place: str) -> None:
        self.name = name
        self.place = place
        self.value: Future[Any] = Future()
        self.meta = NO_CALL
        self.feed = Feed()

    def set(self, value: Any, meta: Meta = NO_CALL) -> None:
        """It is there; whatever comes later is not looked at."""
        if not self.value.done():
            self.meta = meta
            self.value.set_result(value)
            self.feed.end()

    def fail(self, error: BaseException) -> None:
        """It will not come; who reads it is told `error`."""
        if not self.value.done():
            self.value.set_exception(error)
            self.feed.end()
