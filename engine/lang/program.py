"""`@function`: a Python function whose first argument is a state, and the ways to run it.

    @function
    def answer(s, question):
        s += user(question) + assistant(gen("answer"))

    answer.run(question="Why?", backend=engine)["answer"]

One core is async: `run_async` lives in the event loop of its caller, `run` in that of its backend. A program that is a
coroutine function needs no thread; another has one while it runs. Left out: tracing a program before it runs.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar, overload

import anyio
from anyio.from_thread import BlockingPortal

from engine.errors import ConfigError, did_you_mean
from engine.lang.backend import Backend
from engine.lang.default import default_backend
from engine.lang.expressions import INSTEAD, KNOWN, SGLANG_NAMES, checked_fields
from engine.lang.forks import State
from engine.lang.local import Local
from engine.lang.run import Run
from engine.lang.turns import Turn, Turns
from engine.runtime.actor import first_failure
from engine.runtime.offline import AsyncEngine, Engine

CONCURRENCY = 96  # programs of a batch at once, as many as SGLang has threads on a small machine
TAKEN = {*KNOWN, *SGLANG_NAMES, *INSTEAD}  # or told what to say in its place
Result = TypeVar("Result")


def backend_of(given: Any) -> Backend:
    """`given`, an engine or a Backend, as what programs call. Raises ConfigError for anything else."""
    match given:
        case Backend():
            return given
        case Engine():
            return Local(given.inner, given.portal)
        case AsyncEngine():
            return Local(given)
        case None:
            return backend_of(default_backend())
    raise ConfigError(f"backend is {given!r:.80}; give an Engine, an AsyncEngine or a Server")


class Function:
    """A program. Called with a state it appends to that, else it runs; `run` and its kin make a state.

    Their keyword arguments are the program's own, then sampling fields for each gen that does not say them itself,
    `backend`, if it is not that of set_default_backend, and `timeout`, seconds for the whole run."""

    def __init__(self, program: Callable[..., Any], bound: Mapping[str, Any] | None = None) -> None:
        """Raises ConfigError for a program without a state."""
        self.__wrapped__ = program
        self.__doc__, self.__name__ = program.__doc__, program.__name__
        self._bound = dict(bound or {})
        self._names: list[str]
        first, *self._names = inspect.signature(program).parameters or ("",)
        if first != "s":
            raise ConfigError(f"the first argument of {self.__name__} is {first!r}; a program's is the state, s")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if arguments and isinstance(arguments[0], State):
            return self.__wrapped__(*arguments, **{**self._bound, **named})
        return self.run(*arguments, **named)

    def bind(self, **arguments: Any) -> "Function":
        """The program with these arguments given."""
        return Function(self.__wrapped__, {**self._bound, **arguments})

    # ── one run ──────────────────────────────────────────────────────────────────────────────

    async def run_async(self, *arguments: Any, backend: Any = None, **named: Any) -> State:
        """The state at the end of the program and of all calls that it began, in the running event loop.

        Raises what the program raises, and ProgramError at the deadline; a value that did not come raises where it is
        read. Cancelling ends all open calls."""
        run, state, body = self._prepared(backend_of(backend), arguments, named)
        await run.live(body)
        return state

    def run(self, *arguments: Any, backend: Any = None, stream: bool = False, **named: Any) -> State:
        """As `run_async`, for a program without an event loop. With `stream` it returns at once, as SGLang's does: the
        state while the program runs, and nothing ends that earlier."""
        found = backend_of(backend)
        if stream:
            return loop_of(found).call(partial(self._begun, found, arguments, named))
        return waited(loop_of(found), partial(self.run_async, *arguments, backend=found, **named))

    async def _begun(self, backend: Backend, arguments: Sequence[Any], named: Mapping[str, Any]) -> State:
        """The state of a run that goes on alone, and keeps its failure."""
        run, state, body = self._prepared(backend, arguments, named, followed=True)
        run.fail = state.fail
        run.task = asyncio.create_task(self._lived(run, state, body))
        return state

    @asynccontextmanager
    async def stream_async(self, *arguments: Any, backend: Any = None, **named: Any) -> AsyncIterator[State]:
        """`async with program.stream_async(...) as s`: the state while the program runs, for `s.text_async_iter()`.
        Leaving the block cancels what is left of it."""
        run, state, body = self._prepared(backend_of(backend), arguments, named, followed=True)
        task = asyncio.create_task(run.live(body))
        try:
            yield state
        finally:
            task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    @contextmanager
    def stream(self, *arguments: Any, backend: Any = None, **named: Any) -> Iterator[State]:
        """As `stream_async`, for a program without an event loop: `s.text_iter()`."""
        found = backend_of(backend)
        opened = self.stream_async(*arguments, backend=found, **named)
        with loop_of(found).wrap_async_context_manager(opened) as state:
            yield state

    def _prepared(
        self, backend: Backend, arguments: Sequence[Any], named: Mapping[str, Any], **more: Any
    ) -> tuple[Run, State, Callable[[], Any]]:
        if backend.loop not in (None, asyncio.get_running_loop()):
            raise ConfigError(
                "this backend lives in another event loop; call run, run_batch or stream in a thread, or open an "
                "AsyncEngine or a Server with async with where the program is awaited"
            )
        timeout: float | None = None if "timeout" in self._names else named.get("timeout")
        own = {name: value for name, value in named.items() if name in self._names}
        asked = {name: value for name, value in named.items() if name not in (*self._names, "timeout")}
        if wrong := [name for name in asked if name not in TAKEN]:
            hint = did_you_mean(wrong[0], {*self._names, *KNOWN})
            raise ConfigError(f"{self.__name__} has no argument {wrong[0]!r}{hint}, nor has gen such a field")
        run = Run(backend, checked_fields(asked), timeout, **more)
        state = State(run)
        return run, state, partial(self.__wrapped__, state, *arguments, **{**self._bound, **own})

    # ── many ─────────────────────────────────────────────────────────────────────────────────

    async def run_batch_async(
        self,
        batch: Sequence[Mapping[str, Any]],
        *,
        backend: Any = None,
        concurrency: int = CONCURRENCY,
        progress: bool = False,
        num_threads: int | Literal["auto"] = "auto",
        progress_bar: bool = False,
        **named: Any,
    ) -> list[State]:
        """A state for each of `batch`, which are arguments; at most `concurrency` programs run at once.

        Those whose first prompts begin alike run one after the other, so that the cache still holds what they share.
        For this, as many programs more are begun, as far as their first call. A program that fails does not end the
        others: its state raises where it is read. `num_threads` and `progress_bar` are SGLang's names of the two."""
        concurrency = concurrency if num_threads == "auto" else num_threads
        if concurrency < 1:
            raise ConfigError(f"concurrency is {concurrency}; it must be 1 or more")
        found, order, begun = backend_of(backend), iter(shared_first(batch)), min(2 * concurrency, len(batch))
        turns = Turns(concurrency, begun)
        made: list[Any] = [None] * len(batch)

        async def work(advance: Callable[[], None]) -> None:
            for index in order:
                made[index] = await self._kept(found, {**named, **batch[index]}, turns.begin())
                advance()

        try:
            with counting(self.__name__, len(batch), shown=progress or progress_bar) as advance:
                async with anyio.create_task_group() as group:
                    for _ in range(begun):
                        group.start_soon(work, advance)
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None
        return made

    async def _kept(self, backend: Backend, named: dict[str, Any], turn: Turn) -> State:
        """The state of a run, whose failure it keeps."""
        run, state, body = self._prepared(backend, (), named, turn=turn)
        await self._lived(run, state, body)
        return state

    async def _lived(self, run: Run, state: State, body: Callable[[], Any]) -> None:
        try:
            await run.live(body)
        except Exception as error:
            state.fail(error)

    def run_batch(self, batch: Sequence[Mapping[str, Any]], *, backend: Any = None, **options: Any) -> list[State]:
        """As `run_batch_async`, for a program without an event loop."""
        found = backend_of(backend)
        return waited(loop_of(found), partial(self.run_batch_async, batch, backend=found, **options))


@overload
def function(program: Callable[..., Any]) -> Function: ...
@overload
def function(program: None = None, *, num_api_spec_tokens: int | None = None) -> Callable[..., Function]: ...
def function(program: Callable[..., Any] | None = None, *, num_api_spec_tokens: int | None = None) -> Any:
    """Makes a program of a function, or of a coroutine function, whose first argument is `s`: `@function`, and
    `@function()` with parentheses. `num_api_spec_tokens`, by which SGLang saves calls to paid APIs, changes nothing."""
    return Function if program is None else Function(program)


def shared_first(batch: Sequence[Mapping[str, Any]]) -> list[int]:
    """An order in which arguments that many share stand together: sorted by the argument with the fewest values, then
    by the next."""
    names = list(dict.fromkeys(name for each in batch for name in each))
    written = [{name: repr(each.get(name)) for name in names} for each in batch]
    names.sort(key=lambda name: len({each[name] for each in written}))
    return sorted(range(len(batch)), key=lambda index: [written[index][name] for name in names])


@contextmanager
def counting(name: str, total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """Counts what is done, in the terminal if `shown`."""
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress  # only where one is wanted

    with Progress() as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)


# ── the event loop of a backend ──────────────────────────────────────────────────────────────


def loop_of(backend: Backend) -> BlockingPortal:
    """Where a backend lives that a program without an event loop may use. Raises ConfigError for another."""
    if (portal := backend.portal) is None:
        raise ConfigError("this backend lives in a running event loop; await run_async, run_batch_async, stream_async")
    return portal


def waited(portal: BlockingPortal, use: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """What `use` makes in that event loop; it is cancelled where the caller is interrupted."""
    future = portal.start_task_soon(use)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
