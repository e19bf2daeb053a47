"""Requests for vectors, through the real actors and HTTP; the fake device makes them of a prompt's sum and length.

The scheduler's part is at the end: prompts whole, in one step, without pages.
"""

import base64
import struct
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import anyio
import jsonschema_rs
import openai
import pytest
from house import House, open_house, prompt
from http_front import serving
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from engine.errors import RequestError, WorkerError
from engine.http.app import ROUTES
from engine.http.openapi import describe
from engine.messages.request import Admit, Embed
from engine.params.sampling import Sampling
from engine.plugin.specs import TextSpec
from engine.sched import Scheduler
from engine.testing.fake import FakeDevice
from engine.text.tokenizer import Text
from engine_plugins.policies.order import FirstComeFirstServed

DOCUMENT = describe(ROUTES, models=["echo"], keyed=False)
pytestmark = pytest.mark.anyio


def made(text: str) -> list[float]:
    """The fake device's vector of `text`."""
    return [sum(text.encode()), len(text.encode())]


@asynccontextmanager
async def open_site(**options: Any) -> AsyncIterator[tuple[House, str, aiohttp.ClientSession]]:
    async with (
        open_house(**{"embedding_size": 2, **options}) as house,
        serving(house.front) as url,  # type: ignore[arg-type]
        aiohttp.ClientSession(url) as session,
    ):
        yield house, url, session


async def post(session: aiohttp.ClientSession, path: str, body: object) -> tuple[int, Any]:
    """The status and the answer, which is as the document says."""
    async with session.post(path, json=body) as response:
        answer = await response.json()
        responses = DOCUMENT["paths"][path]["post"]["responses"]
        described = responses.get(str(response.status), responses["default"])["content"]["application/json"]["schema"]
        jsonschema_rs.validator_for({**described, "components": DOCUMENT["components"]}).validate(answer)
        return response.status, answer


async def vector(house: House, text: str, rid: str = "r") -> list[float]:
    (chunk,) = [chunk async for chunk in house.front.generate(Embed(rid, text))]
    assert (chunk.finish, chunk.text, chunk.ids) == ("stop", "", [])
    assert chunk.prompt_tokens == len(text.encode())
    return array("f", chunk.vector).tolist()


# ── over HTTP ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("encoding", ["float", "base64", None])
async def test_the_openai_client_gets_vectors(encoding: Any) -> None:
    async with open_site() as (house, url, _):
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
        options = {} if encoding is None else {"encoding_format": encoding}
        reply = await client.embeddings.create(model="echo", input=["ab", "c"], dimensions=2, user="me", **options)
        await client.close()
        vectors = [item.embedding for item in reply.data]
        if encoding == "base64":  # as it came; what the client asks for unasked it decodes
            vectors = [list(struct.unpack("<2f", base64.b64decode(text))) for text in vectors]
        assert vectors == [made("ab"), made("c")]
        assert [(item.index, item.object) for item in reply.data] == [(0, "embedding"), (1, "embedding")]
        assert (reply.object, reply.model) == ("list", "echo")
        assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (3, 3)
        await house.settled()


@pytest.mark.parametrize(
    ("given", "vectors"),
    [
        ("ab", [[195, 2]]),
        ([97, 98, 99], [[294, 3]]),
        ([[97, 98], [5]], [[195, 2], [5, 1]]),
        ([[97, 98], "c"], [[195, 2], [99, 1]]),
    ],
)
async def test_inputs_are_texts_or_ids(given: object, vectors: list[list[float]]) -> None:
    async with open_site() as (house, _, session):
        status, answer = await post(session, "/v1/embeddings", {"input": given})
        assert status == 200
        assert [item["embedding"] for item in answer["data"]] == vectors
        await house.settled()


@pytest.mark.parametrize(("kept", "used"), [(2, "ab"), (9, "abc"), (-1, "abc")])
async def test_only_the_first_tokens_are_used(kept: int, used: str) -> None:
    async with open_site() as (house, _, session):
        for given in ("abc", [97, 98, 99]):
            asked = {"input": given, "truncate_prompt_tokens": kept}
            status, answer = await post(session, "/v1/embeddings", asked)
            assert (status, answer["data"][0]["embedding"]) == (200, made(used))
        pair = {"text_1": "abc", "text_2": "abd", "truncate_prompt_tokens": 2}
        assert (await post(session, "/v1/score", pair))[1]["data"][0]["score"] == pytest.approx(1)
        ranked = {"query": "abc", "documents": ["abd"], "truncate_prompt_tokens": 2}
        assert (await post(session, "/v1/rerank", ranked))[1]["results"][0]["relevance_score"] == pytest.approx(1)
        long = {"input": "b" * 5000, "truncate_prompt_tokens": 64}
        assert (await post(session, "/v1/embeddings", long))[1]["data"][0]["embedding"] == made("b" * 64)
        await house.settled()


def test_what_is_around_a_text_stays() -> None:
    """As transformers cuts: the first tokens between those that the tokenizer adds."""
    words = {"[CLS]": 0, "[SEP]": 1, "a": 2, "b": 3, "c": 4, "[UNK]": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = [("[CLS]", 0), ("[SEP]", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    text = Text(TextSpec(tokenizer=tokenizer, eos_ids=()))
    assert text.encode_first("a b c", 4) == [0, 2, 3, 1]
    assert text.encode_first("a b c", 9) == text.encode("a b c") == [0, 2, 3, 4, 1]
    with pytest.raises(RequestError, match="truncate_prompt_tokens is 2, and 2 of them are added around a text"):
        text.encode_first("a b c", 2)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    text = Text(TextSpec(tokenizer=tokenizer, eos_ids=(), add_bos=True, bos_id=0))
    assert text.encode_first("a b c", 2) == [0, 2]


async def test_a_long_list_waits_for_its_turn() -> None:
    """More inputs than there are slots, or than may be open at once."""
    async with open_site(max_running=3, max_waiting=1) as (house, _, session):
        texts = ["ab" * (1 + index % 7) for index in range(500)]
        status, answer = await post(session, "/v1/embeddings", {"input": texts})
        assert status == 200
        assert [item["embedding"] for item in answer["data"]] == [made(text) for text in texts]
        await house.settled()


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
async def test_scores_are_cosines(path: str) -> None:
    async with open_site() as (house, _, session):
        status, answer = await post(session, path, {"model": "echo", "text_1": "ab", "text_2": ["ab", "\x01\x01"]})
        assert status == 200
        first, second = (item["score"] for item in answer["data"])
        wanted = (195 * 2 + 2 * 2) / ((195**2 + 2**2) * (2**2 + 2**2)) ** 0.5
        assert (first, second) == (pytest.approx(1), pytest.approx(wanted))
        assert answer["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
        pairs = {"text_1": ["ab", "\x01\x01"], "text_2": ["ab", "ab"]}
        status, answer = await post(session, path, pairs)
        assert [item["score"] for item in answer["data"]] == [pytest.approx(1), pytest.approx(wanted)]
        assert [item["index"] for item in answer["data"]] == [0, 1]
        await house.settled()


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
async def test_documents_are_ordered_by_their_cosines(path: str) -> None:
    async with open_site() as (house, _, session):
        body = {"model": "echo", "query": "ab", "documents": ["\x01\x01", {"text": "ab"}, "cd", "ab"]}
        status, answer = await post(session, path, body)
        assert status == 200
        scored = {"text_1": "ab", "text_2": ["\x01\x01", "ab", "cd", "ab"]}
        scores = [item["score"] for item in (await post(session, "/v1/score", scored))[1]["data"]]
        assert [item["index"] for item in answer["results"]] == [1, 3, 2, 0]  # of equal ones, the first comes first
        assert [item["relevance_score"] for item in answer["results"]] == [scores[index] for index in (1, 3, 2, 0)]
        assert [item["document"]["text"] for item in answer["results"]] == ["ab", "ab", "cd", "\x01\x01"]
        assert (answer["model"], answer["usage"]) == ("echo", {"prompt_tokens": 10, "total_tokens": 10})
        for top, count in ((0, 4), (2, 2), (9, 4), (None, 4)):
            short = (await post(session, path, {**body, "top_n": top, "return_documents": False}))[1]["results"]
            assert [item["index"] for item in short] == [1, 3, 2, 0][:count]
            assert not any("document" in item for item in short)
        await house.settled()


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("/v1/rerank", {"query": "a", "documents": []}, "documents", "documents has 0 entries; send 1 to 2048"),
        ("/v1/rerank", {"query": "a", "documents": ["b", {"text": ""}]}, "documents[1]", "documents[1] is empty"),
        ("/v1/rerank", {"query": "", "documents": ["b"]}, "query", "query is empty"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n", ">= 0"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": 9}, "max_tokens_per_doc", "leave it"),
        ("/v1/embeddings", {"input": []}, "input", "input has 0 entries; send 1 to 2048"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, "input", "has 2049 entries; send 1 to 2048"),
        ("/v1/embeddings", {"input": ""}, "input", "input is empty"),
        ("/v1/embeddings", {"input": ["a", ""]}, "input[1]", "input[1] is empty; send at least one"),
        ("/v1/embeddings", {"input": ["a", []]}, "input[1]", "input[1] is an empty list"),
        ("/v1/embeddings", {"input": ["a", 5]}, "input", "mixes token ids"),
        ("/v1/embeddings", {"input": [5, 999]}, "input", "token id 999 is outside"),
        ("/v1/embeddings", {"input": ["a", "b" * 65]}, "input[1]", "input[1] has 65 tokens, and the model takes"),
        ("/v1/embeddings", {"input": "b" * 5000}, "input", "input has 5000 tokens, and the model takes at most 4096"),
        ("/v1/embeddings", {"input": "b" * 99999}, "input", "input has 99999 characters"),
        ("/v1/embeddings", {"input": "a", "dimensions": 1}, "dimensions", "dimensions is 1, but echo makes"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least one token"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens", ">= -1"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format", "one of 'float', 'base64'"),
        ("/v1/embeddings", {"input": "a", "model": "other"}, "model", "not served here"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1", "text_1 has 2 texts and text_2 3"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": "c"}, "text_1", "text_1 has 2 texts and text_2 1"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2", "text_2 has 0 entries"),
        ("/v1/score", {"text_1": "a", "text_2": ["b", "c" * 65]}, "text_2[1]", "text_2[1] has 65 tokens"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_refused_and_disturbs_nothing(path: str, body: Any, param: str, says: str) -> None:
    async with open_site() as (house, _, session):
        status, answer = await post(session, path, body)
        assert status == (404 if param == "model" else 400)
        assert answer["error"]["param"] == param
        assert says in answer["error"]["message"]
        assert (await post(session, "/v1/embeddings", {"input": "ab"}))[1]["data"][0]["embedding"] == made("ab")
        await house.settled()


async def test_a_step_that_is_too_small_is_named() -> None:
    async with open_house(embedding_size=2) as house:
        with pytest.raises(RequestError, match="larger --max-step-tokens"):
            await vector(house, "b" * 65)
        assert await vector(house, "b" * 64) == made("b" * 64)
        await house.settled()


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, "/v1/embeddings or /v1/score"),
        ("/v1/completions", {"prompt": "ab", "stream": True}, "/v1/embeddings or /v1/score"),
        ("/generate", {"text": "ab"}, "/v1/embeddings or /v1/score"),
        ("/v1/responses", {"input": "ab"}, "/v1/embeddings or /v1/score"),
    ],
)
async def test_a_model_of_vectors_generates_nothing(path: str, body: Any, says: str) -> None:
    async with open_site() as (house, _, session):
        status, answer = await post(session, path, body)
        assert (status, answer["error"]["code"]) == (400, "wrong_task")
        assert says in answer["error"]["message"]
        await house.settled()
        assert house.scheduler.scheduler.counts()["steps"] == 0
        async with session.get("/health_generate") as response:
            assert response.status == 200
        async with session.get("/model_info") as response:
            assert (await response.json())["is_generation"] is False


@pytest.mark.parametrize(("path", "key"), [("/v1/embeddings", "input"), ("/v1/score", "text_2")])
async def test_a_model_that_generates_makes_no_vectors(path: str, key: str) -> None:
    async with open_site(embedding_size=0) as (house, _, session):
        status, answer = await post(session, path, {key: "ab", **({"text_1": "x"} if key == "text_2" else {})})
        assert (status, answer["error"]["code"]) == (400, "wrong_task")
        assert "generates text and makes no embeddings" in answer["error"]["message"]
        assert await house.text(prompt("a", max_tokens=3)) == "bcd"
        await house.settled()


# ── through the actors ───────────────────────────────────────────────────────────────────────


async def test_many_vectors_at_once_do_not_mix() -> None:
    async with open_house(embedding_size=2, max_running=8) as house:
        vectors: dict[str, list[float]] = {}

        async def one(text: str) -> None:
            vectors[text] = await vector(house, text, rid=text)

        texts = [chr(33 + index) * (1 + index % 60) for index in range(90)]
        async with anyio.create_task_group() as group:
            for text in texts:
                group.start_soon(one, text)
        assert vectors == {text: made(text) for text in texts}
        await house.settled()
        counts = house.scheduler.scheduler.counts()
        assert (counts["prompt_tokens_total"], counts["generated_tokens_total"]) == (sum(map(len, texts)), 0)


async def test_an_aborted_list_ends_with_an_error() -> None:
    async with open_site(seconds=0.01, max_running=1) as (house, _, session), anyio.create_task_group() as group:

        async def ask() -> None:
            status, answer = await post(session, "/v1/embeddings", {"input": ["ab"] * 50})
            assert (status, answer["error"]["code"]) == (409, "aborted")

        group.start_soon(ask)
        await anyio.sleep(0.05)
        (rid,) = {name.rpartition("-")[0] for name in house.front._open}
        async with session.post("/abort_request", json={"rid": rid}) as response:
            assert (await response.json())["aborted"] > 0
        with anyio.fail_after(60):
            while house.front._open:
                await anyio.sleep(0.002)
        await house.settled()


async def test_a_client_that_leaves_ends_its_list() -> None:
    async with open_site(seconds=0.01, max_running=1) as (house, _, session):
        with anyio.move_on_after(0.05):
            await post(session, "/v1/embeddings", {"input": ["ab"] * 500})
        with anyio.fail_after(60):
            while house.front._open:
                await anyio.sleep(0.002)
        await house.settled()
        assert house.scheduler.scheduler.counts()["steps"] < 50


async def test_a_lost_worker_fails_what_ran_and_serves_what_waited() -> None:
    async with open_house(embedding_size=2, seconds=0.2, max_running=1) as house:
        ends: dict[str, object] = {}

        async def one(rid: str) -> None:
            try:
                ends[rid] = await vector(house, rid, rid=rid)
            except (RequestError, WorkerError) as error:
                ends[rid] = getattr(error, "code", error)

        async with anyio.create_task_group() as group:
            for rid in "123":
                group.start_soon(one, rid)
                await anyio.sleep(0.001)
            await house.executor.lose("pulled the plug")
        assert ends == {"1": "worker_lost", "2": made("2"), "3": made("3")}
        await house.settled()


# ── the scheduler ────────────────────────────────────────────────────────────────────────────


def scheduler(slots: int = 8, max_step_tokens: int = 16, max_model_len: int = 100) -> Scheduler:
    """With no pages at all, as an encoder has it."""
    return Scheduler(
        0,
        4,
        slots,
        max_model_len=max_model_len,
        max_step_tokens=max_step_tokens,
        policy=FirstComeFirstServed(),
        prefix_cache=True,
        max_waiting=100,
    )


def asking(rid: str, length: int, priority: int = 0) -> Admit:
    ids = array("i", [ord(rid[0])] * length)
    return Admit(rid, ids.tobytes(), Sampling(0.0, 0, 1.0, 0.0, 0), (), 0, priority)


def run(logic: Scheduler, device: FakeDevice) -> list[list[str]]:
    """All steps, two in flight: whose vectors each brought; every vector is checked."""
    flying, told = [], []
    while True:
        while len(flying) < 2 and (plan := logic.plan()):
            assert not plan.pages
            flying.append(device.step(plan))
        if not flying:
            return told
        tokens = logic.commit(flying.pop(0))
        logic.check_integrity()
        told.append(tokens.rids if tokens else [])
        for row, packed in tokens.vectors if tokens else ():
            total, length = array("f", packed)
            assert total == ord(tokens.rids[row][0]) * length
        assert tokens is None or [finish.row for finish in tokens.finishes] == list(range(len(tokens.rids)))


def test_prompts_are_computed_whole_as_many_as_fit_into_a_step() -> None:
    logic = scheduler()
    for rid, length in [("a", 16), ("b", 5), ("c", 6), ("d", 6), ("e", 1), ("f", 10), ("g", 16)]:
        logic.admit(asking(rid, length))
    # d does not fit beside b and c; e, which would, does not overtake it
    assert run(logic, FakeDevice()) == [["a"], ["b", "c"], ["d", "e"], ["f"], ["g"]]
    assert logic.counts() | {"steps": 5, "running": 0, "waiting": 0, "pages": 0} == logic.counts()


def test_slots_bound_a_step_and_priority_goes_first() -> None:
    logic = scheduler(slots=2)
    for rid in "abcd":
        logic.admit(asking(rid, 1, priority=rid == "d"))
    assert run(logic, FakeDevice()) == [["d", "a"], ["b", "c"]]


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    for options, length, says in (
        ({}, 17, "17 tokens, and the model takes at most 16 .* larger --max-step-tokens"),
        ({"max_model_len": 12}, 13, "13 tokens, and the model takes at most 12 at once; .*parts$"),
        ({}, 0, "0 tokens"),
    ):
        with pytest.raises(RequestError, match=says):
            scheduler(**options).admit(asking("a", length))


def test_who_is_aborted_in_flight_is_told_nothing_more() -> None:
    logic, device = scheduler(), FakeDevice()
    for rid in "abc":
        logic.admit(asking(rid, 3))
    done = device.step(logic.plan())
    assert logic.abort("b").finishes[0].reason == "abort"
    assert logic.commit(done).rids == ["a", "c"]
    logic.check_integrity()
    assert run(logic, device) == []


def test_the_device_that_is_lost_takes_what_ran() -> None:
    logic, device = scheduler(slots=1), FakeDevice()
    for rid in "ab":
        logic.admit(asking(rid, 3))
    logic.plan()
    assert logic.reset() == ["a"]
    assert run(logic, device) == [["b"]]
