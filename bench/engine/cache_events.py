"""CPU time that it takes to tell routers what is cached: of the scheduler's, and of what a front does with a prompt.

    python -m bench.engine.cache_events [--requests 2000] [--turns 7] [--json FILE]

`scheduler` is admit, plan and commit alone, of requests of 512 tokens in 64 conversations that share 384 of them, 8
tokens each, in a cache that holds a quarter of them, so that pages are evicted all along. `front` is Admission.admit,
which renders, checks and encodes: of conversations of the default model's. Figures are CPU microseconds of a request,
medians over turns in which each kind has its own: `off` names no blocks; `on` does; `read` has a reader that takes the
changes each 64 steps.
"""

import argparse
import json
import random
import statistics
import time
from array import array
from collections.abc import Callable
from pathlib import Path

from bench.lib.figures import shown
from engine.actors.tokenizer import Admission
from engine.cache.blocks import HeldBlocks
from engine.cache.log import CacheLog
from engine.conversation.canonical import chained
from engine.conversation.parts import said
from engine.messages.cache import Blocks
from engine.messages.request import Admit, Generate
from engine.params.sampling import Sampling, SamplingParams
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.sched import Scheduler
from engine.sched.policies import make_policy
from engine.testing.fake import FakeDevice
from engine.text.tokenizer import Text

PAGE, TOKENS, SHARED, CONVERSATIONS, NEW = 16, 512, 384, 64, 8
BLOCK_TOKENS = 32  # that a block of 128 characters has
READ_STEPS = 64
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "comes", "back", "after", "12", "days")
KINDS = ("off", "on", "read")


def admits(requests: int, *, named: bool) -> list[Admit]:
    """The same requests each time, with the blocks that a front would send."""
    rng = random.Random(0)
    stems = [[rng.randrange(50_000) for _ in range(SHARED)] for _ in range(CONVERSATIONS)]
    made = []
    for number in range(requests):
        ids = array("i", [*rng.choice(stems), *(rng.randrange(50_000) for _ in range(TOKENS - SHARED))])
        blocks = None
        if named:
            hashes = chained(ids.tobytes().decode("latin-1"))
            ends = array("i", range(BLOCK_TOKENS, len(ids) + 1, BLOCK_TOKENS))
            blocks = Blocks(b"", hashes.tobytes(), ends.tobytes())
        made.append(Admit(str(number), ids.tobytes(), Sampling(0.0, 0, 1.0, 0.0, 0), (), NEW, blocks=blocks))
    return made


def scheduler(requests: int, kind: str) -> float:
    """Microseconds of a request."""
    waiting = admits(requests, named=kind != "off")
    log = CacheLog()
    held = None if kind == "off" else HeldBlocks(log)
    pages = CONVERSATIONS * TOKENS // PAGE // 4
    policy = make_policy(Plugins.load(()), "fcfs")
    logic = Scheduler(
        pages,
        PAGE,
        16,
        max_model_len=4096,
        max_step_tokens=2048,
        policy=policy,
        prefix_cache=True,
        max_waiting=requests,
        held=held,
    )
    device, told, steps, seconds = FakeDevice(), 0, 0, 0.0
    began = time.process_time()
    for admit in waiting:
        logic.admit(admit)
    while True:
        plan = logic.plan()
        if plan is None:
            break
        paused = time.process_time()
        done = device.step(plan)
        seconds -= time.process_time() - paused
        logic.commit(done)
        steps += 1
        if kind == "read" and held is not None and not steps % READ_STEPS:
            told = log.since(told, held).number
    return (time.process_time() - began + seconds) / requests * 1e6


def front(characters: int, kind: str, text: Text, repeat: int) -> float:
    """Microseconds of a conversation of so many characters."""
    admission = Admission(text, named=kind != "off")
    admission.max_model_len = 1 << 20
    rng = random.Random(0)
    each = max(200, characters // 100)
    messages = [said("system", "You are a helpful assistant, and answer in short sentences.")]
    while sum(len(message.text) for message in messages) < characters:
        said_here = " ".join(rng.choice(WORDS) for _ in range(each // 5))
        messages.append(said("user" if len(messages) % 2 else "assistant", said_here))
    request = Generate("r", SamplingParams(max_tokens=1), messages=messages)
    admission.admit(request)
    began = time.process_time()
    for _ in range(repeat):
        admission.admit(request)
    return (time.process_time() - began) / repeat * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    text = Text(open_checkpoint(Plugins.load(()), "smollm2-135m").text())
    rows: dict[str, tuple[tuple[str, ...], Callable[[str], float]]] = {
        "scheduler": (KINDS, lambda kind: scheduler(options.requests, kind)),
        "front, 2,000 characters": (KINDS[:2], lambda kind: front(2_000, kind, text, 100)),
        "front, 100,000 characters": (KINDS[:2], lambda kind: front(100_000, kind, text, 4)),
    }
    figures: dict[str, dict[str, list[float]]] = {}
    for name, (kinds, measure) in rows.items():
        values = figures[name] = {kind: [] for kind in kinds}
        for turn in range(options.turns + 1):
            for kind in kinds if turn % 2 else kinds[::-1]:
                spent = measure(kind)
                if turn:  # the first warms up
                    values[kind].append(spent)
    print(f"CPU microseconds of a request, {options.turns} turns, median (min - max)")
    for name, values in figures.items():
        for kind, taken in values.items():
            ratio = statistics.median(one / off for one, off in zip(taken, values["off"], strict=True))
            print(f"  {name:26s} {kind:5s} {shown(taken):32s} to off {ratio:.3f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
