"""`python -m bench.http.offline OPTIONS`: the offline engine in a process of its own, which measures what it is told.

OPTIONS are the engine's, as JSON. A line of JSON on standard input is a Job, a line on standard output a Result.
Prompts are token ids and replies are not detokenized: what is left of HTTP's work is none of this engine's.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.to_thread
import msgspec
from msgspec import Struct

from bench.lib.workloads import same
from engine import AsyncEngine, SamplingParams

READY = "ready"


class Job(Struct, frozen=True):
    """`requests` requests, `streams` at a time, of `prompt` tokens in and `reply` out."""

    requests: int
    streams: int
    prompt: int
    reply: int
    temperature: float
    seed: int


class Reply(Struct):
    """One request, in seconds since the first one: when it was sent, when each token came, and when it had ended."""

    sent: float
    pieces: list[float]
    ended: float = 0.0


class Result(Struct, frozen=True):
    """Seconds of all, and the requests."""

    seconds: float
    replies: list[Reply]


async def measure(engine: AsyncEngine, job: Job, vocab: int) -> Result:
    work = same(random.Random(job.seed), job.requests, job.prompt, job.reply, vocab)
    params = SamplingParams(temperature=job.temperature, max_tokens=job.reply, ignore_eos=True, detokenize=False)
    replies: list[Reply] = []
    left = iter(work)
    began = time.perf_counter()

    async def one() -> None:
        for ids, _ in left:
            replies.append(reply := Reply(time.perf_counter() - began, []))
            count = 0
            async for chunk in engine.stream(ids, params):
                if chunk.ids:
                    count += len(chunk.ids)
                    reply.pieces.append(time.perf_counter() - began)
            reply.ended = time.perf_counter() - began
            assert count == job.reply, f"a reply has {count} tokens, not {job.reply}"

    async with anyio.create_task_group() as group:
        for _ in range(min(job.streams, job.requests)):
            group.start_soon(one)
    return Result(time.perf_counter() - began, replies)


async def serve(options: dict[str, Any]) -> None:
    async with AsyncEngine(**options) as engine:
        vocab = (await engine.front.ready()).vocab_size
        print(READY, flush=True)
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            result = await measure(engine, msgspec.json.decode(line, type=Job), vocab)
            print(msgspec.json.encode(result).decode(), flush=True)


# ── on the other side ────────────────────────────────────────────────────────────────────────


class Offline:
    """Such a process."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def measure(self, job: Job) -> Result:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(job).decode() + "\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self.line(), type=Result)

    def line(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"the offline engine is gone: it exited with code {self._process.wait()}")
        return line.strip()


@contextmanager
def offline(options: dict[str, Any]) -> Iterator[Offline]:
    """The offline engine with `options`, until the block ends."""
    command = [sys.executable, "-m", "bench.http.offline", json.dumps(options)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        made = Offline(process)
        while made.line() != READY:
            pass
        yield made
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    anyio.run(serve, json.loads(sys.argv[1]), backend_options={"use_uvloop": True})
