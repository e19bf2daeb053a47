"""Programs on the real model: the examples, selects by hand-made scores, and the same over HTTP."""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_server import served
from smollm2 import COUNTING, FRANCE

from engine import Engine, SamplingParams
from engine.lang import (
    Server,
    State,
    assistant,
    function,
    gen,
    gen_int,
    greedy_token_selection,
    select,
    token_length_normalized,
    unconditional_likelihood_normalized,
    user,
)

EXAMPLES = Path(__file__).parents[2] / "examples/language"
SCORES = SamplingParams(max_tokens=0, prompt_logprobs=0)
CHOICES = [" Paris", " Lyon", " the city of light"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(model="smollm2-135m", max_model_len=512) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Server]:
    with served(engine) as server:
        yield server


@function
def everything(s: State) -> None:
    s += user("What is the capital of France?") + assistant("It is" + select("city", [" Lyon", " Paris"]) + ".")
    s += user("How many days has a week?") + assistant(gen_int("days", max_tokens=4))
    s += user("Count.") + assistant(COUNTING[:6] + gen("count", max_tokens=6))


def test_a_program_is_the_same_on_an_engine_and_on_its_server(engine: Engine, server: Server) -> None:
    local, remote = (everything.run(backend=backend, temperature=0) for backend in (engine, server))
    assert local["city"] == " Paris" and int(local["days"]) and local["count"].startswith("3, 4")
    assert remote.messages() == local.messages()
    chats = [{"role": "user", "content": "What is the capital of France?"}]
    chats += [
        {"role": "assistant", "content": "It is Paris."},
        {"role": "user", "content": "How many days has a week?"},
    ]
    asked = SamplingParams(temperature=0, max_tokens=4, regex=r"[-+]?[0-9]+[ \n]*", stop=(" ", "\n"))
    assert engine.generate(chats, asked).text == local["days"], "as the calls one by one"


@pytest.mark.parametrize(
    ("method", "best"),
    [
        (token_length_normalized, " Paris"),
        (greedy_token_selection, " Paris"),
        (unconditional_likelihood_normalized, " the city of light"),
    ],
)
def test_a_select_has_the_scores_of_whole_prompts(engine: Engine, server: Server, method: Any, best: str) -> None:
    @function
    def program(s: State) -> None:
        s += FRANCE + select("city", CHOICES, choices_method=method)

    prompt, *wholes = engine.generate([FRANCE, *(FRANCE + choice for choice in CHOICES)], SCORES)
    for backend in (engine, server) if method.needs_alone else (engine,):
        s = program.run(backend=backend)
        meta = s.get_meta_info("city")
        assert s["city"] == best
        for reply, scores in zip(wholes, meta.scores, strict=True):
            whole = reply.prompt_logprobs[len(prompt.prompt_logprobs) :]
            assert scores.ids == [token.id for token in whole]
            assert scores.logprobs == pytest.approx([token.logprob for token in whole], abs=2e-3)
            if method.needs_alone:
                alone = engine.generate(scores.ids, SCORES).prompt_logprobs
                assert scores.alone == pytest.approx([token.logprob or 0 for token in alone], abs=2e-3)


def test_a_token_across_the_end_of_the_prompt_is_healed(engine: Engine) -> None:
    """ "capit" + "al" is one token, which the prompt alone does not have."""

    @function
    def program(s: State) -> None:
        s += "Paris is the capit" + select("end", ["al of France", " of"])

    s = program.run(backend=engine)
    meta = s.get_meta_info("end")
    whole = engine.generate("Paris is the capital of France", SCORES).prompt_logprobs
    assert s["end"] == "al of France"
    assert meta.scores[0].ids == [token.id for token in whole[3:]]
    assert meta.scores[0].logprobs == pytest.approx([token.logprob for token in whole[3:]], abs=2e-3)
    assert whole[3].text == " capital"
    assert np.mean(meta.scores[0].logprobs) > np.mean(meta.scores[1].logprobs)


# ── examples/language ────────────────────────────────────────────────────────────────────────


def test_the_conversation(engine: Engine) -> None:
    example = runpy.run_path(str(EXAMPLES / "conversation.py"))
    s = example["guide"].run(example["QUESTIONS"][:2], backend=engine, temperature=0)
    assert "Paris" in s["answer 0"] and s.usage.calls == 2
    assert s.get_meta_info("answer 1").cached_tokens > s.get_meta_info("answer 0").prompt_tokens - 16


def test_the_classification(engine: Engine) -> None:
    example = runpy.run_path(str(EXAMPLES / "classification.py"))
    states = example["topic"].run_batch([{"text": text} for text in example["TEXTS"][:2]], backend=engine)
    assert [s["label"] for s in states] == [" food", " travel"]
    assert all(s.usage.cached_tokens >= 2 * 64 for s in states)


def test_the_extraction(engine: Engine) -> None:
    example = runpy.run_path(str(EXAMPLES / "extraction.py"))
    s = example["people"].run(example["TEXTS"][:2], backend=engine, temperature=0)
    assert [json.loads(text) for text in s["person"]] == [{"name": "Maria", "age": 34}, {"name": "Tom", "age": 52}]


def test_the_tree_of_thought(engine: Engine) -> None:
    example = runpy.run_path(str(EXAMPLES / "tree_of_thought.py"))
    s = example["solve"].run(example["QUESTION"], 2, 1, backend=engine, temperature=0.7)
    first, second = s["found"]
    assert first[0] >= second[0] and first[2] != second[2]
    assert all(answer in (" yes", " no") for _, answer, _, _ in s["found"])
    assert s.usage.calls == 2 + 2 + 2 * 2 and s.usage.cached_tokens > 0.8 * s.usage.prompt_tokens


def test_the_agent_and_its_tool(engine: Engine) -> None:
    example = runpy.run_path(str(EXAMPLES / "react.py"))
    assert [example["calculate"](text) for text in ("2 * 3 + 4", "7 / 2", "1 / 0")] == [
        "10",
        "3.5",
        "Error: division by zero",
    ]
    s = example["solve"].run(example["QUESTIONS"][0], backend=engine, temperature=0)
    assert s["observed"][0] == "12 * 34 = 408" and "408" in s["answer"]


def test_the_retrieval(engine: Engine) -> None:
    example = runpy.run_path(str(EXAMPLES / "retrieval.py"))
    found = example["passages"](example["PAGES"])
    assert len(found) > 10 and all(80 < len(each) <= 500 for each in found)
    notes = [
        "The night train to Vienna leaves at ten.",
        "Roots take up water, which rises to the leaves.",
        "Bread needs flour.",
    ]
    assert example["nearest"]("How do trees drink?", notes)[0] == notes[1]
    s = example["answer"].run(notes[1:2], "What do roots take up?", backend=engine, temperature=0)
    assert "water" in s["answer"] and s.get_meta_info("quote").cached_tokens >= 32
