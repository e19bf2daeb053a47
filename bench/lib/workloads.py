"""The workloads on which the peers were measured: (prompt ids, tokens to generate), seeded and so always the same."""

import random
from collections.abc import Iterable
from typing import Any

Work = list[tuple[list[int], int]]
IDS = 100_000  # prompts use no higher ids


def prompt(rng: random.Random, count: int, vocab: int) -> list[int]:
    return [rng.randrange(min(vocab, IDS)) for _ in range(count)]


def same(rng: random.Random, requests: int, tokens: int, reply: int, vocab: int) -> Work:
    """`requests` of `tokens` in and `reply` out."""
    return [(prompt(rng, tokens, vocab), reply) for _ in range(requests)]


def warm_up(vocab: int) -> Work:
    """Small and larger prompts, before anything is timed."""
    rng = random.Random(1)
    return same(rng, 64, 200, 24, vocab) + same(rng, 32, 1000, 8, vocab)


def nano(vocab: int, repetition: int) -> Work:
    """256 requests of 100 to 1,024 tokens in and out: nano-vllm's benchmark, the same in each repetition."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10_000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    return [(ids, rng.randint(100, 1024)) for ids in prompts]


def throughput(vocab: int, repetition: int) -> Work:
    return same(random.Random(100 + repetition), 256, 1024, 256, vocab)


def prefill(vocab: int, repetition: int) -> Work:
    return same(random.Random(200 + repetition), 128, 1024, 1, vocab)


def long_prompts(vocab: int, repetition: int) -> Work:
    """Eight prompts of 24,000 tokens."""
    return same(random.Random(1000 + repetition), 8, 24_000, 1, vocab)


def longest_prompt(vocab: int, repetition: int) -> Work:
    """One of 128,000 tokens."""
    return same(random.Random(1100 + repetition), 1, 128_000, 1, vocab)


def latency(vocab: int, repetition: int) -> tuple[Work, Work]:
    """One request of one token, then another of 256: the second less the first is 255 steps."""
    rng = random.Random(300 + repetition)
    return same(rng, 1, 128, 1, vocab), same(rng, 1, 128, 256, vocab)


def decode_step(vocab: int, batch: int, repetition: int) -> tuple[Work, Work]:
    """`batch` requests of one token, then others of 129: the second less the first is 128 steps."""
    rng = random.Random(400 + batch * 10 + repetition)
    return same(rng, batch, 128, 1, vocab), same(rng, batch, 128, 129, vocab)


def long_context(vocab: int, batch: int) -> tuple[Work, Work]:
    """Ours alone: `batch` prompts of 8,192 tokens, with one token each, then the same with 33."""
    prompts = [ids for ids, _ in same(random.Random(700 + batch), batch, 8192, 1, vocab)]
    return [(ids, 1) for ids in prompts], [(ids, 33) for ids in prompts]


def short(vocab: int, repetition: int) -> Work:
    """Ours alone: short replies, in whose steps prompts and decode rows meet."""
    return same(random.Random(800 + repetition), 512, 256, 32, vocab)


def arrivals(vocab: int, repetition: int) -> tuple[Work, Work]:
    """Ours alone: 128 replies of 256 tokens, and 40 short requests that come while they run."""
    rng = random.Random(900 + repetition)
    return same(rng, 128, 128, 256, vocab), same(rng, 40, 200, 8, vocab)


def shared_prefix(vocab: int, repetition: int) -> tuple[Work, Work]:
    """8 groups of 32 prompts that share 2,048 tokens, in random order; then the same prefixes with other tails."""
    rng = random.Random(500 + repetition)
    prompts: list[list[int]] = []
    for _ in range(8):
        prefix = prompt(rng, 2048, vocab)
        prompts += [prefix + prompt(rng, 128, vocab) for _ in range(32)]
    rng.shuffle(prompts)
    cold = [(ids, 128) for ids in prompts]
    return cold, [(ids[:2048] + prompt(rng, 128, vocab), 128) for ids in prompts]


def constrained(vocab: int, repetition: int) -> Work:
    return same(random.Random(600 + repetition), 256, 128, 256, vocab)


def tokens_out(work: Iterable[tuple[list[int], int]]) -> int:
    return sum(count for _, count in work)


# The schema of `constrained`, and a kinder one: strings and integers without bounds.
JSON_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 64,
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["id", "name", "kind", "ok", "tags"],
        "properties": {
            "id": {"type": "integer", "minimum": 0, "maximum": 9999},
            "name": {"type": "string", "maxLength": 20},
            "kind": {"enum": ["alpha", "beta", "gamma", "delta"]},
            "ok": {"type": "boolean"},
            "tags": {"type": "array", "items": {"enum": ["x", "y", "z"]}, "maxItems": 3},
        },
    },
}
EASY_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 64,
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["id", "name", "kind", "ok"],
        "properties": {
            "id": {"type": "integer"},
            "name": {"type": "string"},
            "kind": {"enum": ["alpha", "beta", "gamma", "delta"]},
            "ok": {"type": "boolean"},
        },
    },
}
