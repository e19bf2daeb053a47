"""A state: what a program has said, its variables, and what it has still to do.

    s += "text" + gen("a")  ──>  steps, in order  ──>  one task: says text, calls the model, sets variables
    s["a"]                  <──  waits for that variable alone

Appending returns at once, so a program goes on until it reads a value that has not come, and forks run at once. A step
that fails ends the state: its variables, and those of steps behind it, raise the error where they are read, with the
line of the program that made the step. Left out: the group of forks (forks.py).
"""

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from typing import Any, Literal, Self, TypeVar, overload

import anyio.to_thread
from msgspec import Struct

from engine.errors import ProgramError, did_you_mean
from engine.lang.calls import Replies, chosen, decided, generated, with_tools
from engine.lang.expressions import Appended, Decide, Gen, Role, RoleBegin, RoleEnd, Select, Shown, several
from engine.lang.run import Run
from engine.lang.transcript import Prompt, Transcript
from engine.lang.values import NO_CALL, Feed, Meta, Usage, Variable

Value = TypeVar("Value")
REASONING = "_reasoning_content"
CALLS = "_calls"
OURS = ("engine.lang", "contextlib")  # modules whose lines are not the program's


class Step(Struct, frozen=True):
    """Something that a state does in its turn: an expression, or a function of ours. `place` is the program's line,
    `makes` the variables that will be set: the reply and its reasoning."""

    place: str
    what: Any
    makes: tuple[Variable, ...] = ()


class Sequential:
    """A program's state but for its forks. A fork is given its transcript later."""

    def __init__(
        self,
        run: Run,
        transcript: Future[Transcript] | None = None,
        variables: dict[str, Variable] | None = None,
    ) -> None:
        self._run = run
        self._transcript = Transcript()
        self._begins = transcript
        self._variables = dict(variables or {})
        self._own: list[Variable] = []
        self._reaching: set[Future[None]] = set()  # of those who wait for the steps so far
        self._steps: deque[Step] = deque()
        self._working = False
        self._failure: BaseException | None = None
        self._feed = Feed()
        self._expected: dict[str, Feed] = {}  # of variables that somebody follows, and nobody has made yet
        run.on_end(self._end)

    # ── appending ────────────────────────────────────────────────────────────────────────────

    def __iadd__(self, expression: Any) -> Self:
        """Append text, a gen, a select, roles, or a list of these. Raises TypeError for anything else."""
        place = line()
        for part in several(expression).parts:
            makes: tuple[Variable, ...] = ()
            if isinstance(part, Gen | Select | Decide) and part.name is not None:
                makes = (self._declare(part.name, place),)
                if isinstance(part, Gen) and part.separate:
                    makes += (self._declare(part.name + REASONING, place),)
                if isinstance(part, Gen) and part.tools:
                    makes += (self._declare(part.name + CALLS, place),)
            self._do(part, place, makes)
        return self

    def append(self, expression: Any) -> None:
        """As `s += expression`."""
        self += expression

    @contextmanager
    def _role(self, role: Role) -> Iterator[None]:
        self.append(RoleBegin(role))
        yield
        self.append(RoleEnd(role))

    def system(self, expression: Any = None) -> Any:
        """`with s.system(): ...` says what is appended inside as the system; with an expression, it appends that."""
        return self._as("system", expression)

    def user(self, expression: Any = None) -> Any:
        """As `system`, for the user."""
        return self._as("user", expression)

    def assistant(self, expression: Any = None) -> Any:
        """As `system`, for the assistant."""
        return self._as("assistant", expression)

    def _as(self, role: Role, expression: Any) -> Any:
        if expression is None:
            return self._role(role)
        self.append(several(RoleBegin(role), expression, RoleEnd(role)))
        return None

    @contextmanager
    def var_scope(self, name: str) -> Iterator[None]:
        """The variable `name` becomes the text that is appended inside; it fails where that does."""
        place, begins = line(), [0]
        variable = self._declare(name, place)

        def end() -> None:
            if self._failure is not None:
                raise self._failure
            variable.set(self._transcript.text[begins[0] :])

        self._do(lambda: begins.__setitem__(0, self._transcript.length), place)
        try:
            yield
        except Exception as error:
            failure = ProgramError(f"{place}: {error}")
            failure.__cause__ = error
            self._run.call(lambda: variable.fail(failure))
            raise
        self._do(end, place, (variable,))

    def set_var(self, name: str, value: Any) -> None:
        """The variable `name` is `value` from now on."""
        self._declare(name, line()).set(value)

    __setitem__ = set_var

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    def __getitem__(self, name: str) -> Any:
        """The variable `name`; waits for it, and for nothing else. Raises ProgramError where it will not come.

        In an event loop nobody may wait: `await s.get(name)` does."""
        variable = self._named(name)
        if not variable.value.done() and self._run.here:
            raise RuntimeError(f"{name!r} has not come yet, and to wait here stops all; write: await s.get({name!r})")
        return variable.value.result()

    get_var = __getitem__

    async def get(self, name: str) -> Any:
        """As s[name], for programs that are coroutines."""
        return await arrived(self._named(name).value)

    def __contains__(self, name: object) -> bool:
        return name in self._variables

    def get_meta_info(self, name: str, timeout: float | None = None) -> Meta:
        """What is known of the call that made `name`; an empty Meta where no call did. Raises TimeoutError."""
        variable = self._named(name)
        if not variable.value.done() and self._run.here:
            raise RuntimeError(f"{name!r} has not come yet; await s.get({name!r}) first")
        variable.value.result(timeout)
        return variable.meta

    def text(self) -> str:
        """All text, once every step is done. Raises ProgramError where one failed."""
        self.sync()
        return self._transcript.text

    def messages(self) -> list[dict[str, Any]]:
        """All messages in OpenAI's shape, once every step is done; none of a program without roles."""
        self.sync()
        return self._transcript.messages

    def sync(self) -> None:
        """Wait for every step. Raises ProgramError where one failed."""
        done = self._reached()
        if not done.done() and self._run.here:
            raise RuntimeError("steps are not done yet, and to wait here stops all; write: await s.synced()")
        done.result()
        if self._failure is not None:
            raise self._failure

    async def synced(self) -> None:
        """As `sync`, for programs that are coroutines."""
        await arrived(self._reached())
        if self._failure is not None:
            raise self._failure

    def error(self) -> BaseException | None:
        """What ended the state, once every step is done; None if nothing did."""
        try:
            self.sync()
        except RuntimeError:
            raise
        except Exception as error:
            return error
        return None

    @property
    def usage(self) -> Usage:
        """What the whole run has used so far, forks included."""
        return self._run.usage

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """The pieces of the text, or of the variable, as they come. Raises ProgramError behind the last."""
        if self._run.here:
            raise RuntimeError("to wait here stops all; write: async for piece in s.text_async_iter()")
        yield from self._followed(var_name)
        self._raise_failure(var_name)

    @overload
    def text_async_iter(self, var_name: str | None = None) -> AsyncIterator[str]: ...
    @overload
    def text_async_iter(self, var_name: str, return_meta_data: Literal[True]) -> AsyncIterator[tuple[str, Meta]]: ...
    async def text_async_iter(
        self, var_name: str | None = None, return_meta_data: bool = False
    ) -> AsyncIterator[str | tuple[str, Meta]]:
        """As `text_iter`, for programs that have an event loop, be it the state's or another.

        With `return_meta_data` the pieces of a variable come as (piece, Meta), which is empty while they come, and the
        last is ("", what is known of the call then). Raises ValueError for the whole text, which is of any calls."""
        if return_meta_data and var_name is None:
            raise ValueError("return_meta_data is of the call that makes a variable; name it: var_name=...")
        async for piece in self._pieces(var_name):
            yield (piece, NO_CALL) if return_meta_data else piece
        if return_meta_data and var_name is not None:
            yield "", self._variables[var_name].meta

    async def _pieces(self, var_name: str | None) -> AsyncIterator[str]:
        """Those of `text_async_iter`. Raises ProgramError behind the last."""
        if not self._run.here:
            pieces = self.text_iter(var_name)
            while (piece := await anyio.to_thread.run_sync(next, pieces, None, abandon_on_cancel=True)) is not None:
                yield piece
            return
        async for piece in self._followed(var_name):
            yield piece
        self._raise_failure(var_name)

    def _followed(self, name: str | None) -> Feed:
        if name is None:
            return self._feed
        if name in self._variables:
            return self._variables[name].feed
        feed = self._expected.setdefault(name, Feed())
        if self._run.ended is not None:
            feed.end()
        return feed

    def _raise_failure(self, name: str | None) -> None:
        failure = self._failure if name is None else self._named(name).value.exception()
        if failure is not None:
            raise failure

    def _named(self, name: str) -> Variable:
        if name not in self._variables:
            if self._failure is not None and self._run.ended is not None:
                raise self._failure
            hint = did_you_mean(name, self._variables) if isinstance(name, str) else ""
            known = ", ".join(self._variables) or "none"
            raise KeyError(f"the state has no variable {name!r}{hint}; it has: {known}")
        return self._variables[name]

    # ── doing ────────────────────────────────────────────────────────────────────────────────

    def _declare(self, name: str, place: str) -> Variable:
        variable = Variable(name, place)
        variable.feed = self._expected.pop(name, variable.feed)
        self._variables[name] = variable
        self._own.append(variable)
        return variable

    def _do(self, what: Any, place: str, makes: tuple[Variable, ...] = ()) -> None:
        """Take a step when those before it are done."""
        if self._run.ended is not None:
            raise ProgramError(f"{place}: {self._run.ended}")
        self._steps.append(Step(place, what, makes))
        self._run.call(self._begin)

    def _begin(self) -> None:
        if not self._working and self._run.ended is None:
            self._working = True
            self._run.start(self._work)

    async def _work(self) -> None:
        if self._begins is not None:
            self._transcript = await arrived(self._begins)
            self._begins = None
        while self._steps:
            step = self._steps[0]
            try:
                await self._take(step)
            except Exception as error:  # whatever it is, it is raised where a value is read
                self._fail(step, error)
            self._steps.popleft()
        self._working = False

    async def _take(self, step: Step) -> None:
        if not isinstance(step.what, str | Appended):
            if (waits := step.what()) is not None:
                await waits
            return
        if self._failure is not None:
            raise self._failure
        match step.what:
            case str(text):
                self._say(text)
            case RoleBegin(role):
                self._transcript.begin(role)
            case Shown(part):
                self._transcript.show(part)
            case RoleEnd(role):
                self._transcript.end(role)
            case Gen() as gen:
                await self._generate(gen, step.makes)
            case Decide() as decide:  # beside all others: nothing of it is in the text
                prompt, (variable,) = self._transcript.so_far(), step.makes
                self._run.start(lambda: self._decide(decide, prompt, variable))
            case Select() as select:
                await self._run.comes(prompt := self._transcript.prompt())
                choice, meta = await chosen(self._run.backend, prompt, select, self._run.program)
                self._run.usage.add(meta, len(select.choices) * (2 if select.method.needs_alone else 1))
                self._say(choice)
                for variable in step.makes:
                    variable.set(choice, meta)

    async def _decide(self, decide: Decide, prompt: Prompt, variable: Variable) -> None:
        try:
            await self._run.comes(prompt)
            decision, meta = await decided(self._run.backend, prompt, decide, self._run.program)
        except Exception as error:
            failure = ProgramError(f"{variable.place}: {error}")
            failure.__cause__ = error
            variable.fail(failure)
            return
        self._run.usage.add(meta)
        variable.set(decision, meta)

    def _say(self, text: str) -> None:
        self._transcript.say(text)
        self._feed.put(text)

    async def _generate(self, gen: Gen, makes: tuple[Variable, ...]) -> None:
        def tell(piece: str) -> None:
            self._feed.put(piece)
            if makes:
                makes[0].feed.put(piece)

        params = gen.params(self._run.defaults)
        await self._run.comes(prompt := self._transcript.prompt())
        if gen.tools:
            made = await with_tools(self._run.backend, self._transcript, gen, params, self._run.program)
            tell(made.texts[0])
            self._made(gen, makes, made)
            return
        stream = self._run.followed or self._feed.followed or any(each.feed.followed for each in makes)
        made = await generated(self._run.backend, prompt, gen, params, tell, stream=stream, program=self._run.program)
        self._made(gen, makes, made)

    def _made(self, gen: Gen, makes: tuple[Variable, ...], made: Replies) -> None:
        """The replies to `gen` are there."""
        self._run.usage.add(made.meta, gen.n)
        self._transcript.say(made.texts[0])
        for variable in makes:
            if gen.tools and variable.name == f"{gen.name}{CALLS}":
                variable.set(made.calls, made.meta)
                continue
            values = made.thoughts if gen.separate and variable.name == f"{gen.name}{REASONING}" else made.texts
            variable.set(values if gen.n > 1 else values[0], made.meta)

    def _reached(self) -> Future[None]:
        """Done when the steps so far are."""
        reached: Future[None] = Future()
        if self._run.ended is not None or not (self._steps or self._begins):
            reached.set_result(None)
            return reached

        def reach() -> None:
            self._reaching.discard(reached)
            settle(reached)

        self._reaching.add(reached)
        self._do(reach, line())
        if self._run.ended is not None:  # it ended meanwhile, in the event loop
            settle(reached)
        return reached

    def _fail(self, step: Step, error: Exception) -> None:
        """The state ends with `error`, which came of `step`, and so does each variable that the step makes."""
        if self._failure is None:
            self._failure = ProgramError(f"{step.place}: {error}")
            self._failure.__cause__ = error
        for variable in step.makes:
            variable.fail(self._failure)

    def fail(self, error: BaseException) -> None:
        """The program itself has failed with `error`; who reads what it has not made is told."""
        self._failure = error

    def _end(self, why: BaseException) -> None:
        """The run has ended; what has not come will not."""
        if self._steps and self._failure is None:
            self._failure = ProgramError(f"{self._steps[0].place}: {why}")
            self._failure.__cause__ = why
        for variable in self._own:
            if not variable.value.done():
                variable.fail(ProgramError(f"{variable.place}: {variable.name!r} did not come: {why}"))
        for reached in list(self._reaching):
            settle(reached)
        for feed in (self._feed, *list(self._expected.values())):
            feed.end()


def settle(reached: Future[None]) -> None:
    """Let those who wait for `reached` go on; a thread and the event loop may both do so."""
    with suppress(InvalidStateError):
        reached.set_result(None)


async def arrived(future: Future[Value]) -> Value:
    """The result of `future`, which is not touched when whoever waits for it is cancelled."""
    if not future.done():
        loop, there = asyncio.get_running_loop(), asyncio.Event()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(there.set))
        await there.wait()
    return future.result()


def line() -> str:
    """The line of the program that called us."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(OURS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
