"""Several prompts and replies, log-probabilities, echo and usage: through the openai client, to the fake device.

The fake device counts on from its prompt and makes up a log-probability from a token's id and place, so each of
them can be checked against `logprob`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import openai
import pytest
from house import House, counted, open_house
from http_front import FakeFront, chunks, serving
from test_http import HI, client, post, stream

from engine.params.sampling import SamplingParams

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def served(**options: Any) -> AsyncIterator[tuple[str, House]]:
    async with open_house(**options) as house, serving(house.front) as url:  # type: ignore[arg-type]
        yield url, house
        await house.settled()


def logprob(token: int, place: int) -> float:
    return -(token + place) / 1024


# ── choices ──────────────────────────────────────────────────────────────────────────────────


async def test_n_replies_to_each_of_several_prompts_in_order() -> None:
    async with served() as (url, _), client(url) as api:
        answer = await api.completions.create(model="echo", prompt=["a", "bcd"], n=2, max_tokens=3)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "bcd"), (1, "bcd"), (2, "efg"), (3, "efg"),
    ]  # fmt: skip
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 12)  # a prompt counts once


async def test_samples_are_requests_of_their_own_with_seeds_that_follow() -> None:
    front = FakeFront()
    async with serving(front) as url, client(url) as api:
        answer = await api.chat.completions.create(model="fake", messages=HI, n=3, seed=2**63 - 2)
        await api.chat.completions.create(model="fake", messages=HI, n=2)
        await api.completions.create(
            model="fake", prompt=[[1], [2, 3]], n=2, best_of=2, seed=5, extra_body={"cache_salt": "s"}
        )
    assert [choice.message.content for choice in answer.choices] == ["Hello, world"] * 3
    first, second, third = front.asked[:3], front.asked[3:5], front.asked[5:]
    assert [job.sampling.seed for job in first] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert [job.rid for job in first] == [f"{answer.id}-{index}" for index in range(3)]
    assert [job.sampling.seed for job in second] == [None, None]
    assert [(job.ids, job.sampling.seed, job.cache_salt) for job in third] == [
        (ids, seed, "s") for ids in (b"\x01\0\0\0", b"\x02\0\0\0\x03\0\0\0") for seed in (5, 6)
    ]


async def test_streams_of_several_choices_are_told_apart() -> None:
    async with served(seconds=0.001) as (url, _), client(url) as api:
        texts, finishes = [""] * 4, [None] * 4
        async for event in await api.completions.create(
            model="echo", prompt=["a", "A"], n=2, max_tokens=9, stream=True, stream_options={"include_usage": True}
        ):
            for choice in event.choices:
                assert finishes[choice.index] is None
                texts[choice.index] += choice.text
                finishes[choice.index] = choice.finish_reason
            usage = event.usage
    assert texts == [counted(start, 9) for start in "aaAA"] and finishes == ["length"] * 4
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (2, 36)


async def test_continuous_usage_grows_in_every_event() -> None:
    async with served(seconds=0.001) as (url, _):
        body = {"messages": HI, "max_tokens": 5, "stream_options": {"continuous_usage_stats": True}}
        events = [msgspec.json.decode(event) for event in (await stream(f"{url}/v1/chat/completions", body))[:-1]]
    told = [event["usage"]["completion_tokens"] for event in events]
    assert told == sorted(told) and told[-1] == 5 and all(event["choices"] for event in events)
    assert {event["usage"]["prompt_tokens"] for event in events} == {3}


async def test_one_prompt_that_is_refused_refuses_all_and_leaves_nothing() -> None:
    async with served() as (url, house), client(url) as api:
        for streamed in (False, True):
            with pytest.raises(openai.BadRequestError, match="token id 999"):
                await api.completions.create(model="echo", prompt=[[1], [999], [2]], max_tokens=4000, stream=streamed)
        with anyio.fail_after(60):
            while house.front._open:
                await anyio.sleep(0.002)


async def test_abort_by_the_requests_own_id_ends_all_its_replies() -> None:
    async with served(seconds=0.005) as (url, house), anyio.create_task_group() as group:
        answers = []

        async def ask() -> None:
            body = {"text": ["a", "b"], "rid": "mine", "sampling_params": {"n": 2, "max_new_tokens": 2000}}
            answers.extend((await post(f"{url}/generate", body))[1])

        group.start_soon(ask)
        with anyio.fail_after(60):
            while len(house.front._open) < 4:
                await anyio.sleep(0.002)
            assert await post(f"{url}/abort_request", {"rid": "mine-"}) == (200, {"aborted": 0})
            assert await post(f"{url}/abort_request", {"rid": "mine"}) == (200, {"aborted": 4})
            while not answers:
                await anyio.sleep(0.002)
        assert [answer["meta_info"]["finish_reason"]["type"] for answer in answers] == ["abort"] * 4
        assert [answer["meta_info"]["id"] for answer in answers] == [f"mine-{index}" for index in range(4)]


async def test_a_client_that_leaves_ends_all_its_replies() -> None:
    front = FakeFront(chunks("a", "b")[:1], hangs=True)
    async with serving(front) as url:
        with anyio.move_on_after(0.2):
            await post(f"{url}/v1/completions", {"prompt": ["x", "y"], "n": 2})
        with anyio.fail_after(60):
            while front.open or len(front.asked) < 4:
                await anyio.sleep(0.002)


# ── every sampling field reaches the engine ──────────────────────────────────────────────────

FIELDS: dict[str, Any] = {
    "stop_regex": ("a+",), "min_tokens": 2, "presence_penalty": 0.5, "frequency_penalty": -0.5,
    "repetition_penalty": 1.5, "logit_bias": {5: -1.0, 7: 2.0}, "bad_words": ("no", "never"),
    "allowed_token_ids": (5, 6, 7), "skip_special_tokens": False, "include_stop_str_in_output": True,
}  # fmt: skip


async def test_sampling_fields_of_both_apis() -> None:
    front = FakeFront()
    async with serving(front) as url, client(url) as api:
        own = ("presence_penalty", "frequency_penalty", "logit_bias")
        given = {name: FIELDS[name] for name in own}
        extra = {name: value for name, value in FIELDS.items() if name not in own}
        await api.chat.completions.create(model="fake", messages=HI, **given, extra_body=extra)
        await api.completions.create(model="fake", prompt="x", **given, extra_body=extra)
        native = {**FIELDS, "min_new_tokens": FIELDS["min_tokens"]}
        del native["min_tokens"]
        await post(f"{url}/generate", {"text": "x", "sampling_params": native, "cache_salt": "s"})
    assert [job.sampling for job in front.asked] == [SamplingParams(**FIELDS)] * 3
    assert front.asked[2].cache_salt == "s"


# ── log-probabilities ────────────────────────────────────────────────────────────────────────


async def test_chat_logprobs() -> None:
    async with served() as (url, _), client(url) as api:
        ask = {"model": "echo", "messages": HI, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
        answer = await api.chat.completions.create(**ask)
        assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
        content = answer.choices[0].logprobs.content
        assert "".join(token.token for token in content) == answer.choices[0].message.content
        prompt = "hi\n"
        for place, token in enumerate(content, start=len(prompt)):
            id = (ord("\n") + 1 + place - len(prompt)) % 256
            assert (token.bytes, token.logprob) == ([id], pytest.approx(logprob(id, place)))
            assert [top.bytes for top in token.top_logprobs] == [[id], [id + 1]]
            assert token.top_logprobs[1].logprob == pytest.approx(token.logprob - 1)
        streamed = [event async for event in await api.chat.completions.create(**ask, stream=True)]
        pieces = [event.choices[0].logprobs for event in streamed]
        assert [token for piece in pieces if piece for token in piece.content or ()] == content
        plain = await api.chat.completions.create(model="echo", messages=HI, max_tokens=4)
        assert plain.choices[0].logprobs is None


async def test_logprobs_of_a_chats_prompt_stand_beside_the_choices() -> None:
    async with served() as (url, _), client(url) as api:
        ask = {"model": "echo", "messages": HI, "max_tokens": 3, "n": 2, "extra_body": {"prompt_logprobs": 2}}
        answer = await api.chat.completions.create(**ask)
        first, *rest = answer.model_dump()["prompt_logprobs"]  # of "hi\n"
        assert first is None and [list(entry) for entry in rest] == [["106", "105"], ["11", "10"]]
        assert rest[0]["105"] == {"logprob": pytest.approx(logprob(105, 1)), "rank": 1, "decoded_token": "i"}
        assert not any("prompt_logprobs" in choice.model_dump() for choice in answer.choices)
        events = [event.model_dump() async for event in await api.chat.completions.create(**ask, stream=True)]
        assert [event["prompt_logprobs"] for event in events if "prompt_logprobs" in event] == [[first, *rest]]
        plain = await api.chat.completions.create(**{**ask, "extra_body": {}})
        assert "prompt_logprobs" not in plain.model_dump()


# ── the text of a reply ──────────────────────────────────────────────────────────────────────


async def test_special_tokens_and_what_stops_a_reply_in_its_text() -> None:
    async with served() as (url, _), client(url) as api:
        ask = {"model": "echo", "prompt": "a", "max_tokens": 4, "temperature": 0}
        for stop, shown in (({"stop": "cd"}, "bcd"), ({"stop_token_ids": [100]}, "bcd"), ({"stop_regex": "c."}, "bcd")):
            for keep, text in (({}, shown.removesuffix("cd")), ({"include_stop_str_in_output": True}, shown)):
                text = "bc" if "stop_token_ids" in stop and not keep else text
                answer = await api.completions.create(**ask, extra_body={**stop, **keep})
                assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "stop")
                told = await api.completions.create(**ask, stream=True, extra_body={**stop, **keep})
                assert "".join([event.choices[0].text async for event in told]) == text
        for keep in ({"no_stop_trim": True}, {"include_stop_str_in_output": True}, {}):
            sampling = {"max_new_tokens": 4, "stop": "cd", **keep}
            assert (await post(f"{url}/generate", {"text": "a", "sampling_params": sampling}))[1]["text"] == (
                "bcd" if keep else "b"
            )
        both = {"no_stop_trim": True, "include_stop_str_in_output": False}
        status, answer = await post(f"{url}/generate", {"text": "a", "sampling_params": both})
        assert (status, answer["error"]["param"]) == (400, "sampling_params.no_stop_trim")
        for body in ({"spaces_between_special_tokens": False}, {"detokenize": False, "stop": "x"}):
            assert (await post(f"{url}/v1/completions", {"prompt": "a", **body}))[0] == 400
            assert (await post(f"{url}/generate", {"text": "a", "sampling_params": body}))[0] == 400


async def test_a_reply_without_text() -> None:
    async with served() as (url, _):
        sampling = {"max_new_tokens": 5, "temperature": 0, "detokenize": False}
        asked = {"text": "a", "sampling_params": sampling}
        _, answer = await post(f"{url}/generate", asked)
        assert (answer["text"], answer["output_ids"]) == ("", [98, 99, 100, 101, 102])
        *_, last, done = await stream(f"{url}/generate", asked)
        assert (msgspec.json.decode(last)["output_ids"], done) == (answer["output_ids"], "[DONE]")
        for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": HI})):
            _, answer = await post(url + path, {**body, "detokenize": False, "max_tokens": 5})
            choice = answer["choices"][0]
            assert (choice.get("text", choice.get("message", {}).get("content")), choice["finish_reason"]) == (
                "",
                "length",
            )
            assert answer["usage"]["completion_tokens"] == 5
        for field, value in (("stop", "x"), ("stop_regex", "x"), ("echo", True)):
            status, answer = await post(f"{url}/v1/completions", {"prompt": "a", "detokenize": False, field: value})
            assert status == 400 and answer["error"]["message"].count("detokenize")


async def test_text_logprobs_with_and_without_echo() -> None:
    async with served() as (url, _), client(url) as api:
        answer = await api.completions.create(model="echo", prompt="ab", max_tokens=3, logprobs=1)
        (choice,) = answer.choices
        assert choice.text == "cde" and choice.logprobs is not None
        assert choice.logprobs.tokens == ["c", "d", "e"] and choice.logprobs.text_offset == [0, 1, 2]
        assert choice.logprobs.top_logprobs is not None
        assert list(choice.logprobs.top_logprobs[0]) == ["c"]
        echoed = await api.completions.create(model="echo", prompt="ab", max_tokens=3, logprobs=2, echo=True)
        (choice,) = echoed.choices
        assert choice.text == "abcde" and choice.logprobs is not None
        assert choice.logprobs.tokens == list("abcde") and choice.logprobs.text_offset == [0, 1, 2, 3, 4]
        values = choice.logprobs.token_logprobs
        assert values is not None and values[0] is None
        assert values[1:] == pytest.approx([logprob(ord("a") + place, place) for place in range(1, 5)])
        top = choice.logprobs.top_logprobs
        assert top is not None and [entry and sorted(entry) for entry in top] == [
            None, ["b", "c"], ["c", "d"], ["d", "e"], ["e", "f"],
        ]  # fmt: skip


async def test_echo_of_token_ids_and_alone() -> None:
    async with served() as (url, _), client(url) as api:
        answer = await api.completions.create(
            model="echo", prompt=list(b"h\xc3\xa9"), max_tokens=1, echo=True, stop="x"
        )
        assert answer.choices[0].text == "hé\ufffd"
        events = [
            event
            async for event in await api.completions.create(
                model="echo", prompt="ab", max_tokens=4, echo=True, stop="e", stream=True
            )
        ]
        assert "".join(event.choices[0].text for event in events) == "abcd"


@pytest.mark.parametrize("max_step_tokens", [2, 64])
async def test_prompt_logprobs_come_whole_however_the_prompt_is_cut(max_step_tokens: int) -> None:
    async with served(max_step_tokens=max_step_tokens) as (url, _), client(url) as api:
        for _ in range(2):  # cached or not
            answer = await api.completions.create(
                model="echo", prompt="abcdefgh", max_tokens=2, n=2, extra_body={"prompt_logprobs": 1}
            )
            for choice in answer.choices:
                first, *rest = choice.model_dump()["prompt_logprobs"]
                assert first is None and len(rest) == 7
                for place, entry in enumerate(rest, start=1):
                    id = ord("a") + place
                    assert entry == {
                        str(id): {"logprob": pytest.approx(logprob(id, place)), "rank": 1, "decoded_token": chr(id)}
                    }


async def test_a_prompt_may_be_scored_without_a_reply() -> None:
    async with served() as (url, _), client(url) as api:
        answer = await api.completions.create(model="echo", prompt=["abc", "z"], max_tokens=0, echo=True, logprobs=0)
        assert [choice.text for choice in answer.choices] == ["abc", "z"]
        assert [len(choice.logprobs.tokens) for choice in answer.choices] == [3, 1]
        assert [choice.finish_reason for choice in answer.choices] == ["length"] * 2
        assert answer.usage is not None and answer.usage.completion_tokens == 0


async def test_an_echo_of_the_prompt_alone() -> None:
    ask: dict[str, Any] = {"model": "echo", "prompt": ["abc", "z"], "max_tokens": 0, "echo": True}
    async with served() as (url, _), client(url) as api:
        answer = await api.completions.create(**ask, n=2)
        assert [choice.text for choice in answer.choices] == ["abc", "abc", "z", "z"]
        assert {(choice.finish_reason, choice.logprobs) for choice in answer.choices} == {("length", None)}
        assert "prompt_logprobs" not in answer.choices[0].model_dump()
        assert answer.usage is not None and answer.usage.completion_tokens == 0
        events = [event async for event in await api.completions.create(**ask, stream=True)]
        for index, text in enumerate(["abc", "z"]):
            assert "".join(event.choices[0].text for event in events if event.choices[0].index == index) == text
        with pytest.raises(openai.BadRequestError, match="max_tokens is 0"):
            await api.completions.create(**ask | {"echo": False})


async def test_native_logprobs_and_batches() -> None:
    async with served() as (url, _):
        ask: dict[str, Any] = {
            "text": ["abcd", "x"], "sampling_params": {"max_new_tokens": 2}, "rid": ["one", "two"],
            "return_logprob": [True, False], "logprob_start_len": 2, "top_logprobs_num": 1,
            "return_text_in_logprobs": True,
        }  # fmt: skip
        _, (one, two) = await post(f"{url}/generate", ask)
        assert (one["text"], two["text"]) == ("ef", "yz")
        assert (one["meta_info"]["id"], two["meta_info"]["id"]) == ("one", "two")
        assert "output_token_logprobs" not in two["meta_info"]
        meta = one["meta_info"]
        assert [entry[1:] for entry in meta["input_token_logprobs"]] == [[99, "c"], [100, "d"]]
        assert [entry[0] for entry in meta["output_token_logprobs"]] == pytest.approx(
            [logprob(101, 4), logprob(102, 5)]
        )
        assert [[top[1] for top in entry] for entry in meta["output_top_logprobs"]] == [[101], [102]]
        last = {}
        for event in (await stream(f"{url}/generate", ask))[:-1]:
            decoded = msgspec.json.decode(event)
            last[decoded.pop("index")] = decoded
        one["meta_info"]["cached_tokens"] = last[0]["meta_info"]["cached_tokens"]
        two["meta_info"]["cached_tokens"] = last[1]["meta_info"]["cached_tokens"]
        assert last == {0: one, 1: two}
        ask = {"text": "cached" * 8, "return_logprob": True, "sampling_params": {"max_new_tokens": 0}}
        for cached in (0, 44):
            _, read = await post(f"{url}/generate", ask)
            meta = read["meta_info"]
            assert (read["text"], meta["prompt_tokens"], meta["cached_tokens"]) == ("", 48, cached)
            assert meta["input_token_logprobs"] == meta["output_token_logprobs"] == []
        _, alone = await post(f"{url}/generate", {"text": "ab", "return_logprob": True, "sampling_params": {"n": 2}})
        assert [reply["meta_info"]["input_token_logprobs"] for reply in alone] == [[], []]
        assert alone[0]["meta_info"]["output_token_logprobs"][0][2] is None


async def test_salts_share_no_prefix() -> None:
    async with served() as (url, _):
        cached = []
        for salt in ("a", "a", "b", None):
            body = {"text": "x" * 40, "sampling_params": {"max_new_tokens": 1}, "cache_salt": salt}
            cached.append((await post(f"{url}/generate", body))[1]["meta_info"]["cached_tokens"])
    assert cached == [0, 36, 0, 0]
