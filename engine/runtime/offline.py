"""The offline API: the same actors inside a program of yours, without HTTP.

    with Engine(model="smollm2-135m") as engine:
        print(engine.generate("1, 2, 3,", SamplingParams(temperature=0, max_tokens=20)).text)

A prompt is a string (completed as it is), a list of token ids, or a list of chat messages
(`{"role": ..., "content": ...}`, rendered by the model's chat template); `generate` takes one or a list of them.
With a model that makes vectors, `embed` takes a list of strings or token ids. `AsyncEngine` is the same for a program
that has an event loop; `Engine` runs one in a thread.
"""

import asyncio
import uuid
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

import anyio
import anyio.from_thread
from anyio.from_thread import BlockingPortal
from msgspec import Struct

from engine.config import Config, resolve
from engine.conversation.parts import read_messages
from engine.errors import ConfigError, EngineError, RequestError, Words, counted
from engine.messages.control import Stats
from engine.messages.reply import Chunk, TokenLogprob
from engine.messages.request import Embed, Generate
from engine.params.sampling import SamplingParams, check_sampling
from engine.runtime.front import Front, joined
from engine.runtime.launch import open_front
from engine.runtime.together import together

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
Params = SamplingParams | Sequence[SamplingParams] | None
Result = TypeVar("Result")


class Reply(Struct, frozen=True):
    """A whole reply. `ids` includes the token that stopped it, `text` does not; `matched` is what stopped it.

    `logprobs` go with `ids`, `prompt_logprobs` with the prompt's tokens, where SamplingParams ask for them."""

    text: str
    ids: list[int]
    finish: Literal["stop", "length", "abort"]
    matched: int | str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


def is_batch(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is several prompts: a sequence of anything but ids and chat messages."""
    return not isinstance(prompt, str) and not (prompt and isinstance(prompt[0], int | dict))


def to_request(prompt: Prompt, params: SamplingParams | None, priority: int = 0, cache_salt: str = "") -> Generate:
    """Raises RequestError for parameters out of range, and for malformed messages."""
    params = params or SamplingParams()
    check_sampling(params)
    if not isinstance(priority, int) or not -(1 << 31) <= priority < 1 << 31:
        raise RequestError(f"priority is {priority!r}; send a 32-bit integer", param="priority")
    rid = uuid.uuid4().hex
    if isinstance(prompt, str):
        return Generate(rid, params, text=prompt, priority=priority, cache_salt=cache_salt)
    items: list[Any] = list(prompt)
    if items and isinstance(items[0], dict):
        return Generate(rid, params, messages=read_messages(items), priority=priority, cache_salt=cache_salt)
    return Generate(rid, params, ids=packed(items), priority=priority, cache_salt=cache_salt)


def packed(ids: Sequence[Any]) -> bytes:
    """Token ids as int32. Raises RequestError for what is none."""
    try:
        return array("i", ids).tobytes()
    except (TypeError, OverflowError) as error:
        message = f"a prompt is text, int32 token ids or chat messages, not {ids!r:.80} ({error})"
        raise RequestError(message, param="prompt") from None


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Tell errors as those of the prompt or the input at `place`, which is empty where there is one."""
    try:
        yield
    except RequestError as error:
        raise error.worded(Words().at(place, "prompt", "input") if place else Words()) from None


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
        self.loop: asyncio.AbstractEventLoop | None = None  # that it lives in, once it was opened

    @property
    def front(self) -> Front:
        if self._front is None:
            raise RuntimeError("the engine is not running; use it as a context manager")
        return self._front

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages may be sent."""
        return self.front.text is not None and self.front.text.has_template

    async def __aenter__(self) -> Self:
        self.loop = asyncio.get_running_loop()
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
    async def generate(
        self, prompt: str, params: SamplingParams | None = ..., *, priority: int = ..., cache_salt: str = ...
    ) -> Reply: ...
    @overload
    async def generate(
        self, prompt: Any, params: Params = ..., *, priority: int = ..., cache_salt: str = ...
    ) -> Any: ...
    async def generate(self, prompt: Any, params: Params = None, *, priority: int = 0, cache_salt: str = "") -> Any:
        """The `Reply` to one prompt, or the list of them to a list of prompts, computed together.

        Several prompts have one SamplingParams, or a list of as many. Prompts of different salts share no cached
        prefix. Raises RequestError when a prompt is refused and WorkerError when the device fails.
        """
        batch = is_batch(prompt)
        prompts = prompt if batch else [prompt]
        each = params if isinstance(params, list | tuple) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(
                f"{counted(len(prompts), 'prompt')} and {len(each)} SamplingParams; give one for each, or one"
            )
        places = [f"prompt[{index}]" for index in range(len(prompts))] if batch else [""]
        requests = []
        for place, given, own in zip(places, prompts, each, strict=True):
            with naming(place):
                requests.append((place, to_request(given, own, priority, cache_salt)))

        async def one(asked: tuple[str, Generate]) -> Reply:
            with naming(asked[0]):
                return await self._whole(asked[1])

        replies = await together(one, requests)
        return replies if batch else replies[0]

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> list[list[float]]:
        """The vector of each of `inputs`, in order, computed together.

        Raises RequestError when one is refused, WorkerError when the device fails."""

        if isinstance(inputs, str):
            raise RequestError("embed takes a list of inputs, not one string; put it into a list", param="input")

        async def one(numbered: tuple[int, str | Sequence[int]]) -> list[float]:
            index, given = numbered
            with naming(f"input[{index}]"):
                text, ids = (given, None) if isinstance(given, str) else (None, packed(given))
                (chunk,) = [chunk async for chunk in self.front.generate(Embed(uuid.uuid4().hex, text, ids))]
            if chunk.finish == "abort":
                raise RequestError("the request was aborted; send it again", code="aborted", status=409)
            return array("f", chunk.vector).tolist()

        return await together(one, list(enumerate(inputs)))

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0, cache_salt: str = ""
    ) -> AsyncGenerator[Chunk, None]:
        """The reply as it comes; closing the generator aborts the request."""
        stream = self.front.generate(to_request(prompt, params, priority, cache_salt))
        try:
            async for chunk in stream:
                yield chunk
        finally:
            await stream.aclose()

    async def _whole(self, request: Generate) -> Reply:
        reply = joined([chunk async for chunk in self.front.generate(request)])
        assert reply.finish is not None
        return Reply(
            reply.text,
            reply.ids,
            reply.finish,
            reply.matched,
            reply.prompt_tokens,
            reply.cached_tokens,
            reply.completion_tokens,
            reply.logprobs,
            reply.prompt_logprobs,
        )


class Engine:
    """An engine for a program without an event loop; use it as a context manager, or call `close`.

    It lives in a thread with an event loop of its own; its methods may be called from any thread.
    """

    def __init__(self, config: Config | None = None, **options: Any) -> None:
        """Starts at once and returns when the device is ready. Raises ConfigError, PluginError, WorkerError."""
        self._engine = AsyncEngine(config, **options)
        self._stack = ExitStack()
        loop = anyio.from_thread.start_blocking_portal("asyncio", {"use_uvloop": True})
        self._portal: BlockingPortal = self._stack.enter_context(loop)
        ready: Future[None] = Future()
        self._life = self._portal.start_task_soon(self._live, ready)
        try:
            ready.result()
        except BaseException:  # a Ctrl-C too
            self.close()
            raise

    async def _live(self, ready: "Future[None]") -> None:
        try:
            async with self._engine:
                ready.set_result(None)
                await anyio.sleep_forever()
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine; open requests end with a WorkerError."""
        self._life.cancel()
        self._stack.close()

    @property
    def inner(self) -> AsyncEngine:
        """The engine in its event loop, for what runs there: see `portal`."""
        return self._engine

    @property
    def portal(self) -> BlockingPortal:
        """The way into its event loop."""
        return self._portal

    def stats(self) -> Stats:
        """The scheduler's latest figures; at most a second old."""
        return self._engine.front.stats

    @overload
    def generate(self, prompt: str, params: SamplingParams | None = ...) -> Reply: ...
    @overload
    def generate(self, prompt: str, params: SamplingParams | None = ..., **options: Any) -> Reply: ...
    @overload
    def generate(self, prompt: Any, params: Params = ..., **options: Any) -> Any: ...
    def generate(self, prompt: Any, params: Params = None, **options: Any) -> Any:
        """As AsyncEngine.generate."""
        return self._wait_for(partial(self._engine.generate, prompt, params, **options))

    def embed(self, inputs: Sequence[str | Sequence[int]]) -> list[list[float]]:
        """As AsyncEngine.embed."""
        return self._wait_for(partial(self._engine.embed, inputs))

    def _wait_for(self, use: Callable[[], Awaitable[Result]]) -> Result:
        answer = self._portal.start_task_soon(use)
        try:
            return answer.result()
        except BaseException:
            answer.cancel()
            raise

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Iterator[Chunk]:
        """As AsyncEngine.stream; closing the iterator aborts the request."""
        arrived: SimpleQueue[Chunk | BaseException | None] = SimpleQueue()

        async def pump() -> None:
            end: BaseException | None = None
            try:
                async for chunk in self._engine.stream(prompt, params, **options):
                    arrived.put(chunk)
            except EngineError as error:
                end = error
            finally:
                arrived.put(end)

        pumping = self._portal.start_task_soon(pump)
        try:
            while (chunk := arrived.get()) is not None:
                if isinstance(chunk, BaseException):
                    raise chunk
                yield chunk
        finally:
            pumping.cancel()
