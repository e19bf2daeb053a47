"""`python -m engine.client.bench.client_process FD`: plays its share of a load for the peer on socket FD.

Each Job is answered by Ready, and after Begin by Played. Ends when the peer closes. It watches itself: its own CPU
time, and how late its event loop wakes, say whether the figures are the server's or its own.
"""

import gc
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator

import anyio
import anyio.abc

from engine.client.bench.asking import Asker
from engine.client.bench.jobs import Begin, Job, Played, Ready, Replied, ToClient
from engine.client.bench.load import Run, play
from engine.client.bench.spread import percentile
from engine.runtime.channel import Frames

TICK = 0.01  # seconds between two looks at the clock
TELL = 0.1  # seconds between two words on progress


class Watch:
    """How this process fares while it plays."""

    def __init__(self) -> None:
        self.late: list[float] = []
        self.replies = 0
        self.began = (time.perf_counter(), time.process_time())
        self.cpu = 0.0
        self.parent = os.getppid()

    async def run(self, frames: Frames[ToClient]) -> None:
        told, told_at = 0, 0.0
        while True:
            due = time.perf_counter() + TICK
            await anyio.sleep(TICK)
            if os.getppid() != self.parent:
                os._exit(1)  # nobody waits for the figures, and the server should not go on for them
            self.late.append(max(0.0, time.perf_counter() - due))
            if due - told_at > TELL and self.replies > told:
                count, told, told_at = self.replies - told, self.replies, due
                await frames.send(Replied(count))

    def replied(self) -> None:
        self.replies += 1
        wall, cpu = self.began
        self.cpu = (time.process_time() - cpu) / max(time.perf_counter() - wall, 1e-9)

    def played(self, run: Run) -> Played:
        ordered = sorted(self.late) or [0.0]
        return Played(run.records, run.asked, self.cpu, (percentile(ordered, 0.99), ordered[-1]))


async def perform(job: Job, frames: Frames[ToClient], messages: AsyncIterator[ToClient]) -> Played:
    """Play `job` when it is time."""
    asker = Asker(job.target)
    try:
        await frames.send(Ready())
        begin = await anext(messages)
        assert isinstance(begin, Begin), f"a client that is ready got {type(begin).__name__}"
        await anyio.sleep(max(0.0, begin.at - time.perf_counter()))
        watch = Watch()
        async with anyio.create_task_group() as group:
            group.start_soon(watch.run, frames)
            run = await play(
                job.conversations,
                asker,
                concurrency=job.concurrency,
                rate=job.rate,
                seed=job.seed,
                share=(job.number, job.clients),
                began=begin.at,
                on_reply=watch.replied,
            )
            group.cancel_scope.cancel()
        return watch.played(run)
    finally:
        asker.close()


async def main(descriptor: int) -> None:
    """Until the peer closes."""
    stream = await anyio.abc.UNIXSocketStream.from_socket(socket.socket(fileno=descriptor))
    frames: Frames[ToClient] = Frames(stream, ToClient)
    messages = aiter(frames)
    async for job in messages:
        assert isinstance(job, Job), f"a client without a job got {type(job).__name__}"
        await frames.send(await perform(job, frames, messages))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # replies are kept until the load is over, and a collection would go through all of them
    anyio.run(main, int(sys.argv[1]), backend_options={"use_uvloop": True})
