"""The offline API: the same actors inside a program of yours, without HTTP.

    with Engine(model="smollm2-135m") as engine:
        print(engine.generate("1, 2, 3,", SamplingParams(temperature=0, max_tokens=20)).text)

A prompt is a string (completed as it is), a list of token ids, or a list of chat messages
(`{"role": ..., "content": ...}`, rendered by the model's chat template); `generate` takes one or a list of them.
`AsyncEngine` is the same for a program that has an event loop; `Engine` runs one in a thread.
"""

import uuid
from array import array
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from types import TracebackType
from typing import Any, Literal, Self, overload

import anyio
import anyio.from_thread
from anyio.from_thread import BlockingPortal
from msgspec import Struct

from engine.actor import first_failure
from engine.config import Config, resolve
from engine.errors import ConfigError, RequestError
from engine.front import Front
from engine.launch import open_front
from engine.messages import Chunk, Generate, SamplingParams, Stats
from engine.sampling import check_sampling

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


class Reply(Struct, frozen=True):
    """A whole reply. `ids` includes the token that stopped it, `text` does not; `matched` is what stopped it."""

    text: str
    ids: list[int]
    finish: Literal["stop", "length", "abort"]
    matched: int | str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


def is_batch(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is several prompts: a sequence of anything but ids and chat messages."""
    return not isinstance(prompt, str) and not (prompt and isinstance(prompt[0], int | dict))


def to_request(prompt: Prompt, params: SamplingParams | None, priority: int = 0) -> Generate:
    """Raises RequestError for parameters out of range."""
    params = params or SamplingParams()
    check_sampling(params)
    rid = uuid.uuid4().hex
    if isinstance(prompt, str):
        return Generate(rid, params, text=prompt, priority=priority)
    items: list[Any] = list(prompt)
    if items and isinstance(items[0], dict):
        return Generate(rid, params, messages=items, priority=priority)
    try:
        return Generate(rid, params, ids=array("i", items).tobytes(), priority=priority)
    except (TypeError, OverflowError) as error:
        message = f"a prompt is text, int32 token ids or chat messages, not {items!r:.80} ({error})"
        raise RequestError(message, param="prompt") from None


class AsyncEngine:
    """An engine in the running event loop (asyncio); use it as an async context manager.

    Options are those of the command line by their field names (`engine.config`), or a whole `config`.
    """

    def __init__(self, config: Config | None = None, **options: Any) -> None:
        """Raises ConfigError for an unknown option or a value out of bounds."""
        if config is not None and options:
            raise ConfigError("give the engine a whole Config or single options, not both")
        self.config = config or resolve(options)
        self._context: AbstractAsyncContextManager[Front] | None = None
        self._front: Front | None = None

    @property
    def front(self) -> Front:
        if self._front is None:
            raise RuntimeError("the engine is not running; use it as a context manager")
        return self._front

    async def __aenter__(self) -> Self:
        self._context = open_front(self.config)
        self._front = await self._context.__aenter__()
        try:
            await self._front.ready()
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        context, self._context, self._front = self._context, None, None
        if context is not None:
            await context.__aexit__(kind, error, trace)

    @overload
    async def generate(self, prompt: str, params: SamplingParams | None = ...) -> Reply: ...
    @overload
    async def generate(self, prompt: Any, params: SamplingParams | None = ...) -> Any: ...
    async def generate(self, prompt: Any, params: SamplingParams | None = None) -> Any:
        """The `Reply` to one prompt, or the list of them to a list of prompts, computed together.

        Raises RequestError when a prompt is refused and WorkerError when the device fails.
        """
        if not is_batch(prompt):
            return await self._whole(prompt, params)
        replies: list[Reply | None] = [None] * len(prompt)

        async def one(index: int) -> None:
            replies[index] = await self._whole(prompt[index], params)

        try:
            async with anyio.create_task_group() as group:
                for index in range(len(prompt)):
                    group.start_soon(one, index)
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None
        return replies

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncGenerator[Chunk, None]:
        """The reply as it comes; closing the generator aborts the request."""
        stream = self.front.generate(to_request(prompt, params, priority))
        try:
            async for chunk in stream:
                yield chunk
        finally:
            await stream.aclose()

    async def _whole(self, prompt: Prompt, params: SamplingParams | None) -> Reply:
        text: list[str] = []
        ids: list[int] = []
        async for chunk in self.front.generate(to_request(prompt, params)):
            text.append(chunk.text)
            ids += chunk.ids
        assert chunk.finish is not None
        return Reply(
            "".join(text),
            ids,
            chunk.finish,
            chunk.matched,
            chunk.prompt_tokens,
            chunk.cached_tokens,
            chunk.completion_tokens,
        )


class Engine:
    """An engine for a program without an event loop; use it as a context manager, or call `close`."""

    def __init__(self, config: Config | None = None, **options: Any) -> None:
        """Starts at once and returns when the device is ready. Raises ConfigError, PluginError, WorkerError."""
        self._engine = AsyncEngine(config, **options)
        self._stack = ExitStack()
        try:
            self._portal: BlockingPortal = self._stack.enter_context(
                anyio.from_thread.start_blocking_portal("asyncio", {"use_uvloop": True})
            )
            self._stack.enter_context(self._portal.wrap_async_context_manager(self._engine))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine; open requests are dropped."""
        self._stack.close()

    def stats(self) -> Stats:
        """The scheduler's latest figures; at most a second old."""
        return self._engine.front.stats

    @overload
    def generate(self, prompt: str, params: SamplingParams | None = ...) -> Reply: ...
    @overload
    def generate(self, prompt: Any, params: SamplingParams | None = ...) -> Any: ...
    def generate(self, prompt: Any, params: SamplingParams | None = None) -> Any:
        """As AsyncEngine.generate."""
        return self._portal.call(self._engine.generate, prompt, params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """The reply as it comes; closing the iterator aborts the request."""
        chunks = self._engine.stream(prompt, params)
        try:
            while (chunk := self._portal.call(_next, chunks)) is not None:
                yield chunk
        finally:
            self._portal.call(chunks.aclose)


async def _next(chunks: AsyncGenerator[Chunk, None]) -> Chunk | None:
    return await anext(chunks, None)
