"""The media of requests, each read, decoded and prepared once, however many ask for it.

Sources (sources.py) give bytes. A process that can be killed (pool.py, process.py) decodes them (decoding.py) and has
the model's processor prepare the pixels. Pillow and PyAV are loaded there and nowhere else.

    parts ──> source ──> bytes ──SHA-256──> is it here? ──> Prepared
                │                             └─ no: a process decodes and prepares it, and it is kept
                └─ a URL that is being fetched is not fetched again; nor one that its server said stays the same

What is here is known by its content, and whether it is coarse, so the same picture under two URLs is one. The least
recently asked for goes when the bytes are too many. If who does something for several leaves, one of the others does it
anew. Left out: what goes to the device (engine/sched/assets.py), and the embeddings there.
"""

import asyncio
import hashlib
import importlib.util
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from typing import Generic, Literal, Protocol, TypeVar

import anyio.to_thread

from engine.conversation.parts import Image, Message, Video, media_of, without_sources
from engine.errors import RequestError, counted
from engine.media.sources import Kind, Sources
from engine.messages.decoding import MOST_PAYLOAD, DecodeMedia, MediaReady
from engine.messages.media import Prepared, size_of, slices_of
from engine.options.media import MediaOptions
from engine.runtime.together import together

LARGE = 1 << 20  # bytes that are hashed in a thread
READ_AT_ONCE, READ_OF_ONE = 256, 8  # sources of all requests, and of one
BESIDE = 256  # bytes of what is kept beside a payload
MOST_URLS = 4096  # of which it is known what they lead to
MODULES: dict[str, tuple[str, str]] = {"image": ("PIL", "Pillow"), "video": ("av", "PyAV")}
Stage = Literal["read", "decode", "prepare"]
Result = Literal["hit", "made", "refused"]

Known = tuple[Kind, bytes, bool]  # by what a medium is known: its kind, its content, and whether it is coarse

T = TypeVar("T")


class Figures(Protocol):
    """Who counts: images and videos by how they ended, the bytes and pixels of those that were no hits, and seconds."""

    def ended(self, result: Result, /) -> None: ...
    def took(self, stage: Stage, seconds: float, /) -> None: ...
    def read(self, size: int, /) -> None: ...
    def decoded(self, pixels: int, /) -> None: ...


class Nobody:
    """Counts nothing."""

    def ended(self, result: Result) -> None: ...
    def took(self, stage: Stage, seconds: float) -> None: ...
    def read(self, size: int) -> None: ...
    def decoded(self, pixels: int) -> None: ...


class Flight(Generic[T]):
    """Something that one asker does and others wait for."""

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.value: T | None = None
        self.error: RequestError | None = None


class Once(Generic[T]):
    """Does one thing for all who ask for it while it is being done."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight[T]] = {}

    async def __call__(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """What `make` gives for `key`, or its RequestError, of which each asker has a copy."""
        while (flight := self._flights.get(key)) is not None:
            await flight.over.wait()
            if flight.error is not None:
                raise copied(flight.error)
            if flight.value is not None:
                return flight.value
        self._flights[key] = flight = Flight()
        try:
            flight.value = value = await make()
            return value
        except RequestError as error:
            flight.error = copied(error)
            raise
        finally:
            del self._flights[key]
            flight.over.set()


def copied(error: RequestError, place: str = "") -> RequestError:
    """`error` without where it came from; at `place`, which its message goes on from, if one is given."""
    message = f"{place} {error.message}" if place else error.message
    return RequestError(message, param=place or error.param, code=error.code, status=error.status)


class MediaStore:
    """Gets and keeps media; `ask` decodes one. Raises ConfigError for options that cannot work."""

    def __init__(self, options: MediaOptions, ask: Callable[[DecodeMedia], Awaitable[MediaReady]]) -> None:
        self.figures: Figures = Nobody()
        self.kept = self.open = 0  # bytes: of what is kept for requests to come, and of what open ones show
        self._installed: set[Kind] = set()  # what can be decoded
        self._options = options
        self._ask = ask
        self._sources = Sources(options)
        self._reading = asyncio.Semaphore(READ_AT_ONCE)
        self._read_once: Once[tuple[bytes, bytes]] = Once()
        self._made_once: Once[Prepared] = Once()
        self._prepared: OrderedDict[Known, Prepared] = OrderedDict()  # the last one asked for is the last
        self._open: dict[Hashable, dict[bytes, int]] = {}  # by rid, or by who gathers its own: digests and bytes
        self._uses: Counter[bytes] = Counter()  # of open requests, by digest
        self._urls: OrderedDict[tuple[Kind, str], tuple[bytes, float]] = OrderedDict()  # content, and until when

    async def resolved(self, media: Sequence[Image | Video]) -> tuple[Prepared, ...]:
        """What the model reads of each of `media`. Raises RequestError, with the place of the part that is at fault, or
        as `hold` does: what has come counts while the rest is waited for."""
        if len(media) > (most := self._options.media_items):
            raise RequestError(
                "{messages} has {count} images and videos, and at most {most} are taken (--media-items); send fewer",
                param="messages",
                code="too_many_media",
                facts={"count": len(media), "most": most},
            )
        sizes: dict[bytes, int] = {}  # by digest: each slice travels once, however often the request shows it
        waiting = object()

        async def one(part: Image | Video) -> Prepared:
            prepared = await self._one(part)
            sizes.update((each.digest, len(each.payload)) for each in slices_of(prepared))
            check_together(sum(sizes.values()), len(media))
            self._count(waiting, prepared)
            return prepared

        try:
            return tuple(await together(one, media, READ_OF_ONE))
        finally:
            self.release(waiting)

    def hold(self, rid: str, prepared: Sequence[Prepared]) -> None:
        """Count what the request `rid` shows until `release`: the scheduler and the device hold it as long.

        Raises RequestError (503) where open requests show too much."""
        try:
            for each in prepared:
                self._count(rid, each)
        except RequestError:
            self.release(rid)
            raise

    def _count(self, holder: Hashable, medium: Prepared) -> None:
        """`holder` shows that as well, or is going to. Raises RequestError where that is too much, unless nobody else
        shows anything: then it could never run."""
        own = self._open.setdefault(holder, {})
        sizes = {each.digest: len(each.payload) for each in slices_of(medium) if each.digest not in own}
        new = sum([size for digest, size in sizes.items() if digest not in self._uses])
        if new and len(self._uses) > len(own) and self.open + new > (most := self._options.media_open_memory):
            raise RequestError(
                f"open requests show images and videos of {self.open} bytes, this one has {new} more, and {most} is "
                "the limit (--media-open-memory); try again in a moment",
                code="queue_full",
                status=503,
            )
        self.open += new
        self._uses.update(sizes.keys())
        own |= sizes

    def release(self, holder: Hashable) -> None:
        """The request `holder` has ended, if it held anything."""
        for digest, size in self._open.pop(holder, {}).items():
            self._uses[digest] -= 1
            if not self._uses[digest]:
                del self._uses[digest]
                self.open -= size

    async def _one(self, part: Image | Video) -> Prepared:
        kind: Kind = "image" if isinstance(part, Image) else "video"
        try:
            if kind not in self._installed:
                check_library(kind)
                self._installed.add(kind)
            return await self._get(part.source, kind, part.coarse)
        except RequestError as error:
            self.figures.ended("refused")
            raise copied(error, part.place or f"the {kind}") from None

    async def _get(self, source: str, kind: Kind, coarse: bool) -> Prepared:
        if not source.startswith("data:"):  # which is looked up by its content alone: to hash a long text takes time
            content, until = self._urls.get((kind, source), (b"", 0.0))
            if until > time.monotonic() and (kept := self._here((kind, content, coarse))) is not None:
                return kept
        data, content = await self._read(source, kind)
        key = kind, content, coarse
        if (kept := self._here(key)) is not None:
            return kept
        by_us = False

        async def make() -> Prepared:
            nonlocal by_us
            by_us = True
            return await self._make(key, data)

        prepared = await self._made_once(key, make)
        self.figures.ended("made" if by_us else "hit")
        return prepared

    def _here(self, key: Known) -> Prepared | None:
        """What is kept of that content."""
        if (found := self._prepared.get(key)) is not None:
            self._prepared.move_to_end(key)
            self.figures.ended("hit")
        return found

    async def _read(self, source: str, kind: Kind) -> tuple[bytes, bytes]:
        """The bytes at `source`, and their SHA-256."""

        async def read() -> tuple[bytes, bytes]:
            async with self._reading:
                began = time.perf_counter()
                data, fresh = await self._sources.read(source, kind)
            self.figures.took("read", time.perf_counter() - began)
            self.figures.read(len(data))
            hashed = hashlib.sha256
            content = (await anyio.to_thread.run_sync(hashed, data) if len(data) > LARGE else hashed(data)).digest()
            if fresh:
                self._urls[kind, source] = content, time.monotonic() + fresh
                self._urls.move_to_end((kind, source))
                if len(self._urls) > MOST_URLS:
                    self._urls.popitem(last=False)
            return data, content

        return await (read() if source.startswith("data:") else self._read_once((kind, source), read))

    async def _make(self, key: Known, data: bytes) -> Prepared:
        kind, content, coarse = key
        ready = await self._ask(DecodeMedia(kind, content, data, coarse))
        self.figures.took("decode", ready.decode_seconds)
        self.figures.took("prepare", ready.prepare_seconds)
        self.figures.decoded(ready.pixels)
        self._keep(key, ready.prepared)
        return ready.prepared

    def _keep(self, key: Known, prepared: Prepared) -> None:
        self._prepared[key] = prepared
        self.kept += size_of(prepared) + BESIDE
        while self.kept > self._options.media_memory and self._prepared:
            _, gone = self._prepared.popitem(last=False)
            self.kept -= size_of(gone) + BESIDE


@asynccontextmanager
async def showing(
    store: MediaStore | None, rid: str, messages: Sequence[Message]
) -> AsyncIterator[tuple[list[Message], tuple[Prepared, ...]]]:
    """`messages` without the bytes of their media, and what the model reads of these. Until the end they count as shown
    by the request `rid`, which stands for several. Raises RequestError as `resolved` and `hold` do; where there is no
    `store`, whoever renders the messages refuses them."""
    media = media_of(messages)
    if store is None or not media:
        yield list(messages), ()
        return
    prepared = await store.resolved(media)
    store.hold(rid, prepared)
    try:
        yield [without_sources(message) for message in messages], prepared
    finally:
        store.release(rid)


def check_together(size: int, count: int) -> None:
    """Raises RequestError where `size` bytes, which some or all of the `count` media of one request have, are more than
    can be sent to the device together."""
    if size > MOST_PAYLOAD:
        raise RequestError(
            "{messages} has {media} of at least {size} bytes as the model reads them, and at most {most} are taken; "
            "send fewer, or smaller ones",
            param="messages",
            code="media_too_large",
            facts={
                "media": counted(count, "image or video", "images and videos"),
                "size": size,
                "most": MOST_PAYLOAD,
            },
        )


def check_library(kind: Kind) -> None:
    """Raises RequestError where what decodes media of that kind is not installed."""
    module, name = MODULES[kind]
    if importlib.util.find_spec(module) is None:
        raise RequestError(
            f"needs {name} to be decoded, which this server has not; its operator can pip install 'actorserve[media]'",
            code="no_media_library",
        )
