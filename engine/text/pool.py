"""The text pool: long prompts are rendered and tokenized beside the event loop, in a few processes that can be killed.

    tokenizer, http ──ask──> TextPool ──small──> done here and now
                                │ queue
                                └──large──> text process 1 … n (engine/text/process.py), one job each at a time

A process is started for the first job that needs it, ended at a job's deadline, and started again for the next one.
Huge jobs may take all processes but one, so that others go past them. A job whose asker leaves is dropped from the
queue; if a process has it already, that process gets one more second.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from engine.actors.tokenizer import AT_ONCE, Admission
from engine.config import Config
from engine.errors import RequestError
from engine.messages import FromTextProcess
from engine.messages.control import Fatal
from engine.messages.reply import Failed
from engine.messages.text import Retired, TextAnswer, TextBoot, TextJob, TextWork, Tokenize
from engine.runtime.actor import first_failure
from engine.runtime.channel import Frames, Receiver, Sender, channel
from engine.runtime.process import Child, Start, spawn
from engine.runtime.processors import processors
from engine.text.jobs import LARGE, perform, size_of

log = logging.getLogger("engine.text")

HUGE = 1 << 20  # characters: such jobs leave one process to the others
MOST_WAITING = 1024  # jobs
MOST_HELD = 1 << 28  # bytes of all jobs, as they are packed for a process
SECONDS = 60.0  # that a job may take in its process
GRACE = 1.0  # seconds that a job may go on for whose asker has left: a new process costs about that much


def processes(cores: int) -> int:
    """How many there are at most."""
    return max(2, min(4, cores // 2))


class Work:
    """One job on its way, and the future of its answer. Both are dropped once nobody waits for them, because a
    cancelled future keeps the frames of its request alive."""

    def __init__(self, job: TextWork, size: int) -> None:
        self.job: TextWork | None = job
        self.held = len(job.packed)  # bytes: a character is up to four
        self.size = size
        self.answer: asyncio.Future[TextAnswer] | None = asyncio.get_running_loop().create_future()
        self.scope: anyio.CancelScope | None = None  # while a process has it

    def end(self, with_: TextAnswer | RequestError) -> None:
        if self.answer is None or self.answer.done():  # whoever asked has left
            return
        if isinstance(with_, RequestError):
            self.answer.set_exception(with_)
        else:
            self.answer.set_result(with_)

    def abandon(self) -> None:
        """Drop the job's text, because nobody waits for it any more; an idle process would keep it until its next
        job."""
        self.job = self.answer = None
        if self.scope is not None:
            self.scope.deadline = min(self.scope.deadline, anyio.current_time() + GRACE)


class Helper:
    """One place for a process. `running` says that there is one, `free` that it has no job."""

    def __init__(self, *, takes_huge: bool) -> None:
        self.takes_huge = takes_huge
        self.free = True
        self.running = False
        self.jobs: Sender[Work]
        self.inbox: Receiver[Work]
        self.jobs, self.inbox = channel(1)


class TextPool:
    """An actor that does text jobs: small ones at once, others in its processes.

    `template` takes the place of the model's own; `start` starts a process, `seconds` is a job's deadline."""

    name = "text pool"

    def __init__(
        self,
        config: Config,
        template: str | None,
        admission: Admission,
        *,
        start: Start = lambda: spawn("engine.text.process"),
        most: int | None = None,
        seconds: float = SECONDS,
    ) -> None:
        self.admission = admission
        self._boot = TextBoot(config, template)
        self._start = start
        self._seconds = seconds
        count = most or processes(processors())
        self._helpers: Sequence[Helper] = [Helper(takes_huge=number > 0 or count == 1) for number in range(count)]
        self._queue: deque[Work] = deque()
        self._held = 0

    # ── for those who ask ────────────────────────────────────────────────────────────────────

    def is_large(self, job: TextJob) -> bool:
        """Whether `ask` makes its caller wait."""
        return size_of(job) > LARGE

    async def ask(self, job: TextJob) -> TextAnswer:
        """The answer to `job`; a small one is done before this returns to the event loop, or in a thread if it has
        endings, whose programs send many.

        Raises RequestError if it cannot be done as requested (400), or not now (503)."""
        size = size_of(job)
        if size <= LARGE:
            if isinstance(job, Tokenize) and job.endings and size > AT_ONCE:
                return await anyio.to_thread.run_sync(perform, self.admission, job)
            return perform(self.admission, job)
        if len(self._queue) >= MOST_WAITING or self._held + size > MOST_HELD:
            raise RequestError(
                f"{len(self._queue)} long prompts with {self._held} bytes wait to be tokenized, which is the "
                "limit; try again in a moment",
                code="queue_full",
                status=503,
            )
        work = Work(packed(job), size)
        answer, held = work.answer, work.held
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
            free = [helper for helper in self._helpers if helper.free and (helper.takes_huge or work.size <= HUGE)]
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

    async def _serve(self, helper: Helper) -> None:
        async for work in helper.inbox:
            unanswered: Work | None = work
            while unanswered is not None:
                unanswered = await self._one_life(helper, unanswered)
            self._freed(helper)

    def _freed(self, helper: Helper) -> None:
        helper.free = True
        self._hand_out()

    async def _one_life(self, helper: Helper, work: Work) -> Work | None:
        """Run one process from `work` on until it ends. Returns a job for another process, if this one had done some
        jobs before it was lost: then it may have ended before this job came."""
        try:
            child = await Child[FromTextProcess].start(self._start, FromTextProcess)
        except OSError as error:
            log.error("no text process can be started: %s", error)
            work.end(_lost(f"none can be started: {error}"))
            return None
        log.debug("text process is process %d", child.process.pid)
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
                        log.error("a text process is gone: %s", cause)
                        if answered:
                            return work
                        work.end(_lost(cause))
                    if not goes_on:
                        return None
                    answered += 1
                    self._freed(helper)
                    work = await helper.inbox.receive()
        finally:
            helper.running = False

    async def _exchange(
        self, frames: Frames[FromTextProcess], answers: AsyncIterator[FromTextProcess], work: Work
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
                    case Failed():
                        work.end(answer.error)
                        return not retired, None
                    case _:
                        work.end(answer)
                        return not retired, None
            return False, cause
        if work.job is not None:
            log.warning("a prompt of about %d characters took over %.0f s to tokenize", work.size, self._seconds)
        work.end(
            RequestError(
                f"the prompt took over {self._seconds:.0f} s to render and tokenize, which is the limit; shorten it",
                code="text_timeout",
            )
        )
        return False, None


def packed(job: TextJob) -> TextWork:
    """`job` as a process takes it. Raises RequestError for a program's values that are not JSON."""
    try:
        try:
            return TextWork(msgspec.msgpack.encode(job))
        except OverflowError:
            return TextWork(msgspec.json.encode(job), is_json=True)
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt holds half of a surrogate pair ({error}); send whole characters") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the messages hold what JSON cannot say ({error}); send text and numbers") from None


def _lost(cause: str) -> RequestError:
    message = "the process that tokenizes long prompts stopped while it worked on this; send the request again (cause: "
    return RequestError(f"{message}{cause})", code="text_process_lost", status=503)
