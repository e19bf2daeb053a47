"""Throughput with every request under a JSON schema, beside the same load free; and what a slow compilation disturbs.

    python -m bench.grammars.constrained [--model smollm2-135m] [--batches 1,8] [--tokens 64] [--repeat 3]
                                [--schema hard|easy] [--option NAME=VALUE ...] [--compiling SECONDS]

Offline, greedy, past the end token, so that both have as many tokens; medians, with the spread. `--compiling` instead
streams one free reply after the other, alone and while a grammar is compiled that never ends (an engine of the tests',
in the real compiler's place), and tells the time between two tokens. A model that has a config.json alone, for
`--option load=dummy`, gets a made-up tokenizer.
"""

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from contextlib import aclosing, nullcontext, suppress
from pathlib import Path
from typing import Any

import anyio

from bench.lib import synthetic, workloads
from engine import AsyncEngine, Config, RequestError, SamplingParams
from engine.actors.compiler import CompilerActor
from engine.config import resolve
from engine.messages import FromFront, ToFront
from engine.messages.request import Generate
from engine.runtime.actor import Actor
from engine.runtime.channel import Outbox
from engine.runtime.core import core_actors
from engine.runtime.front import Front
from engine.runtime.launch import open_front

SCHEMAS = {"hard": workloads.JSON_SCHEMA, "easy": workloads.EASY_SCHEMA}
WORDS = ("one", "two", "three", "list", "of", "things", "with", "names", "and", "kinds", "for", "the", "test", "speed")


def prompts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=24)) for _ in range(count)]


async def rate(engine: AsyncEngine, batch: int, tokens: int, seed: int, **grammar: Any) -> float:
    """Tokens a second of `batch` replies."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **grammar)
    began = time.perf_counter()
    replies = await engine.generate(prompts(batch, seed), params)
    seconds = time.perf_counter() - began
    assert all(reply.completion_tokens == tokens for reply in replies)
    return batch * tokens / seconds


async def compare(engine: AsyncEngine, given: argparse.Namespace) -> None:
    schema = json.dumps(SCHEMAS[given.schema])
    await rate(engine, 2, 8, 999)
    await rate(engine, 2, 8, 999, json_schema=schema)  # the compiler is started for it
    print(f"{'batch':>6} {'free':>16} {'constrained':>16} {'ratio':>6}")
    for batch in map(int, given.batches.split(",")):
        free: list[float] = []
        held: list[float] = []
        for repetition in range(given.repeat):
            seed = 1000 * batch + repetition
            free.append(await rate(engine, batch, given.tokens, seed))
            held.append(await rate(engine, batch, given.tokens, seed + 500, json_schema=schema))
        ratio = statistics.median(held) / statistics.median(free)
        print(f"{batch:>6} {cell(free):>16} {cell(held):>16} {ratio:>6.2f}", flush=True)


def cell(rates: list[float]) -> str:
    middle = statistics.median(rates)
    return f"{middle:.1f} ({(max(rates) - min(rates)) / middle:.0%})"


async def gaps(front: Front, seconds: float) -> list[float]:
    """Seconds between two tokens of one reply after the other, for about as long."""
    found: list[float] = []
    began = time.perf_counter()
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    while time.perf_counter() - began < seconds:
        last = None
        async with aclosing(front.generate(Generate("free", params, text=prompts(1, len(found))[0]))) as stream:
            async for _ in stream:
                now = time.perf_counter()
                if last is not None:
                    found.append(now - last)
                last = now
    return found


def endless() -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    """A compiler of the tests', of whose regular expressions `spin` never ends."""
    ours, theirs = socket.socketpair()
    script = Path(__file__).parents[2] / "tests" / "null" / "slow_compiler.py"
    with theirs:
        command = [sys.executable, str(script), str(theirs.fileno())]
        return ours, subprocess.Popen(command, pass_fds=[theirs.fileno()])


async def disturb(config: Config, seconds: float) -> None:
    def core(config: Config, front: Outbox[ToFront]) -> tuple[list[Actor], Outbox[FromFront]]:
        actors, to_scheduler = core_actors(config, front)
        for actor in actors:
            if isinstance(actor, CompilerActor):
                actor._start = endless
        return actors, to_scheduler

    async with open_front(config, core) as front:
        await front.ready()
        await gaps(front, 2.0)
        times: dict[str, list[float]] = {"alone": [], "while a grammar is compiled": []}
        for _ in range(3):  # in turns, as the machine may be busy with other things
            times["alone"] += await gaps(front, seconds / 3)
            async with anyio.create_task_group() as group:

                async def slow() -> None:
                    params = SamplingParams(max_tokens=1, regex="spin")
                    with suppress(RequestError):  # it is ended at its deadline
                        async for _ in front.generate(Generate("slow", params, text="a")):
                            raise AssertionError("it is never compiled")

                group.start_soon(slow)
                await anyio.sleep(1.0)
                times["while a grammar is compiled"] += await gaps(front, seconds / 3)
    for name, each in times.items():
        ordered = sorted(1e3 * gap for gap in each)
        shown = ", ".join(f"p{share} {ordered[len(ordered) * share // 100]:.2f}" for share in (50, 90, 99))
        print(f"{name}: ms between two tokens: {shown}; {len(each)} tokens")


async def run(given: argparse.Namespace, model: str) -> None:
    options: dict[str, Any] = {"model": model, "max_model_len": 1024, "log_level": "warning"}
    options |= dict(option.split("=", 1) for option in given.option)
    if given.compiling:
        await disturb(resolve({**options, "grammar_seconds": given.compiling / 3 + 2}), given.compiling)
        return
    async with AsyncEngine(**options) as engine:
        await compare(engine, given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--schema", choices=tuple(SCHEMAS), default="hard")
    parser.add_argument("--compiling", type=float, metavar="SECONDS")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the engine")
    given = parser.parse_args()
    bare = Path(given.model, "config.json").exists() and not Path(given.model, "tokenizer.json").exists()
    with synthetic.with_tokenizer(Path(given.model)) if bare else nullcontext(given.model) as model:
        anyio.run(run, given, str(model), backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main()
