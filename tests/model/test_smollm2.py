"""The real model through the real engine: exact greedy ids, however the work is cut up and shared.

What is expected is in smollm2.py.
"""

from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import anyio
import numpy as np
import openai
import pytest
import torch
from smollm2 import COUNTING, COUNTING_IDS, FRANCE, FRANCE_LOGITS, GREEDY, LETTERS, LETTERS_IDS, OTHERS

from engine import Engine, Reply, SamplingParams
from engine.config import resolve
from engine.http.app import serve
from engine.kernels.cpu.calls import kernels
from engine.messages.control import Boot
from engine.messages.step import SlotAdmit
from engine.params.sampling import Sampling
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.runtime.launch import open_front
from engine.testing.steps import step_plan
from engine.text.tokenizer import Text
from engine.worker.start import start
from engine.worker.steps.rows import Rows


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(model="smollm2-135m", max_model_len=2048) as engine:
        yield engine


def test_exact_ids_alone(engine: Engine) -> None:
    assert engine.generate(COUNTING, GREEDY).ids == COUNTING_IDS
    reply = engine.generate(LETTERS, GREEDY)
    assert reply.ids == LETTERS_IDS
    assert reply.text == " i j k l m n o p q r s t u v w x y z z\n\nThis is a"


def test_exact_ids_among_others(engine: Engine) -> None:
    sampled = SamplingParams(temperature=1.2, top_p=0.9, max_tokens=40, ignore_eos=True)
    steps = engine.stats().steps
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(engine.generate, prompt, sampled) for prompt in OTHERS]
        replies: list[Reply] = engine.generate([COUNTING, LETTERS, COUNTING, LETTERS], GREEDY)
        assert [len(other.result().ids) for other in others] == [40] * 4
    assert engine.stats().steps - steps < (4 * 40 + 4 * 24) / 2, "they did not run together"
    assert [reply.ids for reply in replies] == [COUNTING_IDS, LETTERS_IDS] * 2


def test_exact_ids_with_the_prefix_cached(engine: Engine) -> None:
    first = engine.generate(COUNTING + "".join(f" {n}," for n in range(8, 30)), GREEDY)
    again = engine.generate(COUNTING + "".join(f" {n}," for n in range(8, 30)), GREEDY)
    assert again.ids == first.ids
    assert again.cached_tokens >= again.prompt_tokens - 16 > 0
    reply = engine.generate(COUNTING, GREEDY)
    assert (reply.ids, reply.cached_tokens) == (COUNTING_IDS, 16)


def test_a_seed_gives_the_same_reply_whatever_runs_beside_it(engine: Engine) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=16)
    alone = engine.generate(FRANCE, params)
    beside = engine.generate([*OTHERS, FRANCE], params)[-1]
    assert beside.ids == alone.ids
    assert engine.generate(FRANCE, SamplingParams(temperature=1.0, seed=8, max_tokens=16)).ids != alone.ids


def test_chat_ends_by_itself(engine: Engine) -> None:
    reply = engine.generate([{"role": "user", "content": "What is the capital of France?"}], GREEDY)
    assert "Paris" in reply.text
    assert (reply.finish, reply.matched) == ("stop", 2)


CUT: list[dict[str, Any]] = [
    {"max_step_tokens": 7},
    {"page_size": 1, "max_step_tokens": 5, "prefix_cache": False},
    {"kv_tokens": 160, "max_running": 4, "placement": "split"},
]


@pytest.mark.parametrize("options", CUT, ids=["chunked", "single-token pages", "page shortage, split"])
def test_exact_ids_however_the_work_is_cut(options: dict[str, Any]) -> None:
    with Engine(model="smollm2-135m", **{"max_model_len": 128, **options}) as engine:
        replies = engine.generate([COUNTING, LETTERS, COUNTING, LETTERS] * 2, GREEDY)
        assert [reply.ids for reply in replies] == [COUNTING_IDS, LETTERS_IDS] * 4
        if "kv_tokens" in options:
            longer = SamplingParams(temperature=0, max_tokens=60)
            whole = engine.generate([LETTERS], longer)[0].ids
            crowded = [reply.ids for reply in engine.generate([LETTERS, COUNTING, LETTERS, FRANCE], longer)]
            assert engine.stats().retractions_total > 0
            assert crowded[0] == crowded[2] == whole
            assert crowded[3] == engine.generate(FRANCE, longer).ids


def test_first_step_logits() -> None:
    config = resolve({"model": "smollm2-135m", "max_model_len": 64})
    runner, ready = start(Boot(config), 0.0)
    ids = Text(open_checkpoint(Plugins.load(()), "smollm2-135m").text()).encode(FRANCE)
    sampling = SlotAdmit(0, np.array(ids, "<i4").tobytes(), Sampling(0.0, 0, 1.0, 0.0, 0))
    runner.apply(step_plan(1, [], [sampling], [(0, 0, 3)]))
    with torch.inference_mode():
        hidden, _ = runner.compute(Rows.of(np.array([[0, 0, len(ids), 1]])))
        logits = runner.model.logits(hidden[-1:])[0]
    assert ready.vocab_size == len(logits) == 49152
    top = logits.topk(5)
    assert top.indices.tolist() == list(FRANCE_LOGITS)
    assert top.values.tolist() == pytest.approx(list(FRANCE_LOGITS.values()), abs=1e-3)


@pytest.mark.skipif(kernels() is None, reason="there is no C compiler here")
def test_a_recorded_step_is_the_step_to_the_bit() -> None:
    runner, _ = start(Boot(resolve({"model": "smollm2-135m", "max_model_len": 64, "device": "cpu"})), 0.0)
    ids = np.arange(1000, 1040).astype("<i4").tobytes()
    admits = tuple(SlotAdmit(slot, ids, Sampling(0.0, 0, 1.0, 0.0, 0)) for slot in range(3))
    pages = [(slot, index, slot * 3 + index) for slot in range(3) for index in range(3)]
    runner.apply(step_plan(1, [], admits, pages))
    prompts = Rows.of(np.array([[0, 0, 20, 0], [1, 0, 33, 0], [2, 0, 5, 0]]))
    with torch.inference_mode():
        runner.compute(prompts)
        for step in ([[0, 20, 1, 1], [2, 5, 1, 1]], [[1, 33, 1, 1], [0, 21, 1, 1]]):
            rows = Rows.of(np.array(step))
            expected, _ = runner.compute(rows)
            assert runner.decode_graphs.fits(rows)
            assert torch.equal(runner.decode_graphs.replay(rows)[0], expected)


# ── over HTTP ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """A server on a free port, with the real model."""
    config = resolve({"model": "smollm2-135m", "port": 0, "max_model_len": 1024})
    listening: list[str] = []
    async with open_front(config) as front, anyio.create_task_group() as group:

        async def http() -> None:
            await serve(front, config.server, started=listening.append)

        group.start_soon(http)
        await front.ready()
        while not listening:
            await anyio.sleep(0.01)
        yield listening[0]
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_exact_ids_and_text_over_http(url: str) -> None:
    async with aiohttp.ClientSession(url) as session:
        body = {"text": COUNTING, "sampling_params": {"temperature": 0, "max_new_tokens": 24}}
        async with session.post("/generate", json=body) as response:
            answer = await response.json()
        assert response.status == 200, answer
        assert answer["output_ids"] == COUNTING_IDS
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    stream = await client.completions.create(
        model="smollm2-135m", prompt=LETTERS, temperature=0, max_tokens=24, stream=True
    )
    text = "".join([event.choices[0].text async for event in stream if event.choices])
    assert text == " i j k l m n o p q r s t u v w x y z z\n\nThis is a"
    chat = await client.chat.completions.create(
        model="smollm2-135m",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
    )
    assert "Paris" in (chat.choices[0].message.content or "")
    assert chat.choices[0].finish_reason == "stop"
    await client.close()
