"""What a request has held is free when it is over, without the garbage collector, and goes back to the system."""

import gc
import subprocess
import sys
import tracemalloc
from typing import Any

import pytest
from test_http_routes import open_site

pytestmark = pytest.mark.anyio
LARGE = 2**18
LONG = "x" * LARGE
MESSAGES = [{"role": "user", "content": LONG}]


REFUSED: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/chat/completions", {"messages": MESSAGES, "temperature": 9}, 400),
    ("/v1/chat/completions", {"messages": MESSAGES, "nonsense": 9}, 400),
    ("/v1/chat/completions", {"messages": MESSAGES}, 400),
    ("/v1/completions", {"prompt": ["a", LONG], "n": 2}, 400),
    ("/v1/responses", {"input": LONG}, 400),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5}, 400),
    ("/generate", {"text": LONG}, 400),
    ("/v1/embeddings", {"input": [LONG]}, 400),
    ("/v1/score", {"text_1": "a", "text_2": ["b", LONG]}, 400),
    ("/tokenize", {"prompt": "a", "chat_template": LONG}, 400),
    ("/nowhere", {"a": LONG}, 404),
]


@pytest.mark.parametrize("vectors", [0, 8])
async def test_a_refused_body_is_free_at_once(vectors: int) -> None:
    """The connection stays open, and waits for its next request."""
    async with open_site(embedding_size=vectors) as site:
        asked = [each for each in REFUSED if (each[0] in ("/v1/embeddings", "/v1/score")) == bool(vectors)]
        for path, body, status in asked:
            assert (await site.post(path, body))[0] == status
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            for path, body, status in asked:
                before = tracemalloc.get_traced_memory()[0]
                for _ in range(7):
                    assert (await site.post(path, body))[0] == status
                # What read and tokenized the last ones may still hold these; a leak holds all seven.
                assert tracemalloc.get_traced_memory()[0] - before < 4 * LARGE, path
        finally:
            tracemalloc.stop()
            gc.enable()


async def test_many_requests_leave_nothing() -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "n": 2},
        "/v1/completions": {"prompt": "a", "max_tokens": 2, "logprobs": 1},
        "/v1/responses": {"input": "a", "max_output_tokens": 2, "store": False},
        "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
        "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 2}},
        "/tokenize": {"prompt": "a"},
        "/v1/embeddings": {"input": "a"},  # refused
    }

    async def ask_all() -> None:
        for path, body in bodies.items():
            await site.post(path, body)

    async with open_site() as site:
        for _ in range(3):
            await ask_all()
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(40):
            await ask_all()
        await site.house.settled()
        gc.collect()
        assert len(gc.get_objects()) - before < 40 * len(bodies) // 4  # one object for four requests would be a leak


MEASURE = """
import sys
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024
"""
BLOCKS = """
from engine.plugin.checkpoints import open_checkpoint
from engine.runtime.allocator import give_back_large_blocks
assert give_back_large_blocks()
del (large := [bytes(31 * 2**20)])[:]
before, small = resident(), []
for _ in range(10):  # each with small blocks behind it
    large = [b"x" * (20 * 2**20) for _ in range(4)]
    small += [bytes(5000) for _ in range(10)]
    del large
print(resident() - before)
"""
WORDS = """
import random
from engine.plugin.registry import Plugins
from engine.plugin.checkpoints import open_checkpoint
from engine.text.tokenizer import Text
text = Text(open_checkpoint(Plugins.load(), "echo").text())
before = resident()
for _ in range(12_000):
    text.encode("".join(random.choices("abcdefgh", k=250)), False)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and is about the C library of Linux")
@pytest.mark.parametrize(("code", "most"), [(BLOCKS, 30), (WORDS, 50)])
def test_resident_memory_is_bounded(code: str, most: float) -> None:
    """In MiB. Without the bounds, freed blocks keep 80 or more and the tokenizer's cache of words takes 75."""
    done = subprocess.run([sys.executable, "-c", MEASURE + code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < most


def test_what_a_process_has_once_it_serves_is_not_collected_again() -> None:
    script = """
import gc
from engine.runtime.allocator import keep_for_good
kept = [[] for _ in range(1000)]
assert gc.get_freeze_count() == 0
keep_for_good()
assert gc.get_freeze_count() > 1000
assert not any(each is kept for each in gc.get_objects())
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_core_of_its_own_keeps_what_it_has_once_its_front_knows_that_the_worker_is_ready() -> None:
    """And not again where another worker takes the place of one that died: requests are under way then."""
    script = """
import asyncio, gc
from engine.messages.control import Stats, WorkerReady
from engine.runtime.core import ToServing

class Front:
    async def send(self, message):
        told.append((type(message).__name__, gc.get_freeze_count() > 1000))

told = []
front = ToServing(Front())
ready = WorkerReady(100, 16, 8, 2048, 2048, 1000, 1024, "cpu", "torch", {})
for message in (Stats("starting"), ready, Stats("ready")):
    asyncio.run(front.send(message))
assert told == [("Stats", False), ("WorkerReady", False), ("Stats", True)], told
frozen = gc.get_freeze_count()
kept = [[] for _ in range(1000)]
asyncio.run(front.send(ready))
assert gc.get_freeze_count() <= frozen
"""
    subprocess.run([sys.executable, "-c", script], check=True)
