"""The media pool: images and video are decoded and prepared in a few processes that can be killed.

How processes come and go is the business of any pool (engine/runtime/pool.py); what they do is in process.py. Left out:
which media are asked for twice (store.py).
"""

import copy
import pickle
from typing import Any

from engine.conversation.media import MediaProcessor
from engine.errors import RequestError
from engine.messages import FromMediaProcess
from engine.messages.decoding import DecodeMedia, MediaBoot, MediaReady
from engine.options.media import MediaOptions
from engine.runtime.pool import ProcessPool, Work
from engine.runtime.process import Start, spawn
from engine.runtime.processors import processors

HUGE = 16 << 20  # bytes of a source: such jobs leave one process to the others
MOST_HELD = 1 << 30  # bytes of all sources that wait or are being decoded


def processes(cores: int) -> int:
    """How many there are at most, by default."""
    return max(1, min(8, cores // 2))


def alone(processor: MediaProcessor | None) -> bytes:
    """`processor`, pickled, without what makes token ids of texts: that is for prompts, and stays where these are."""
    copied: Any = copy.copy(processor)
    if hasattr(copied, "encode"):
        copied.encode = None
    return pickle.dumps(copied)


class MediaPool(ProcessPool[MediaReady]):
    """An actor that decodes for `processor`, which is one of `plugins`, if it is of none of ours; `start` starts a
    process."""

    name = "media pool"

    def __init__(
        self,
        options: MediaOptions,
        processor: MediaProcessor | None,
        plugins: tuple[str, ...] = (),
        *,
        start: Start = lambda: spawn("engine.media.process"),
    ) -> None:
        boot = MediaBoot(alone(processor), options.media_pixels, options.media_video_pixels, plugins)
        count = options.media_processes or processes(processors())
        super().__init__(boot, FromMediaProcess, start, count=count, seconds=options.media_seconds, huge=HUGE)

    async def ask(self, job: DecodeMedia) -> MediaReady:
        """The answer to `job`. Raises RequestError, whose message goes on from the place of the part."""
        held = len(job.source)
        if self._held + held > MOST_HELD:
            raise RequestError(
                f"has {held} bytes, and {self._held} bytes of others wait to be decoded, of {MOST_HELD} that may; try "
                "again in a moment",
                code="queue_full",
                status=503,
            )
        return await self.done(job, held, held)

    def _lost(self, cause: str) -> RequestError:
        message = f"ended the process that was to decode it, so it is not sent to another; send another one ({cause})"
        return RequestError(message, code="invalid_media")

    def _unstarted(self, cause: str) -> RequestError:
        message = f"cannot be decoded, because no process can be started for it: {cause}; send the request again"
        return RequestError(message, code="media_process_lost", status=503)

    def _late(self, work: Work[MediaReady]) -> RequestError:
        return RequestError(
            f"took over {self._seconds:g} s to decode, which is the limit (--media-seconds); send it smaller, or "
            "shorter",
            code="media_timeout",
        )
