"""What the router's index costs: operations a second, hashing beside it, and memory over an hour of traffic.

    nice python -m bench.router.index [--blocks 1000000] [--workers 64] [--hour REQUESTS_A_SECOND]

Prompts are of 16 to 128 blocks of 128 characters, 54 in the mean; most go on from one that came before, and 1 in 8 of
these goes to another worker than the rest. Figures are CPU time of one core, the median of five times 2,000 prompts
that are drawn from all, so that blocks come from memory, not from the processor's cache. An operation is to match a
prompt, or to insert it. The table is in C where it can be; ENGINE_CPU_KERNELS=0 measures the one in Python.
"""

import argparse
import os
import random
import statistics
import time
from array import array
from collections.abc import Callable, Sequence

from bench.lib.processes import resident
from engine.conversation.canonical import BLOCK, chained
from engine.plugin.registry import Plugins, resolve
from engine.plugin.routing import Arrival, RoutingPolicy, View
from engine.router.index import PrefixIndex

Prompt = tuple["array[int]", str]


def made_up(rng: random.Random, count: int) -> "array[int]":
    """So many blocks that nobody has."""
    return array("Q", rng.randbytes(8 * count))


def filled(blocks: int, workers: Sequence[str], rng: random.Random) -> tuple[PrefixIndex, list[Prompt]]:
    index = PrefixIndex(4 * blocks // len(workers))
    prompts: list[Prompt] = []
    while len(index) < blocks:
        count = rng.choice((16, 24, 32, 48, 64, 128))
        prompt, worker = made_up(rng, count), rng.choice(workers)
        if prompts and rng.random() < 0.7:
            before, home = rng.choice(prompts)
            prompt = before[: rng.randint(4, len(before))] + prompt[: count // 2]
            worker = worker if rng.random() < 0.125 else home
        prompts.append((prompt, worker))
        index.sent(prompt, worker)
        index.tidy(100)
    return index, prompts


def timed(name: str, run: Callable[[Prompt], object], prompts: list[Prompt], operations: int = 1) -> None:
    """Print what `run` takes for a prompt, of which each is `operations`."""
    seconds = []
    for turn in range(5):
        began = time.process_time()
        for prompt in prompts[turn * 2000 : (turn + 1) * 2000]:
            run(prompt)
        seconds.append((time.process_time() - began) / 2000)
    median = statistics.median(seconds)
    print(f"{name:46s} {1e6 * median:7.1f} us ({1e6 * min(seconds):.1f} - {1e6 * max(seconds):.1f}), "
          f"{operations / median:9,.0f} operations/s", flush=True)  # fmt: skip


def speed(blocks: int, workers: Sequence[str]) -> None:
    rng = random.Random(0)
    before = resident(os.getpid())
    index, prompts = filled(blocks, workers, rng)
    mean = statistics.mean(len(prompt) for prompt, _ in prompts)
    kept = sum(8 * len(prompt) for prompt, _ in prompts) / 2**20
    print(f"{len(index):,} blocks of {len(workers)} workers from {len(prompts):,} prompts of {mean:.0f} blocks; "
          f"{(resident(os.getpid()) - before - kept) * 2**20 / len(index):.0f} bytes a block")  # fmt: skip
    rng.shuffle(prompts)
    longer = {id(prompt): prompt + made_up(rng, 8) for prompt, _ in prompts[:10_000]}
    new = [(made_up(rng, round(mean)), worker) for _, worker in prompts[:10_000]]

    def grown(prompt: Prompt) -> None:
        whole = longer[id(prompt[0])]
        index.lengths(whole)
        index.sent(whole, prompt[1])

    def fresh(prompt: Prompt) -> None:
        index.lengths(prompt[0])
        index.sent(*prompt)

    timed("match", lambda prompt: index.lengths(prompt[0]), prompts)
    timed("insert what is there", lambda prompt: index.sent(*prompt), prompts[10_000:])
    timed("match and insert, 8 blocks more than before", grown, prompts, 2)
    timed("match and insert, all blocks new", fresh, new, 2)
    walked, began = len(index), time.process_time()
    index.removed(workers[0])
    while index.tidy(512):
        pass
    print(f"a walk over the table takes {1e6 * (time.process_time() - began) / walked:.2f} us a block")
    text = rng.randbytes(round(mean) * BLOCK // 2).hex()
    timed(f"hashing {len(text):,} characters", lambda _: chained(text), prompts)
    policy = made(1 << 24)
    views = [View(name, 1, 0, 256) for name in workers]
    arrivals = [Arrival("m", text[:k] + "." + text[k + 1 :]) for k in rng.sample(range(len(text)), 100)]
    turns = iter(range(100_000))

    def route(_: Prompt) -> None:
        arrival = arrivals[next(turns) % 100]
        choice = policy.choose(arrival, views)
        policy.sent(arrival, workers[choice.worker])
        policy.answered(arrival, workers[choice.worker], 0.9)

    timed("a request through cache_aware, hashing and all", route, prompts)


def made(chars: int) -> RoutingPolicy:
    policy: RoutingPolicy = resolve(Plugins.load(()).entries("routing")["cache_aware"].target)()
    policy.bound(chars)
    return policy


def hour(rate: float, workers: Sequence[str], chars: int) -> None:
    """An hour of requests, each of 1,024 tokens, half of which one of 1,000 prefixes is; nothing is asked but where."""
    policy, rng, views = made(chars), random.Random(0), [View(name, 1, 0, 256) for name in workers]
    prefixes = [rng.randbytes(1024).hex() for _ in range(1000)]
    index = policy.index  # type: ignore[attr-defined]
    print(f"an hour of {rate:g} requests/s, {chars:,} characters a worker at most")
    for number in range(int(rate * 3600) + 1):
        arrival = Arrival("m", rng.choice(prefixes) + rng.randbytes(1024).hex(), program=f"program {number // 4}")
        worker = workers[policy.choose(arrival, views).worker]
        policy.sent(arrival, worker)
        policy.answered(arrival, worker, 0.5)
        if number % 16 == 0:
            policy.tidy(0.0005)
        if number % int(rate * 300) == 0:
            print(f"  minute {number / rate / 60:3.0f}: {len(index):9,} blocks in the table, "
                  f"{resident(os.getpid()):6d} MiB in all, {time.process_time():5.0f} s of CPU",
                  flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--hour", type=float, metavar="REQUESTS_A_SECOND")
    parser.add_argument("--chars", type=int, default=1 << 22)
    options = parser.parse_args()
    workers = [f"http://worker-{number}:8000" for number in range(options.workers)]
    if options.hour:
        hour(options.hour, workers, options.chars)
    else:
        speed(options.blocks, workers)


if __name__ == "__main__":
    main()
