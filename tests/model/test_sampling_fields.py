"""Sampling fields and log-probabilities on the real model.

Oracle: log_softmax in float64 of logits that one forward pass over prompt and reply gives.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from engine import Engine, Reply, SamplingParams
from engine.config import resolve
from engine.messages.control import Boot
from engine.messages.step import SlotAdmit
from engine.params.sampling import Sampling
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.testing.steps import step_plan
from engine.text.tokenizer import Text
from engine.worker.start import start
from engine.worker.steps.rows import Rows

COUNTING = "1, 2, 3, 4, 5, 6, 7,"
STORY = "Once upon a time, in a small village by the sea, there lived"
TEXT = Text(open_checkpoint(Plugins.load(()), "smollm2-135m").text())


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(model="smollm2-135m", max_model_len=512) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """Log-probabilities at each position of STORY and its greedy reply of eight tokens: float64 [T, V]."""
    with Engine(model="smollm2-135m", max_model_len=64) as engine:
        reply = engine.generate(STORY, SamplingParams(temperature=0, max_tokens=8))
    runner, _ = start(Boot(resolve({"model": "smollm2-135m", "max_model_len": 64})), 0.0)
    ids = [*TEXT.encode(STORY), *reply.ids]
    admit = SlotAdmit(0, np.array(ids, "<i4").tobytes(), Sampling(0.0, 0, 1.0, 0.0, 0))
    pages = [(0, index, index) for index in range(4)]
    runner.apply(step_plan(1, [], [admit], pages))
    with torch.inference_mode():
        hidden, _ = runner.compute(Rows.of(np.array([[0, 0, len(ids), 1]])))
        return runner.model.logits(hidden).double().log_softmax(-1)


def check(reply: Reply, expected: torch.Tensor, top: int) -> None:
    """Every log-probability, rank and likeliest id of prompt and reply."""
    ids = TEXT.encode(STORY)
    tokens = [*reply.prompt_logprobs, *reply.logprobs]
    assert [token.id for token in tokens] == [*ids, *reply.ids]
    assert tokens[0].logprob is None and not tokens[0].top
    for place, token in enumerate(tokens[1:]):
        row = expected[place]
        assert token.logprob == pytest.approx(float(row[token.id]), abs=2e-3)
        assert token.rank == pytest.approx(int((row > row[token.id]).sum()) + 1, abs=1)
        likeliest = row.topk(top)
        assert [one.logprob for one in token.top] == pytest.approx(likeliest.values.tolist(), abs=2e-3)
        assert len({one.id for one in token.top} - set(row.topk(top + 1).indices.tolist())) == 0
        assert [one.rank for one in token.top] == list(range(1, top + 1))
    assert "".join(token.text for token in reply.prompt_logprobs) == STORY
    assert b"".join(token.bytes for token in reply.logprobs).decode() == reply.text


ASK = SamplingParams(temperature=0, max_tokens=8, logprobs=5, prompt_logprobs=5)


def test_logprobs_are_log_softmax_of_the_models_logits(engine: Engine, expected: torch.Tensor) -> None:
    check(engine.generate(STORY, ASK), expected, 5)
    check(engine.generate(STORY, ASK), expected, 5)
    # Neither temperature nor penalties nor a neighbour's wishes show in them.
    others = [SamplingParams(temperature=1.5, max_tokens=12, logprobs=20, top_k=50)] * 2
    check(engine.generate([STORY, STORY, COUNTING], [ASK, *others])[0], expected, 5)


def test_logprobs_in_small_chunks_and_with_few_pages(expected: torch.Tensor) -> None:
    with Engine(model="smollm2-135m", max_model_len=64, max_step_tokens=5, kv_tokens=96, max_running=4) as engine:
        longer = SamplingParams(temperature=0, max_tokens=40, logprobs=0, prompt_logprobs=0)
        replies = engine.generate([STORY] * 4, [ASK, longer, longer, longer])
        assert engine.stats().retractions_total > 0
        check(replies[0], expected, 5)
        for reply in replies[1:]:
            assert len(reply.logprobs) == 40 and len(reply.prompt_logprobs) == len(TEXT.encode(STORY))


MANY = SamplingParams(
    temperature=0.9, seed=3, max_tokens=16, logprobs=2, repetition_penalty=1.2, frequency_penalty=0.3,
    presence_penalty=0.2, logit_bias={28: -2.0}, bad_words=("the", "village"), min_tokens=4, top_p=0.95,
)  # fmt: skip


def test_a_seeded_reply_does_not_depend_on_its_neighbours(engine: Engine) -> None:
    alone = engine.generate(STORY, MANY)
    others = [SamplingParams(temperature=1.0, max_tokens=20, logprobs=7, repetition_penalty=1.5)] * 3
    beside = engine.generate([COUNTING, STORY, STORY, COUNTING], [others[0], MANY, *others[1:]])[1]
    assert beside.ids == alone.ids
    assert [token.logprob for token in beside.logprobs] == pytest.approx(
        [token.logprob for token in alone.logprobs], abs=1e-3
    )


def test_each_field_does_what_it_says(engine: Engine) -> None:
    def reply(prompt: object, **fields: object) -> Reply:
        return engine.generate(prompt, SamplingParams(**{"temperature": 0, "max_tokens": 24, **fields}))

    assert reply(COUNTING).text.startswith(" 8, 9, 10")
    assert "9" not in reply(COUNTING, bad_words=("9",)).text
    assert reply(COUNTING, stop_regex=(r"1[0-9], 1",)).text == " 8, 9, "
    assert reply(COUNTING, stop=(" 8",), min_tokens=2).text != ""
    assert reply(COUNTING, logit_bias={33: 100.0}).ids == [33] * 24
    assert set(reply(COUNTING, allowed_token_ids=(34, 35)).ids) <= {34, 35}
    repeated = reply("a a a a a a a a a a", frequency_penalty=2.0)
    assert len(set(repeated.ids)) > len(set(reply("a a a a a a a a a a").ids))
    chat = [{"role": "user", "content": "Say hi."}]
    short = reply(chat, max_tokens=100)
    assert short.finish == "stop" and short.matched == 2
    long = reply(chat, max_tokens=100, min_tokens=len(short.ids) + 20)
    assert len(long.ids) >= len(short.ids) + 20 and 2 not in long.ids[: len(short.ids) + 20]
