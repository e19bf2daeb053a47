"""`python -m engine.media.process FD`: decodes and prepares images and video, one at a time, for the peer on socket FD.

The first frame is MediaBoot; then every DecodeMedia is answered, in order. Ends when the peer closes. Bytes of
strangers meet decoders written in C here. So the memory of this process is limited, it writes no files, and deadlines
are the peer's, which ends it.
"""

import os
import pickle
import resource
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from msgspec.structs import replace

from engine.conversation.media import MediaProcessor
from engine.errors import RequestError, counted
from engine.messages import ToMediaProcess
from engine.messages.control import Fatal, Retired
from engine.messages.decoding import MOST_PAYLOAD, DecodeMedia, MediaBoot, MediaReady
from engine.messages.media import size_of
from engine.messages.reply import Failed
from engine.plugin.registry import Plugins
from engine.runtime.channel import BlockingFrames
from engine.runtime.memory import peak_memory

GROWN = 1 << 30  # bytes of peak memory above which a process gives way to a new one
BESIDE = 1 << 30  # bytes that a process may take beside the pixels
COPIES = 4  # of all pixels, at the worst: as decoded, gathered, resized, and as the model takes them


def main(descriptor: int) -> None:
    """Until the peer closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as sock, suppress(ConnectionError):
        sock.setblocking(True)
        frames: BlockingFrames[ToMediaProcess] = BlockingFrames(sock, receives=ToMediaProcess)
        boot = frames.receive()
        if boot is None:
            return
        assert isinstance(boot, MediaBoot), f"the first frame is {type(boot).__name__}, not MediaBoot"
        try:
            if boot.plugins:
                Plugins.load(boot.plugins)  # one may be a file, which no import finds
            processor: MediaProcessor = pickle.loads(boot.processor)
        except Exception as error:  # whatever its module does when it is imported
            frames.send(Fatal("media process", f"the model's processor cannot be loaded here: {error!r}"))
            return
        _confine(boot)
        while (job := frames.receive()) is not None:
            assert isinstance(job, DecodeMedia), f"a media process that runs got {type(job).__name__}"
            try:
                answer = answered(processor, boot, job)
            except Exception as error:  # of ours, or of the processor's
                cause = f"{type(error).__name__}: {error}"
                frames.send(Fatal("media process", cause, traceback.format_exc()))
                return
            if grown := peak_memory() > GROWN:
                frames.send(Retired())
            frames.send(answer)
            if grown:
                return
            del job, answer  # not held while the next one is waited for


def answered(processor: MediaProcessor, boot: MediaBoot, job: DecodeMedia) -> MediaReady | Failed:
    """The answer to `job`, or the reason why there is none: a sentence that goes on from the place of the part."""
    try:
        return _made(processor, boot, job)
    except RequestError as error:
        return Failed.of("", error)
    except MemoryError:
        said = "takes more memory to decode than there is for one; send it smaller"
        return Failed("", 400, "media_too_large", said)


def _made(processor: MediaProcessor, boot: MediaBoot, job: DecodeMedia) -> MediaReady:
    from engine.media.decoding import image_frames, video_frames  # here, where its libraries are needed

    began = time.perf_counter()
    if job.kind == "image":
        frames = replace(image_frames(job.source, job.content, boot.pixels), coarse=job.coarse)
    else:
        choose = processor.choose_frames
        frames = video_frames(job.source, job.content, choose, boot.pixels, boot.video_pixels)
    decoded = time.perf_counter()
    prepared = processor.prepare(frames)
    if (size := size_of(prepared)) > MOST_PAYLOAD:
        raise RequestError(
            f"takes {counted(size, 'byte')} as the model reads it, and at most {MOST_PAYLOAD} are "
            "taken; send it smaller, or shorter",
            code="media_too_large",
        )
    pixels = frames.pixels.size // 3
    return MediaReady(prepared, pixels, decoded - began, time.perf_counter() - decoded)


def _confine(boot: MediaBoot) -> None:
    """Let this process take no more memory than the bounds on pixels need, and write neither a file nor, as decoders do
    for each odd byte, to the server's log."""
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), sys.stderr.fileno())
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    status = Path("/proc/self/statm")
    if status.exists():  # elsewhere addresses that are taken cannot be told, and a limit might be below them
        taken = int(status.read_text().split()[0]) * resource.getpagesize()
        most = taken + BESIDE + COPIES * 3 * max(boot.pixels, boot.video_pixels)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main(int(sys.argv[1]))
