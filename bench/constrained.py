"""Throughput with every request under a JSON schema, beside the same load free; and what a slow compilation disturbs.

    python bench/constrained.py [--model smollm2-135m] [--batches 1,8] [--tokens 64] [--repeat 3] [--schema hard|easy]
                                [--option NAME=VALUE ...] [--compiling SECONDS]

Offline, greedy, past the end token, so that both have as many tokens; medians, with the spread. `--compiling` instead
streams one free reply after the other while a grammar is compiled that takes longer than that (a regular expression in
XGrammar's hands, which must be installed), and tells the time between two tokens with and without it.
"""

import argparse
import json
import random
import statistics
import time
from typing import Any

import anyio
import workloads  # type: ignore[import-not-found]

from engine import AsyncEngine, RequestError, SamplingParams

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


async def gaps(engine: AsyncEngine, seconds: float) -> list[float]:
    """Seconds between two tokens of one reply after the other, for about as long."""
    found: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
        last = None
        async for _ in engine.stream(prompts(1, len(found))[0], params):
            now = time.perf_counter()
            if last is not None:
                found.append(now - last)
            last = now
    return found


async def disturb(engine: AsyncEngine, seconds: float) -> None:
    await gaps(engine, 2.0)
    quiet = await gaps(engine, seconds)
    ended: list[str] = []

    async def slow() -> None:
        try:
            await engine.generate("a", SamplingParams(max_tokens=1, regex="([a-z]{1,400} ){1,400}[0-9]{1,4000}"))
            ended.append("it was compiled")
        except RequestError as error:
            ended.append(str(error))

    async with anyio.create_task_group() as group:
        group.start_soon(slow)
        await anyio.sleep(3.0)  # the compiler starts, and reads its vocabulary
        busy = await gaps(engine, seconds)
        print("the compilation went on all the while" if not ended else f"it ended too early: {ended[0]}")
        group.cancel_scope.cancel()
    for name, times in (("alone", quiet), ("while a grammar is compiled", busy)):
        ordered = sorted(1e3 * each for each in times)
        shown = ", ".join(f"p{share} {ordered[len(ordered) * share // 100]:.2f}" for share in (50, 90, 99))
        print(f"{name}: ms between two tokens: {shown}; {len(times)} tokens")


async def run(given: argparse.Namespace) -> None:
    options: dict[str, Any] = {"model": given.model, "max_model_len": 1024, "log_level": "warning"}
    if given.compiling:
        options |= {"plugins": "xgrammar", "grammar_seconds": 10 * given.compiling}
    options |= dict(option.split("=", 1) for option in given.option)
    async with AsyncEngine(**options) as engine:
        if given.compiling:
            await disturb(engine, given.compiling)
        else:
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
    anyio.run(run, given, backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main()
