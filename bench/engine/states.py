"""What cached states of a recurrent model bring and cost, beside an engine that caches nothing.

    python -m bench.engine.states [bench/configs/delta-4b] [--rows turns,prompts,host] [--size full] [--json FILE]

The shape is made up: dense, three layers of four with gated delta nets of Qwen3-Next's heads. Weights are dummies.

    turns    conversations of 8,192 tokens, one turn at a time of 128 new tokens and a reply of 32: the median time to
             the first token, beside that of an engine without a prefix cache
    prompts  prompts that share nothing, of 1,024 tokens, 64 at once with replies of 64: tokens a second, beside the
             same engine without a prefix cache. What is kept helps nobody here. Both in turn, five times
    host     as `turns`, of conversations that have left the device for the host's memory

`--size tiny` is the same on a CPU with a toy of that kind, to see that it runs: no figure of it says anything.
"""

import argparse
import json
import random
import statistics
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
from msgspec import Struct, to_builtins

from bench.engine.tiers import Figure, asked, line
from bench.lib.figures import shown
from engine import AsyncEngine

ROWS = ("turns", "prompts", "host")
TURNS, REPEATS = 3, 5  # of each conversation; of the row `prompts`


class Scale(Struct):
    """Tokens, and how many of what."""

    first: int = 8_192
    new: int = 128
    reply: int = 32
    conversations: int = 6
    cache: int = 131_072
    host: str = "24GiB"
    prompt: int = 1_024
    prompts: int = 64


SIZES = {"full": Scale(), "tiny": Scale(320, 80, 4, 2, 1_024, "16MiB", 96, 4)}


class Bench:
    """Engines that are started as they are needed, and the figures so far."""

    def __init__(self, given: argparse.Namespace, stack: AsyncExitStack) -> None:
        self.given, self.stack = given, stack
        self.scale = SIZES[given.size]
        self.figures: list[Figure] = []
        self.vocabulary = 0
        self._engines: dict[str, AsyncEngine] = {}
        self._random = random.Random(0)

    async def engine(self, name: str) -> AsyncEngine:
        """ "none" caches nothing, "cached" on the device alone, "host" below it, too."""
        if name not in self._engines:
            options: dict[str, Any] = {"model": str(self.given.model), "load": "dummy", "spare_worker": False}
            options |= {"kv_tokens": self.scale.cache, "max_running": 64, "prefix_cache": name != "none"}
            options |= {"kv_host": self.scale.host} if name == "host" else {}
            options |= {"threads": 1, "page_size": 8} if self.given.size == "tiny" else {"max_model_len": 32_768}
            engine = await self.stack.enter_async_context(AsyncEngine(**options))
            self.vocabulary = (await engine.front.ready()).vocab_size
            self._engines[name] = engine
        return self._engines[name]

    def text(self, tokens: int) -> list[int]:
        return [self._random.randrange(self.vocabulary // 2, self.vocabulary) for _ in range(tokens)]

    def say(self, *arguments: Any, **options: Any) -> None:
        self.figures.append(Figure(*arguments, **options))
        print(line(self.figures[-1]), flush=True)
        if self.given.json:
            self.given.json.write_text(json.dumps(to_builtins(self.figures), indent=1))

    async def talk(self, engine: AsyncEngine, away: bool = False) -> tuple[float, float]:
        """The median time to the first token of all turns but the first, and the share of their tokens that were
        cached. If they go `away`, others push them out of the device before each round."""
        scale, firsts, cached, tokens = self.scale, [], 0, 0
        await engine.front.flush()
        texts = [self.text(scale.first) for _ in range(scale.conversations)]
        for turn in range(TURNS):
            for _ in range(2 * scale.cache // scale.first if away and turn else 0):
                await asked(engine, self.text(scale.first), 1)
            for place, text in enumerate(texts):
                first, found, ids = await asked(engine, text, scale.reply)
                if turn:
                    firsts.append(first)
                    cached, tokens = cached + found, tokens + len(text)
                texts[place] = text + ids + self.text(scale.new)
        return statistics.median(firsts[1:]), cached / tokens

    # ── rows ─────────────────────────────────────────────────────────────────────────────────

    async def turns(self) -> None:
        theirs, none = await self.talk(await self.engine("none"))
        ours, share = await self.talk(await self.engine("cached"))
        assert not none, "an engine without a prefix cache has cached something"
        detail = f"{1e3 * ours:.1f} to {1e3 * theirs:.1f} ms, {share:.0%} cached"
        self.say("turns", "first token of a turn to computing all", ours / theirs, "x", "", detail)

    async def host(self) -> None:
        ours, share = await self.talk(await self.engine("host"), away=True)
        theirs, _ = await self.talk(await self.engine("none"))
        detail = f"{1e3 * ours:.1f} to {1e3 * theirs:.1f} ms, {share:.0%} cached"
        self.say("host", "first token of a turn from the host to computing", ours / theirs, "x", "", detail)

    async def prompts(self) -> None:
        engines = {name: await self.engine(name) for name in ("none", "cached")}
        ratios, rates = [], []
        for turn in range(REPEATS + 1):
            found = {name: await self.rate(engines[name]) for name in (sorted(engines) if turn % 2 else engines)}
            if turn:  # the first time, what is compiled late
                ratios.append(found["cached"] / found["none"])
                rates.append(found["cached"])
        detail = f"{shown(ratios, 3)}; {statistics.median(rates):.0f} tokens/s"
        self.say("prompts", "throughput with states kept to none", statistics.median(ratios), "x", "", detail)

    async def rate(self, engine: AsyncEngine) -> float:
        """Tokens a second, of prompts and replies, of prompts that come at once."""
        scale = self.scale
        texts = [self.text(scale.prompt) for _ in range(scale.prompts)]
        began = time.perf_counter()
        async with anyio.create_task_group() as group:
            for text in texts:
                group.start_soon(asked, engine, text, 64)
        return scale.prompts * (scale.prompt + 64) / (time.perf_counter() - began)


async def run(given: argparse.Namespace) -> list[Figure]:
    async with AsyncExitStack() as stack:
        bench = Bench(given, stack)
        for name in given.rows.split(","):
            await getattr(bench, name)()
    return bench.figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=Path("bench/configs/delta-4b"))
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    given = parser.parse_args()
    if unknown := set(given.rows.split(",")) - set(ROWS):
        raise SystemExit(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    figures = anyio.run(run, given, backend_options={"use_uvloop": True})
    print("\nrow      what                                               ours      bound")
    print("\n".join(map(line, figures)))


if __name__ == "__main__":
    main()
