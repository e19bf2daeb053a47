"""Conversations with a recurrent model go on from states that are cached, and say what they would say without."""

from typing import Any

import numpy as np
import pytest
from oracle import TINY, tiny_model
from test_qwen3_5 import DELTA
from tiny_checkpoint import assert_same, save_checkpoint

from engine import Engine, Reply, SamplingParams

OPTIONS: dict[str, Any] = {"device": "cpu", "threads": 1, "max_model_len": 512, "max_running": 4, "spare_worker": False}
OPTIONS |= {"kv_tokens": 4096, "page_size": 8}
TURNS, SYSTEM, FIRST, NEXT = 3, 70, 90, 60  # tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    sizes = {**DELTA, "num_hidden_layers": 8, "max_position_embeddings": 512}  # of which two attend: one a stage
    save_checkpoint(tiny_model("Qwen3_5", **sizes), folder)
    return str(folder)


def talked(engine: Engine) -> list[Reply]:
    """Two conversations in turn, which begin alike."""
    draw = np.random.default_rng(0)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
    system = draw.integers(1, TINY["vocab_size"], SYSTEM).tolist()
    texts = [system + draw.integers(1, TINY["vocab_size"], FIRST).tolist() for _ in range(2)]
    replies = []
    for _ in range(TURNS):
        for place, text in enumerate(texts):
            replies.append(engine.generate([text], params)[0])
            more = draw.integers(1, TINY["vocab_size"], NEXT).tolist()
            texts[place] = text + replies[-1].ids + more
    return replies


@pytest.mark.parametrize("ranks", [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "dp_attention": 2}], ids=str)
def test_replies_from_cached_states_are_those_without(model: str, ranks: dict[str, int]) -> None:
    with Engine(model=model, **OPTIONS, **ranks) as engine:
        found = talked(engine)
    with Engine(model=model, **OPTIONS, prefix_cache=False) as engine:
        wanted = talked(engine)
    assert_same(found, wanted, 1e-3)
    assert [reply.cached_tokens for reply in wanted] == [0] * 2 * TURNS
    # Of a turn the state at the end of the first whole page of its reply is found by the next.
    ends = [-(-(SYSTEM + FIRST + turn * (12 + NEXT)) // 8) * 8 for turn in range(TURNS - 1)]
    assert [reply.cached_tokens for reply in found] == [0, 0, *(end for end in ends for _ in range(2))]


def test_a_beginning_that_texts_share_is_found_by_the_third(model: str) -> None:
    draw = np.random.default_rng(1)
    system = draw.integers(1, TINY["vocab_size"], 100).tolist()
    texts = [system + draw.integers(1, TINY["vocab_size"], 30).tolist() for _ in range(4)]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with Engine(model=model, **OPTIONS) as engine:
        one_by_one = [engine.generate([text], params)[0] for text in texts]
    assert [reply.cached_tokens for reply in one_by_one] == [0, 0, 96, 96]
    with Engine(model=model, **OPTIONS, prefix_cache=False) as engine:
        assert [reply.ids for reply in engine.generate(texts, params)] == [reply.ids for reply in one_by_one]
