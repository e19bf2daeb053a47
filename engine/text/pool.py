"""The text pool: long prompts are rendered and tokenized beside the event loop, in a few processes that can be killed.

    tokenizer, http ──ask──> TextPool ──small──> done here and now
                                │ queue
                                └──large──> text process 1 … n (engine/text/process.py), one job each at a time

How processes come and go is the business of any pool (engine/runtime/pool.py).
"""

from collections.abc import Sequence
from functools import partial

import anyio.to_thread
import msgspec

from engine.actors.tokenizer import AT_ONCE, Admission
from engine.config import Config
from engine.errors import RequestError
from engine.messages import FromTextProcess
from engine.messages.media import MEDIA, slices_of
from engine.messages.media import Prepared as Medium
from engine.messages.request import Generate
from engine.messages.text import Prepare, Prepared, TextAnswer, TextBoot, TextJob, TextWork, Tokenize
from engine.runtime.pool import ProcessPool, Work
from engine.runtime.process import Start, spawn
from engine.runtime.processors import processors
from engine.text.jobs import LARGE, perform, size_of

HUGE = 1 << 20  # characters: such jobs leave one process to the others
MOST_WAITING = 1024  # jobs
MOST_HELD = 1 << 28  # bytes of all jobs, as they are packed for a process
SECONDS = 60.0  # that a job may take in its process


def processes(cores: int) -> int:
    """How many there are at most."""
    return max(2, min(4, cores // 2))


class TextPool(ProcessPool[TextAnswer]):
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
        count = most or processes(processors())
        super().__init__(TextBoot(config, template), FromTextProcess, start, count=count, seconds=seconds, huge=HUGE)
        self.admission = admission

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
        work = packed(bare(job))
        answer = await self.done(work, size, held=len(work.packed))  # a character is up to four bytes
        return with_payloads(answer, job)

    def _lost(self, cause: str) -> RequestError:
        message = "the process that tokenizes long prompts stopped while it worked on this; send the request again"
        return RequestError(f"{message} (cause: {cause})", code="text_process_lost", status=503)

    def _late(self, work: Work[TextAnswer]) -> RequestError:
        return RequestError(
            f"the prompt took over {self._seconds:.0f} s to render and tokenize, which is the limit; shorten it",
            code="text_timeout",
        )


def bare(job: TextJob) -> TextJob:
    """`job` without the pixels of its media, which no text process looks at."""
    match job:
        case Prepare(Generate(media=media) as request) if media:
            return msgspec.structs.replace(job, job=msgspec.structs.replace(request, media=_counts(media)))
        case Tokenize(media=media) if media:
            return msgspec.structs.replace(job, media=_counts(media))
    return job


def _counts(media: Sequence[Medium]) -> tuple[Medium, ...]:
    bare = partial(msgspec.structs.replace, payload=b"")
    return tuple([bare(medium, slices=tuple([bare(each) for each in medium.slices])) for medium in media])


def with_payloads(answer: TextAnswer, job: TextJob) -> TextAnswer:
    """The answer to `bare(job)` as it would be to `job`: what the request needs on the device has its pixels."""
    match job, answer:
        case Prepare(Generate(media=media)), Prepared() if media:
            payloads = {(MEDIA, each.digest): each.payload for medium in media for each in slices_of(medium)}
            needs = [
                msgspec.structs.replace(need, payload=payloads.get((need.kind, need.content), need.payload))
                for need in answer.admitted.needs
            ]
            admitted = msgspec.structs.replace(answer.admitted, needs=tuple(needs))
            return msgspec.structs.replace(answer, admitted=admitted)
    return answer


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
