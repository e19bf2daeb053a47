"""One run of a program: the tasks of its states, its deadline, what it used, and its end.

All calls of the model are tasks of one task group, which ends with the run. So nothing outlives it: when it is
cancelled, its open requests are closed. A program that is a coroutine function runs as a task too. Another runs in a
thread, because it waits where it reads a value. Left out: what a state does (state.py).
"""

import asyncio
import contextvars
import inspect
import math
import threading
import uuid
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from engine.errors import ProgramError
from engine.lang.backend import Backend
from engine.lang.transcript import Prompt
from engine.lang.turns import Turn
from engine.lang.values import Usage
from engine.runtime.actor import first_failure

Body = Callable[[], Any]


class Run:
    """A run on `backend`; `defaults` are sampling fields of each gen. It lives in one event loop. `followed` says that
    somebody outside of the program reads replies as they come. One of a batch waits for its `turn` at its first call,
    and its timeout begins there."""

    def __init__(
        self,
        backend: Backend,
        defaults: Mapping[str, Any],
        timeout: float | None,
        *,
        followed: bool = False,
        turn: Turn | None = None,
    ) -> None:
        self.backend = backend
        self.program = uuid.uuid4().hex  # by which the backend knows that calls belong together
        self.followed = followed
        self._turn = turn  # of a batch
        self.defaults = defaults
        self.usage = Usage()
        self.ended: BaseException | None = None  # why nothing more is done
        self.task: asyncio.Task[None] | None = None  # of a run that nobody waits for
        self.fail: Callable[[BaseException], None] | None = None  # is told, before readers, why such a run failed
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()  # that of the event loop, for what threads begin in it
        self._thread = threading.get_ident()
        self._group = anyio.create_task_group()
        self._at_end: list[Callable[[BaseException], None]] = []

    @property
    def here(self) -> bool:
        """Whether the caller is in the run's event loop, where nobody may wait."""
        return threading.get_ident() == self._thread

    def on_end(self, tell: Callable[[BaseException], None]) -> None:
        """Call `tell` at the end, with why there is no more."""
        self._at_end.append(tell)
        if self.ended is not None:
            tell(self.ended)

    def start(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin a task of the run. In the event loop."""
        self._group.start_soon(work)

    def call(self, use: Callable[[], None]) -> None:
        """Do `use` in the event loop, at once where that is here."""
        if self.here:
            use()
        else:
            self._loop.call_soon_threadsafe(self._do, use, context=self._context)

    def _do(self, use: Callable[[], None]) -> None:
        """Do `use` in a task: outside of tasks anyio may not know whose event loop it is in."""

        async def do() -> None:
            use()

        self._loop.create_task(do())

    async def comes(self, prompt: Prompt) -> None:
        """Returns when the call with `prompt` may be made."""
        if self._turn is not None:
            await self._turn.come(prompt, self._held)

    def _held(self, waiting: bool) -> None:
        if self._timeout is not None:
            later = math.inf if waiting else anyio.current_time() + self._timeout
            self._group.cancel_scope.deadline = later

    async def live(self, body: Body) -> None:
        """Run `body`, the program with its arguments, and whatever it has begun, to their end.

        Raises what the program raises, and ProgramError at the deadline."""
        failed: list[BaseException] = []
        whole = False
        why: BaseException = ProgramError("the run was cancelled")
        try:
            async with self._group as group:
                if self._timeout is not None:
                    group.cancel_scope.deadline = anyio.current_time() + self._timeout
                try:
                    await self._perform(body)
                except Exception as error:
                    failed.append(error)
                    group.cancel_scope.cancel()
            if failed:
                why = failed[0]
                raise why
            if self._timeout is not None and group.cancel_scope.cancelled_caught:
                why = ProgramError(f"the program took longer than its timeout of {self._timeout:g} s; raise it")
                raise why
            why, whole = ProgramError("the run has ended; a program appends to its state while it runs"), True
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None
        finally:
            self.ended = why
            if self.fail is not None and not whole:
                self.fail(why)
            if self._turn is not None:
                self._turn.end()
            with anyio.CancelScope(shield=True):
                await self.backend.end(self.program)
            for tell in self._at_end:
                tell(why)

    async def _perform(self, body: Body) -> None:
        call: Any = body.func if isinstance(body, partial) else body
        if inspect.iscoroutinefunction(call):
            await body()
            return
        await anyio.to_thread.run_sync(body, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
