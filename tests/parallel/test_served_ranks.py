"""Two ranks behind one server: `--tp 2` replies as `--tp 1`, by the same actors, and outlives the death of a rank.

A tiny seeded Llama is written to a directory first, whose heads two ranks can divide."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from oracle import tiny_model
from restarts import restarted
from test_processes import children
from tiny_checkpoint import ASKED, assert_same, save_checkpoint

from engine import AsyncEngine, Engine, EngineError, Reply, SamplingParams

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc"),
]
OPTIONS: dict[str, Any] = {"device": "cpu", "threads": 1, "max_running": 4, "kv_tokens": 1024, "page_size": 4}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8], [1, 6, 1, 8] * 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny Llama whose vocabulary two ranks divide between words of a mask."""
    folder = tmp_path_factory.mktemp("llama")
    changes = {"num_attention_heads": 4, "tie_word_embeddings": False, "vocab_size": 128, "eos_token_id": 127}
    save_checkpoint(tiny_model("Llama", **changes), folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[int]]:
    """What one worker replies to each prompt."""
    with Engine(model=str(folder), **OPTIONS) as engine:
        return [reply.ids for reply in engine.generate(PROMPTS, GREEDY)]


@pytest.mark.anyio
async def test_two_ranks_reply_as_one_and_are_started_again_as_one(folder: Path, alone: list[list[int]]) -> None:
    assert len({token for ids in alone for token in ids}) > 4  # decided, and not all alike
    before = set(children(os.getpid()))
    async with AsyncEngine(model=str(folder), tp=2, **OPTIONS) as engine:
        with anyio.fail_after(120):
            for _ in range(2):
                assert [reply.ids for reply in await engine.generate(PROMPTS, GREEDY)] == alone
                workers = sorted(pid for pid, name in children(os.getpid()).items() if name == "engine.worker")
                workers = [pid for pid in workers if pid not in before]
                assert len(workers) == 2
                os.kill(workers[1], signal.SIGKILL)
                assert (await restarted(engine, PROMPTS[0], GREEDY)).ids == alone[0]
    assert set(children(os.getpid())) == before


KILLED = """
import json, os, signal, sys
from engine import Engine

with Engine(model=sys.argv[1], tp=2, **json.loads(sys.argv[2])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file that ranks meet at has a name")
def test_a_killed_engine_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(folder), json.dumps(OPTIONS)]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(tmp_path)}, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("engine-*"))


def test_heads_that_ranks_cannot_divide_are_refused_with_both_numbers(folder: Path) -> None:
    with pytest.raises(EngineError, match=r"rank \d of 3: .* 3 ranks"), Engine(model=str(folder), tp=3, **OPTIONS):
        pass


def test_whatever_is_asked_two_ranks_reply_as_one(folder: Path) -> None:
    """Together, in steps where some rows need all logits and others do not, and each kind alone."""
    said: list[list[Reply]] = []
    for tp in (1, 2):
        with Engine(model=str(folder), tp=tp, **{**OPTIONS, "max_running": 16}) as engine:
            said.append(engine.generate([PROMPTS[0]] * len(ASKED), list(ASKED.values())))
            said[-1] += [engine.generate(PROMPTS[1], params) for params in ASKED.values()]
    assert_same(said[1], said[0])
    assert len({tuple(reply.ids) for reply in said[0]}) > len(ASKED)


def test_two_ranks_move_their_parts_of_pages_between_tiers_and_reply_as_one(tmp_path: Path) -> None:
    """The device has room for one of the prompts. Ranks that start anew find what those before them left on disk."""
    changes = {"num_attention_heads": 4, "vocab_size": 128, "eos_token_id": 127, "max_position_embeddings": 320}
    save_checkpoint(tiny_model("Llama", **changes), tmp_path)
    long = [[*range(start, start + 70)] * 4 for start in (1, 11, 21)]
    options = {**OPTIONS, "model": str(tmp_path), "kv_tokens": 304, "max_model_len": 300}
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with Engine(**options) as engine:
        alone = [engine.generate(prompt, params).ids for prompt in long]
    options |= {"kv_host": "1MiB", "kv_disk": f"{tmp_path / 'kv'}:64MiB"}
    with Engine(tp=2, **options) as engine:
        for _ in range(2):
            assert [engine.generate(prompt, params).ids for prompt in long] == alone
        again = engine.generate(long[0], params)
        assert (again.ids, again.cached_tokens) == (alone[0], 276)
        tiers = engine.stats().tiers
    assert tiers is not None and tiers.from_host >= 3 * 60 and tiers.failed == 0
    with Engine(tp=2, kv_fetch="always", **options) as engine:
        assert [engine.generate(prompt, params).ids for prompt in long] == alone
        tiers = engine.stats().tiers
    assert tiers is not None and tiers.from_store >= 60 and tiers.failed == 0
