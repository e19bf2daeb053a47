"""`python -m bench.http.offline OPTIONS`: the offline engine in a process of its own, which measures what it is told.

OPTIONS are the engine's, as JSON. A line of JSON on standard input is a Job, a line on standard output a Result.
Prompts are token ids and replies are not detokenized: what is left of HTTP's work is none of this engine's.
"""

import itertools
import json
import random
import statistics
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
from engine.client.bench.spread import percentile

READY = "ready"


class Job(Struct, frozen=True):
    """`requests` requests, `streams` at a time, of `prompt` tokens in and `reply` out."""

    requests: int
    streams: int
    prompt: int
    reply: int
    temperature: float
    seed: int


class Result(Struct, frozen=True):
    """Seconds of all; then milliseconds: until each request's first token, the median and the 99th percentile between
    two tokens of a request, and for each token after a request's first one."""

    seconds: float
    first: list[float]
    step: float
    step_p99: float
    each: float


async def measure(engine: AsyncEngine, job: Job, vocab: int) -> Result:
    work = same(random.Random(job.seed), job.requests, job.prompt, job.reply, vocab)
    params = SamplingParams(temperature=job.temperature, max_tokens=job.reply, ignore_eos=True, detokenize=False)
    times: list[list[float]] = [[] for _ in work]
    left = iter(enumerate(work))
    began = time.perf_counter()

    async def one() -> None:
        for index, (ids, _) in left:
            asked = time.perf_counter()
            count = 0
            async for chunk in engine.stream(ids, params):
                if chunk.ids:
                    count += len(chunk.ids)
                    times[index].append(time.perf_counter() - asked)
            assert count == job.reply, f"a reply has {count} tokens, not {job.reply}"

    async with anyio.create_task_group() as group:
        for _ in range(min(job.streams, job.requests)):
            group.start_soon(one)
    seconds = time.perf_counter() - began
    gaps = sorted(after - before for each in times for before, after in itertools.pairwise(each)) or [0.0]
    each = statistics.median((one[-1] - one[0]) / max(1, job.reply - 1) for one in times)
    figures = (statistics.median(gaps), percentile(gaps, 0.99), each)
    return Result(seconds, [1e3 * one[0] for one in times], *(1e3 * figure for figure in figures))


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
