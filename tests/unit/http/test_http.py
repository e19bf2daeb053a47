"""The HTTP API as clients see it: the real openai client and plain aiohttp against the app over a fake front."""

import struct
import typing
from pathlib import Path

import aiohttp
import anyio
import msgspec
import openai
import pytest
from http_front import FakeFront, chunks, serving, written
from huggingface_hub import InferenceClient
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from prometheus_client.parser import text_string_to_metric_families

from engine.config import ServerOptions
from engine.errors import ConfigError
from engine.http.app import ROUTES, serve
from engine.http.native.generate import GenerateBody, NativeReply, NativeSampling, Scores
from engine.http.openai.chat import ChatBody
from engine.http.openai.completions import CompletionBody
from engine.messages.control import CopyStats, Flushed, Stats, TierStats
from engine.params.sampling import SamplingParams
from engine.runtime.front import Health, joined

pytestmark = pytest.mark.anyio
HI = [{"role": "user", "content": "hi"}]


def client(url: str, key: str = "any") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=20)


async def post(url: str, body: object, **headers: str) -> tuple[int, dict]:
    async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=headers) as response:
        return response.status, await response.json()


async def stream(url: str, body: dict) -> list[str]:
    """The data of every event, in order, with the framing checked byte by byte."""
    async with aiohttp.ClientSession() as session, session.post(url, json=body | {"stream": True}) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        raw = (await response.read()).decode()
    *events, rest = raw.split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]


# ── OpenAI ───────────────────────────────────────────────────────────────────────────────────


async def test_models() -> None:
    async with serving(FakeFront()) as url, client(url) as api:
        listed = (await api.models.list()).data
        assert [(model.id, model.object, model.created) for model in listed] == [("fake", "model", 1_700_000_000)]
        assert (await api.models.retrieve("fake")).model_dump()["max_model_len"] == 2048
        with pytest.raises(openai.NotFoundError, match="'a/b' is not served here; use 'fake'"):
            await api.models.retrieve("a/b")


async def test_chat() -> None:
    front = FakeFront()
    async with serving(front) as url, client(url) as api:
        answer = await api.chat.completions.create(
            model="fake",
            messages=[{"role": "developer", "content": [{"type": "text", "text": letter} for letter in "ab"]}, *HI],
            temperature=0.5, top_p=0.9, seed=-3, stop=["x", "y"], max_completion_tokens=9, n=1, user="me",
            extra_body={"top_k": 5, "min_p": 0.1, "ignore_eos": True, "stop_token_ids": [4], "priority": 2},
        )  # fmt: skip
    assert answer.object == "chat.completion"
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", "Hello, world")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 3, 10)
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    (asked,) = front.asked
    assert written(asked) == [{"role": "system", "content": "ab"}, {"role": "user", "content": "hi"}]
    assert (asked.rid, asked.priority, asked.text, asked.ids) == (answer.id, 2, None, None)
    assert asked.sampling == SamplingParams(
        temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=-3, max_tokens=9,
        stop=("x", "y"), stop_token_ids=(4,), ignore_eos=True,
    )  # fmt: skip


@pytest.mark.parametrize("usage", [True, False])
async def test_chat_stream(usage: bool) -> None:
    async with serving(FakeFront(chunks("He", "", "llo", finish="length"))) as url, client(url) as api:
        answers = await api.chat.completions.create(
            model="fake", messages=HI, stream=True, stream_options={"include_usage": usage}
        )
        events = [event async for event in answers]
    if usage:
        last = events.pop()
        assert last.choices == [] and last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (7, 3)
        assert last.usage.prompt_tokens_details.cached_tokens == 4
    assert all(event.usage is None and event.object == "chat.completion.chunk" for event in events)
    assert len({event.id for event in events}) == 1
    deltas = [event.choices[0].delta for event in events]
    assert [delta.role for delta in deltas] == ["assistant", None, None, None]
    assert [delta.content for delta in deltas] == ["", "He", "llo", None]
    assert [event.choices[0].finish_reason for event in events] == [None, None, None, "length"]


async def test_chat_stream_framing() -> None:
    awkward = 'a"b\\c\n\n\r\t\u2028é😀\x00'
    async with serving(FakeFront(chunks(awkward, "!"))) as url:
        events = await stream(f"{url}/v1/chat/completions", {"messages": HI})
    assert events[-1] == "[DONE]"
    decoded = [msgspec.json.decode(event) for event in events[:-1]]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in decoded) == awkward + "!"
    assert all("usage" not in event for event in decoded)
    assert decoded[-1]["choices"][0]["matched_stop"] is None


async def test_a_client_that_splits_lines_as_python_does_reads_every_text() -> None:
    awkward = "a\x85b\u2028c\u2029é"

    def read(url: str) -> str:
        hub = InferenceClient(base_url=url, api_key="any")
        events = hub.chat_completion(HI, model="fake", stream=True)
        return "".join(event.choices[0].delta.content or "" for event in events)

    async with serving(FakeFront(chunks(awkward, "!"))) as url:
        assert await anyio.to_thread.run_sync(read, url) == awkward + "!"


async def test_completion() -> None:
    front = FakeFront(chunks("a", "b", finish="stop", matched="###"))
    async with serving(front) as url, client(url) as api:
        answer = await api.completions.create(model="fake", prompt="once", stop="###")
        assert answer.object == "text_completion"
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "stop")
        assert answer.choices[0].model_dump()["matched_stop"] == "###"
        await api.completions.create(model="fake", prompt=[1, 2, 70000], max_tokens=3)
        await api.completions.create(model="fake", prompt=["one"])
        await api.completions.create(model="fake", prompt=[[5]])
    once, ids, listed, nested = front.asked
    assert once.sampling.max_tokens is None  # 16 is what a client that says nothing gets, if there is room
    assert (once.text, once.sampling.stop, once.default_max_tokens) == ("once", ("###",), 16)
    assert (ids.text, ids.ids, ids.sampling.max_tokens) == (None, struct.pack("<3i", 1, 2, 70000), 3)
    assert (listed.text, nested.ids) == ("one", struct.pack("<i", 5))


async def test_completion_stream() -> None:
    async with serving(FakeFront(chunks("a", "b", "c"))) as url, client(url) as api:
        answers = await api.completions.create(
            model="fake", prompt="x", stream=True, stream_options={"include_usage": True}
        )
        events = [event async for event in answers]
    assert "".join(event.choices[0].text for event in events[:-1]) == "abc"
    assert [event.choices[0].finish_reason for event in events[:-1]] == [None, None, None, "stop"]
    assert events[-1].usage is not None and events[-1].usage.total_tokens == 10


@pytest.mark.parametrize(
    ("body", "params"),
    [(ChatBody, chat_create_params), (CompletionBody, completion_create_params)],
    ids=["chat", "text"],
)
def test_every_field_of_the_openai_client_is_known(body: type, params: typing.Any) -> None:
    name = "CompletionCreateParamsStreaming"
    assert set(typing.get_type_hints(getattr(params, name))) <= set(body.__struct_fields__)


# ── /generate ────────────────────────────────────────────────────────────────────────────────


async def test_generate() -> None:
    front = FakeFront(chunks("a", "b", finish="stop", matched=2))
    sampling = {"temperature": 0, "max_new_tokens": 5, "sampling_seed": 1, "stop": "z", "ignore_eos": True}
    async with serving(front) as url:
        status, answer = await post(f"{url}/generate", {"text": "x", "rid": "mine", "sampling_params": sampling})
        await post(f"{url}/generate", {"input_ids": [9], "return_logprob": False, "lora_path": None})
    assert status == 200
    assert answer == {
        "text": "ab",
        "output_ids": [1, 2],
        "meta_info": {
            "id": "mine", "finish_reason": {"type": "stop", "matched": 2},
            "prompt_tokens": 7, "completion_tokens": 2, "cached_tokens": 4,
        },
    }  # fmt: skip
    first, second = front.asked
    assert (first.rid, first.text, first.sampling.temperature, first.sampling.seed) == ("mine", "x", 0, 1)
    assert (first.sampling.stop, first.sampling.max_tokens, first.sampling.ignore_eos) == (("z",), 5, True)
    assert (second.ids, second.default_max_tokens, second.sampling.temperature) == (struct.pack("<i", 9), 128, None)
    assert second.rid not in ("", "mine")


@pytest.mark.parametrize(
    ("finish", "matched", "reason"),
    [
        ("stop", "END", {"type": "stop", "matched": "END"}),
        ("length", None, {"type": "length", "length": 2}),
        ("abort", None, {"type": "abort", "message": "the request was aborted"}),
    ],
)
async def test_generate_stream_is_cumulative(finish: str, matched: object, reason: dict) -> None:
    async with serving(FakeFront(chunks('"', "é\n", finish=finish, matched=matched))) as url:
        *events, done = await stream(f"{url}/generate", {"text": "x"})
    assert done == "[DONE]"
    first, last = (msgspec.json.decode(event) for event in events)
    assert (first["text"], first["output_ids"], first["meta_info"]["finish_reason"]) == ('"', [1], None)
    assert (last["text"], last["output_ids"], last["meta_info"]["finish_reason"]) == ('"é\n', [1, 2], reason)


@given(st.lists(st.text(), min_size=1, max_size=6))
def test_a_native_event_holds_the_reply_so_far(texts: list[str]) -> None:
    reply = NativeReply(["r"], [Scores()], listed=False)
    made = chunks(*texts, ids_of=lambda text: [ord(letter) for letter in text])
    for number, chunk in enumerate(made, start=1):
        event = reply.event((0, chunk)).removesuffix(b"data: [DONE]\n\n")
        decoded = msgspec.json.decode(event.removeprefix(b"data: "))
        assert decoded["text"] == "".join(texts[:number])
        assert decoded["output_ids"] == [ord(letter) for text in texts[:number] for letter in text]
    assert msgspec.json.decode(reply.whole([joined(made)])) == decoded


# ── a client that leaves ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(("path", "endpoint"), [("/generate", "generate"), ("/v1/completions", "completions")])
async def test_a_disconnect_closes_the_generator(path: str, endpoint: str, streamed: bool) -> None:
    front = FakeFront(chunks("a", "b")[:1], hangs=True)
    body = {"text" if endpoint == "generate" else "prompt": "x", "stream": streamed}
    async with serving(front) as url:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group, aiohttp.ClientSession() as session:
                group.start_soon(post_and_read, session, url + path, body)
                await front.began.wait()
                assert len(front.open) == 1
                group.cancel_scope.cancel()
            await front.closed.wait()
        assert not front.open
        assert await samples(url, "engine_requests_total") == [({"endpoint": endpoint, "reason": "disconnect"}, 1)]


async def post_and_read(session: aiohttp.ClientSession, url: str, body: dict) -> None:
    async with session.post(url, json=body) as response:
        await response.read()


async def test_the_end_of_the_server_ends_its_streams() -> None:
    front = FakeFront(chunks("a", "b")[:1], hangs=True)
    async with aiohttp.ClientSession() as session:
        async with serving(front) as url:
            response = await session.post(f"{url}/generate", json={"text": "x", "stream": True})
            await response.content.readuntil(b"\n\n")
        with anyio.fail_after(60):
            await front.closed.wait()
        response.close()
    assert front.on_stats == []


# ── operators ────────────────────────────────────────────────────────────────────────────────


async def samples(url: str, name: str) -> list[tuple[dict, float]]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        text = await response.text()
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return [(sample.labels, sample.value) for sample in found if sample.name == name]


async def test_health() -> None:
    front = FakeFront()
    async with serving(front) as url, aiohttp.ClientSession() as session:
        async with session.get(f"{url}/health") as response:
            assert (response.status, await response.json()) == (200, {"status": "ready"})
        front.state = Health("restarting", "signal 9")
        async with session.get(f"{url}/health") as response:
            assert (response.status, await response.json()) == (503, {"status": "restarting", "cause": "signal 9"})
        assert await samples(url, "engine_ready") == [({}, 0)]


async def test_metrics() -> None:
    front = FakeFront(chunks("a", "b", "c"))
    front.stats = Stats(
        "ready", running=3, waiting=2, pages=100, pages_free=20, pages_cached=30, prompt_tokens_total=200,
        cached_tokens_total=50, generated_tokens_total=70, retractions_total=1, steps=9,
        restarts_total=2, restart_seconds=1.5,
    )  # fmt: skip
    async with serving(front) as url:
        await post(f"{url}/generate", {"text": "x"})
        await post(f"{url}/v1/completions", {"prompt": "x"})
        await post(f"{url}/v1/completions", {"prompt": "x", "n": 0})
        for listener in front.on_stats:
            listener(Stats("ready", step_seconds=struct.pack("<2f", 0.5, 0.25)))
        expected = {
            "engine_ready": 1, "engine_requests_running": 3, "engine_requests_waiting": 2, "engine_kv_pages": 100,
            "engine_kv_use_ratio": 0.5, "engine_cache_hit_ratio": 0.25, "engine_prompt_tokens_total": 200,
            "engine_cached_tokens_total": 50, "engine_generated_tokens_total": 70, "engine_retractions_total": 1,
            "engine_steps_total": 9, "engine_time_to_first_token_seconds_count": 2,
            "engine_inter_token_seconds_count": 4, "engine_request_seconds_count": 2, "engine_step_seconds_count": 2,
            "engine_step_seconds_sum": 0.75, "engine_worker_restarts_total": 2, "engine_worker_restart_seconds": 1.5,
        }  # fmt: skip
        for name, value in expected.items():
            assert await samples(url, name) == [({}, value)], name
        assert sorted(labels["endpoint"] for labels, _ in await samples(url, "engine_requests_total")) == [
            "completions",
            "generate",
        ]
        assert await samples(url, "engine_http_errors_total") == [({"status": "400"}, 1)]
        info = {"model": "fake", "device": "cpu", "attention": "torch"}
        assert await samples(url, "engine_info") == [(info, 1)]


async def test_metrics_of_copies_of_attention() -> None:
    front = FakeFront()
    async with serving(front) as url:
        assert await samples(url, "engine_copy_tokens_total") == []
        front.stats = Stats("ready", copies=(CopyStats(3, 100, 20, 30, 700), CopyStats(1, 100, 40, 50, 500)),
                            most_tokens_total=800)  # fmt: skip
        expected = {
            "engine_copy_requests_running": (3, 1), "engine_copy_kv_pages_free": (20, 40),
            "engine_copy_kv_pages_cached": (30, 50), "engine_copy_tokens_total": (700, 500),
        }  # fmt: skip
        for name, (zero, one) in expected.items():
            assert await samples(url, name) == [({"copy": "0"}, zero), ({"copy": "1"}, one)], name
            assert f"`{name}`" in (Path(__file__).parents[3] / "docs" / "http.md").read_text()
        assert await samples(url, "engine_copy_most_tokens_total") == [({}, 800)]


async def test_metrics_of_tiers() -> None:
    front = FakeFront()
    async with serving(front) as url:
        assert await samples(url, "engine_tier_bytes") == []
        assert front.info is not None
        page = front.info.page_size * front.info.kv_bytes_per_token
        tiers = TierStats(
            host_pages=100, host_used=60, store_pages=7, store_bytes=900, down=50, kept=7, fetched=3, from_device=8,
            from_host=20, from_store=2, refused=4, failed=1, asked_total=80, ceiling=0.5, seconds_saved=1.5,
            stores={"pages_written": 7, "corrupt": 1}, uncleared=True, computed=9, to_keep=6,
        )  # fmt: skip
        front.stats = Stats("ready", tiers=tiers)
        size = front.info.page_size
        expected: dict[str, list[tuple[dict[str, str], float]]] = {
            "engine_tier_bytes": [({"tier": "host"}, 60 * page), ({"tier": "store"}, 900)],
            "engine_tier_host_limit_bytes": [({}, 100 * page)],
            "engine_tier_hit_tokens_total": [
                ({"tier": "device"}, 8 * size), ({"tier": "host"}, 20 * size), ({"tier": "store"}, 2 * size),
            ],
            "engine_tier_moved_bytes_total": [
                ({"way": way}, pages * page) for way, pages in (("down", 50), ("up", 22), ("keep", 7), ("fetch", 3))
            ],
            "engine_tier_pages_refused_total": [({}, 4)],
            "engine_tier_pages_failed_total": [({}, 1)],
            "engine_tier_pages_computed_total": [({}, 9)],
            "engine_tier_pages_to_keep": [({}, 6)],
            "engine_tier_store_total": [({"what": "pages_written"}, 7), ({"what": "corrupt"}, 1)],
            "engine_tier_saved_seconds_total": [({}, 1.5)],
            "engine_tier_uncleared": [({}, 1)],
            "engine_cache_hit_ceiling_ratio": [({}, 0.5)],
        }  # fmt: skip
        for name, wanted in expected.items():
            assert await samples(url, name) == wanted, name
            assert f"`{name}`" in (Path(__file__).parents[3] / "docs" / "http.md").read_text()


async def test_abort_and_flush() -> None:
    front = FakeFront()
    async with serving(front) as url, aiohttp.ClientSession() as session:
        assert await post(f"{url}/abort_request", {"rid": "a"}) == (200, {"aborted": 0})
        assert await post(f"{url}/abort_request", {"abort_all": True}) == (200, {"aborted": 0})
        assert front.aborted == ["a", None]
        assert await post(f"{url}/flush_cache", {}) == (200, {"freed": 12, "in_use": 3})
        async with session.get(f"{url}/flush_cache") as response:
            assert (response.status, response.headers["Allow"]) == (405, "POST")


async def test_a_flush_that_a_disk_refuses_is_a_503_which_says_why() -> None:
    class Refused(FakeFront):
        async def flush(self) -> Flushed:
            return Flushed(12, 3, "the disk /kv fails to write: Read-only file system")

    async with serving(Refused()) as url:
        status, answer = await post(f"{url}/flush_cache", {})
    assert (status, answer["error"]["code"]) == (503, "store_not_cleared")
    assert "12 pages of the device are forgotten" in answer["error"]["message"]
    assert "the disk /kv fails to write: Read-only file system. It is asked again" in answer["error"]["message"]


async def test_a_taken_port_or_a_bad_host_is_a_config_error() -> None:
    async with serving(FakeFront()) as url:
        port = int(url.rsplit(":", 1)[1])
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}: the port is taken; .*--port"):
            await serve(FakeFront(), ServerOptions(port=port), started=lambda url: None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:0: .*--host"):
        await serve(FakeFront(), ServerOptions(host="192.0.2.1", port=0), started=lambda url: None)  # type: ignore[arg-type]


async def test_a_wildcard_host_is_announced_as_loopback() -> None:
    async with serving(FakeFront(), host="0.0.0.0") as url:
        assert url.startswith("http://127.0.0.1:")
        assert (await post(f"{url}/generate", {"text": "x"}))[0] == 200


async def test_routes_metrics_and_fields_are_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "http.md").read_text()
    paths = [route.path.replace(":.+", "") for route in ROUTES]
    assert [path for path in paths if f"{path}`" not in page] == []
    async with serving(FakeFront()) as url, aiohttp.ClientSession() as session:
        await post(f"{url}/generate", {})
        async with session.get(f"{url}/metrics") as response:
            families = list(text_string_to_metric_families(await response.text()))
    names = {"engine_info"} | {
        family.name + ("_total" if family.type == "counter" else "") for family in families if family.name != "engine"
    }
    assert [name for name in sorted(names) if f"`{name}`" not in page and not name.endswith("_created")] == []
    served = {*CompletionBody.__struct_fields__, *GenerateBody.__struct_fields__, *NativeSampling.__struct_fields__}
    served -= {*CompletionBody.rules, *GenerateBody.rules, *NativeSampling.rules}
    assert [name for name in sorted(served) if name not in page] == []
