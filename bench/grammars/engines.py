"""What grammars cost by themselves, on a CPU: to compile one, and to make the mask of a token, for each engine.

    python -m bench.grammars.engines [--vocabulary 151936] [--rows 256] [--threads N] [--tokens 150]
                                      [--only easy,hard,...]

A made-up vocabulary (synthetic.py); replies are drawn at random from what the masks let through, as a model without
training would. `a mask` is of one row by itself; `a step` fills the masks of `--rows` replies that began together, on
`--threads`, which is what a step of that batch waits for if it is longer than the model takes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from bench.lib import synthetic, workloads
from engine.errors import RequestError
from engine.grammars.closed import prepared
from engine.grammars.engines import grammar_engines
from engine.params.grammar import Grammar
from engine.plugin.hookspecs import GrammarEntry
from engine.plugin.registry import Plugins, resolve
from engine.plugin.specs import CompiledGrammar, GrammarEngine, Vocabulary
from engine.runtime.processors import processors

SCHEMAS: dict[str, Any] = {
    "hard": workloads.JSON_SCHEMA,
    "easy": workloads.EASY_SCHEMA,
    "strings": {"type": "object", "required": ["a"], "properties": {"a": {"type": "string"}, "b": {"type": "string"}}},
    "long": {"type": "object", "required": ["a"], "properties": {"a": {"type": "string", "maxLength": 200}}},
    "pattern": {
        "type": "object",
        "required": ["a", "d", "n"],
        "properties": {
            "a": {"type": "string", "pattern": "^[a-z]{3,40}$"},
            "d": {"type": "string", "format": "date"},
            "n": {"type": "number", "minimum": 0, "maximum": 100},
        },
    },
    "object": {"type": "object"},
}  # fmt: skip


class Walk(Struct):
    """Replies under one grammar, drawn at random from what may come."""

    engine: GrammarEngine
    matchers: list[Any]
    masks: np.ndarray
    ends: frozenset[int]
    rng: np.random.Generator

    def step(self) -> float:
        """One token for each; seconds for the masks."""
        began = time.perf_counter()
        self.engine.fill(self.matchers, self.masks, range(len(self.matchers)))
        seconds = time.perf_counter() - began
        tokens = [self._draw(self.masks[row]) for row in range(len(self.matchers))]
        going = [row for row, token in enumerate(tokens) if token not in self.ends]
        self.engine.accept([self.matchers[row] for row in going], [tokens[row] for row in going])
        self.matchers = [self.matchers[row] for row in going]
        return seconds

    def _draw(self, mask: np.ndarray) -> int:
        return int(self.rng.choice(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))))


def walk(engine: GrammarEngine, compiled: CompiledGrammar, words: Vocabulary, rows: int, tokens: int) -> list[float]:
    """Seconds of each step of `rows` replies, or of those that have not ended."""
    masks = np.zeros((rows, -(-len(words.tokens) // 32)), np.int32)
    matchers = [compiled.matcher() for _ in range(rows)]
    walking = Walk(engine, matchers, masks, frozenset(words.eos_ids), np.random.default_rng(0))
    times: list[float] = []
    while walking.matchers and len(times) < tokens:
        times.append(walking.step())
    return times


def spread(times: Sequence[float], unit: float) -> str:
    """Mean, median, the worst of a hundred, and the worst."""
    ordered = sorted(times)
    picked = (statistics.fmean(times), ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100], ordered[-1])
    return " ".join(f"{seconds / unit:>8.1f}" for seconds in picked)


def measure(entry: GrammarEntry, words: Vocabulary, given: argparse.Namespace, names: Sequence[str]) -> None:
    began = time.perf_counter()
    engine: GrammarEngine = resolve(entry.target)(words, threads=given.threads, whitespace=False)
    print(f"{entry.name}: {time.perf_counter() - began:.2f} s for the vocabulary", flush=True)
    for name in names:
        grammar = prepared(Grammar("json_schema", json.dumps(SCHEMAS[name])))
        began = time.perf_counter()
        try:
            compiled = engine.compile(grammar)
        except RequestError as error:
            print(f"  {name:8} {error}")
            continue
        seconds = time.perf_counter() - began
        alone = [each for _ in range(4) for each in walk(engine, compiled, words, 1, given.tokens)]
        steps = walk(engine, compiled, words, given.rows, given.tokens)
        print(f"  {name:8} {1e3 * seconds:>9.1f} |{spread(alone, 1e-6)} |{spread(steps, 1e-3)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--threads", type=int, default=max(1, processors() - 1))
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--only", default=",".join(SCHEMAS))
    given = parser.parse_args()
    tokens = synthetic.tokens(given.vocabulary - 1)
    words = Vocabulary([*tokens, b"<end>"], frozenset({len(tokens)}), (len(tokens),))
    print(f"{len(words.tokens)} tokens, {given.threads} threads; mean, median, p99 and most")
    print(f"  {'':8} {'compile':>9} |{'a mask, us':>35} |{f'a step of {given.rows} rows, ms':>35}")
    for entry in grammar_engines(Plugins.load()):
        measure(entry, words, given, given.only.split(","))


if __name__ == "__main__":
    main()
