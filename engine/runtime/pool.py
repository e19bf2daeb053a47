"""A pool of processes that can be killed: each does one job at a time, for whoever asks in the event loop.

    ask ── queue ──> place 1 … n ──frames──> process (started for the first job that needs it)

A process is ended at its job's deadline, and started again for the next one. Huge jobs may take all places but one, so
that others go past them. A job whose asker leaves is dropped from the queue; if a process has it already, that process
gets one more second. Left out: what the jobs are, how errors are worded, and how much may wait: subclasses say so
(engine/text/pool.py, engine/media/pool.py).
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import anyio

from engine.errors import RequestError
from engine.messages.base import Message
from engine.messages.control import Fatal, Retired
from engine.messages.reply import Failed
from engine.runtime.actor import first_failure
from engine.runtime.channel import Frames, Receiver, Sender, channel
from engine.runtime.process import Child, Start

log = logging.getLogger("engine.pool")

GRACE = 1.0  # seconds that a job may go on for whose asker has left: a new process costs about that much

Answer = TypeVar("Answer")


class Work(Generic[Answer]):
    """One job on its way, and the future of its answer. Both are dropped once nobody waits for them, because a
    cancelled future keeps the frames of its request alive."""

    def __init__(self, job: Message, size: int, held: int) -> None:
        self.job: Message | None = job
        self.held = held  # bytes
        self.size = size
        self.answer: asyncio.Future[Answer] | None = asyncio.get_running_loop().create_future()
        self.scope: anyio.CancelScope | None = None  # while a process has it

    def end(self, with_: Answer | RequestError) -> None:
        if self.answer is None or self.answer.done():  # whoever asked has left
            return
        if isinstance(with_, RequestError):
            self.answer.set_exception(with_)
        else:
            self.answer.set_result(with_)

    def abandon(self) -> None:
        """Drop what the job holds, because nobody waits for it any more; an idle process would keep it until its next
        job."""
        self.job = self.answer = None
        if self.scope is not None:
            self.scope.deadline = min(self.scope.deadline, anyio.current_time() + GRACE)


class Helper(Generic[Answer]):
    """One place for a process. `running` says that there is one, `free` that it has no job."""

    def __init__(self, *, takes_huge: bool) -> None:
        self.takes_huge = takes_huge
        self.free = True
        self.running = False
        self.jobs: Sender[Work[Answer]]
        self.inbox: Receiver[Work[Answer]]
        self.jobs, self.inbox = channel(1)


class ProcessPool(Generic[Answer]):
    """An actor that has its jobs done in `count` processes at most, each of which `start` starts and `boot` is the
    first frame of. They send messages of the types `receives`: a Fatal, a Failed, a Retired before their last answer,
    or answers. `seconds` is a job's deadline; jobs larger than `huge` leave one place to others."""

    name = "pool"

    def __init__(
        self, boot: Message, receives: Any, start: Start, *, count: int, seconds: float, huge: int | None = None
    ) -> None:
        self._boot = boot
        self._receives = receives
        self._start = start
        self._seconds = seconds
        self._huge = huge
        self._helpers: Sequence[Helper[Answer]] = [
            Helper(takes_huge=number > 0 or count == 1) for number in range(count)
        ]
        self._queue: deque[Work[Answer]] = deque()
        self._held = 0

    def _lost(self, cause: str) -> RequestError:
        """The error of a job whose process was lost."""
        raise NotImplementedError

    def _unstarted(self, cause: str) -> RequestError:
        """The error of a job for which no process can be started."""
        return self._lost(f"none can be started: {cause}")

    def _late(self, work: Work[Answer]) -> RequestError:
        """The error of a job that was ended at its deadline."""
        raise NotImplementedError

    async def done(self, job: Message, size: int, held: int) -> Answer:
        """The answer to `job`, which holds so many bytes, from a process."""
        work: Work[Answer] = Work(job, size, held)
        answer = work.answer
        assert answer is not None, "it was just asked for"
        self._held += held
        self._queue.append(work)
        self._hand_out()
        try:
            return await answer
        finally:
            del answer
            self._held -= held
            work.abandon()
            with suppress(ValueError):
                self._queue.remove(work)

    def _hand_out(self) -> None:
        """Give waiting jobs to free helpers, first to those whose process runs."""
        for work in list(self._queue):
            small = self._huge is None or work.size <= self._huge
            free = [helper for helper in self._helpers if helper.free and (helper.takes_huge or small)]
            if free:
                helper = next((helper for helper in free if helper.running), free[0])
                self._queue.remove(work)
                helper.free = False
                helper.jobs.send_nowait(work)
            elif not any(helper.free for helper in self._helpers):
                return

    # ── the actor ────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        try:
            async with anyio.create_task_group() as group:
                for helper in self._helpers:
                    group.start_soon(self._serve, helper)
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None

    async def _serve(self, helper: Helper[Answer]) -> None:
        async for work in helper.inbox:
            unanswered: Work[Answer] | None = work
            while unanswered is not None:
                unanswered = await self._one_life(helper, unanswered)
            self._freed(helper)

    def _freed(self, helper: Helper[Answer]) -> None:
        helper.free = True
        self._hand_out()

    async def _one_life(self, helper: Helper[Answer], work: Work[Answer]) -> Work[Answer] | None:
        """Run one process from `work` on until it ends. Returns a job for another process, if this one had done some
        jobs before it was lost: then it may have ended before this job came."""
        try:
            child = await Child[Any].start(self._start, self._receives)
        except OSError as error:
            log.error("no process of the %s can be started: %s", self.name, error)
            work.end(self._unstarted(str(error)))
            return None
        log.debug("a process of the %s is process %d", self.name, child.process.pid)
        helper.running = True
        answered = 0
        try:
            async with child:
                frames, answers = child.frames, aiter(child.frames)
                with suppress(anyio.BrokenResourceError):  # the reader sees the end of the stream too
                    await frames.send(self._boot)
                while True:
                    goes_on, cause = await self._exchange(frames, answers, work)
                    if not goes_on and cause is not None:
                        cause = cause or await child.exit_cause()
                        log.error("a process of the %s is gone: %s", self.name, cause)
                        if answered:
                            return work
                        work.end(self._lost(cause))
                    if not goes_on:
                        return None
                    answered += 1
                    self._freed(helper)
                    work = await helper.inbox.receive()
        finally:
            helper.running = False

    async def _exchange(
        self, frames: Frames[Any], answers: AsyncIterator[Any], work: Work[Answer]
    ) -> tuple[bool, str | None]:
        """Have `work` done. Returns whether the process goes on, and if it was lost, the cause as far as it is
        known."""
        retired, cause = False, ""
        with anyio.move_on_after(self._seconds) as scope:
            work.scope = scope
            if work.job is None:
                return True, None
            with suppress(anyio.BrokenResourceError):
                await frames.send(work.job)
            async for answer in answers:
                match answer:
                    case Retired():
                        retired = True
                    case Fatal():
                        cause = answer.cause
                        if answer.details:
                            log.error("a process of the %s ends:\n%s", self.name, answer.details)
                    case Failed():
                        work.end(answer.error)
                        return not retired, None
                    case _:
                        work.end(answer)
                        return not retired, None
            return False, cause
        if work.job is not None:
            log.warning("a job of the %s took over %.0f s (size %d)", self.name, self._seconds, work.size)
        work.end(self._late(work))
        return False, None
