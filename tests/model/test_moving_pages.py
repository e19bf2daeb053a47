"""The real model with a device cache of 64 pages, so that everything moves: the same ids as without tiers."""

from pathlib import Path
from typing import Any

import numpy as np

from engine import Engine, Reply, SamplingParams

ODD_STORE = str(Path(__file__).parents[1] / "lib" / "odd_store.py")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
OPTIONS: dict[str, Any] = {"model": "smollm2-135m", "max_model_len": 400, "kv_tokens": 1024, "max_running": 3}


def prompts() -> list[list[int]]:
    """Together more than the device has room for; the last two share their beginning."""
    draw = np.random.default_rng(0)
    texts = [draw.integers(1000, 40_000, 262).tolist() for _ in range(5)]
    return [*texts, [*texts[-1][:220], *draw.integers(1000, 40_000, 45).tolist()]]


def test_whatever_moves_replies_are_the_same() -> None:
    """And half of the pages that the store is given it forgets."""
    with Engine(**OPTIONS) as engine:
        wanted = [reply.ids for reply in engine.generate(prompts(), [GREEDY] * 6)]
    with Engine(**OPTIONS, kv_host="68MiB", kv_disk="odd:1GiB", plugins=(ODD_STORE,)) as engine:
        for _ in range(2):
            replies: list[Reply] = engine.generate(prompts(), [GREEDY] * 6)
            assert [reply.ids for reply in replies] == wanted
        assert sum(reply.cached_tokens for reply in replies) > 3 * 240
        engine.generate([5], GREEDY)  # whose end brings the figures up to date
        tiers = engine.stats().tiers
    assert tiers is not None and tiers.down >= 75 and tiers.kept > 10
    assert tiers.from_host > 30 and tiers.failed > 10
    assert tiers.stores == {"pages_written": tiers.kept}
