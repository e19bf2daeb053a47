"""What a request says of its prompt's tokens, and how it learns that there are too many: over the echo model."""

from typing import Any

import anthropic
import msgspec
import openai
import pytest
from house import counted
from http_front import FakeFront, serving
from hypothesis import given
from hypothesis import strategies as st
from test_http import HI, client, post
from test_http_routes import Site, open_site

from engine.errors import RequestError, Words
from engine.http.app import ROUTES
from engine.params.lengths import ANTHROPIC_PHRASES, prompt_too_long, reply_too_long

pytestmark = pytest.mark.anyio
CHAT, TEXT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
DECISIONS = "/v1/decisions"
GREEDY = {"temperature": 0}
Counts = st.integers(1, 2**31)


# ── only the last of it ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "fields", "kept"),
    [
        (TEXT, {"prompt": "abcdef", "truncate_prompt_tokens": 2}, "ef"),
        (TEXT, {"prompt": [97, 98, 99], "truncate_prompt_tokens": 1}, "c"),
        (TEXT, {"prompt": "abc", "truncate_prompt_tokens": 9}, "abc"),
        (TEXT, {"prompt": "x" * 5000 + "y", "truncate_prompt_tokens": -1}, "x" * 4091 + "y"),  # 4 are left
        (TEXT, {"prompt": "x" * 65_535 + "y", "truncate_prompt_tokens": -1}, "x" * 4091 + "y"),
        (CHAT, {"messages": [{"role": "user", "content": "abc"}], "truncate_prompt_tokens": 2}, "c\n"),
    ],
)
async def test_the_last_tokens_of_a_prompt(path: str, fields: dict[str, Any], kept: str) -> None:
    async with open_site() as site:
        asked = {**fields, **GREEDY, "max_tokens": 4, "return_token_ids": True}
        status, answer = await site.post(path, asked)
        assert status == 200, answer
        (choice,) = answer["choices"]
        ids = answer["prompt_token_ids"] if path == CHAT else choice["prompt_token_ids"]
        assert bytes(ids).decode() == kept and answer["usage"]["prompt_tokens"] == len(kept)
        said = choice["message"]["content"] if path == CHAT else choice["text"]
        assert said == counted(kept[-1], 4) and bytes(choice["token_ids"]).decode() == said
        await site.house.settled()


@pytest.mark.parametrize(("value", "says"), [(0, "at least one"), (-2, ">= -1"), ("all", "expected `int | null`")])
async def test_a_number_of_tokens_that_cannot_be_kept(value: Any, says: str) -> None:
    async with serving(FakeFront()) as url:
        status, answer = await post(url + TEXT, {"prompt": "x", "truncate_prompt_tokens": value})
    assert (status, answer["error"]["param"]) == (400, "truncate_prompt_tokens")
    assert says in answer["error"]["message"]


async def test_special_tokens_of_a_prompt() -> None:
    async with open_site() as site:
        admission = site.house.front.texts.admission  # type: ignore[union-attr]
        admission.text.spec = msgspec.structs.replace(admission.text.spec, add_bos=True, bos_id=1)
        for path, fields, first in (
            (TEXT, {"prompt": "a"}, 1),
            (TEXT, {"prompt": "a", "add_special_tokens": False}, 97),
            (CHAT, {"messages": HI}, ord("h")),
            (CHAT, {"messages": HI, "add_special_tokens": True}, 1),
        ):
            asked = {**fields, "max_tokens": 1, "return_token_ids": True}
            answer = (await site.post(path, asked))[1]
            ids = answer["prompt_token_ids"] if path == CHAT else answer["choices"][0]["prompt_token_ids"]
            assert ids[0] == first, (path, fields)


@pytest.mark.parametrize("path", [TEXT, CHAT])
async def test_the_ids_of_a_stream_are_those_of_the_whole(path: str) -> None:
    asked: dict[str, Any] = {"max_tokens": 5, "n": 2, **GREEDY, "return_token_ids": True}
    asked |= {"prompt": ["a", "bc"]} if path == TEXT else {"messages": HI}
    async with open_site() as site:
        whole = (await site.post(path, asked))[1]
        async with site.session.post(path, json=asked | {"stream": True}) as response:
            raw = (await response.text()).split("\n\n")
        events = [msgspec.json.decode(event.removeprefix("data: ")) for event in raw if event and "[DONE]" not in event]
        told: dict[int, list[int]] = {}
        prompts: list[list[int]] = []
        for event in events:
            prompts += [event["prompt_token_ids"]] if "prompt_token_ids" in event else []
            for choice in event["choices"]:
                told.setdefault(choice["index"], []).extend(choice.get("token_ids", []))
                prompts += [choice["prompt_token_ids"]] if "prompt_token_ids" in choice else []
        assert [told[choice["index"]] for choice in whole["choices"]] == [c["token_ids"] for c in whole["choices"]]
        if path == TEXT:
            assert sorted(prompts) == sorted(choice["prompt_token_ids"] for choice in whole["choices"])
        else:
            assert prompts == [whole["prompt_token_ids"]] == [list(b"hi\n")]
        plain = (await site.post(path, {name: value for name, value in asked.items() if name != "return_token_ids"}))[1]
        assert "token_ids" not in msgspec.json.encode(plain).decode()
        await site.house.settled()


# ── too long ─────────────────────────────────────────────────────────────────────────────────

LONG = "x" * 5000
TOO_LONG: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"messages": [{"role": "user", "content": LONG}]}, "messages", "maximum context length is 4096 tokens"),
    (CHAT, {"messages": HI, "max_tokens": 5000}, "max_tokens", "maximum context length is 4096 tokens"),
    (CHAT, {"messages": HI, "max_completion_tokens": 5000}, "max_completion_tokens", "context length is 4096 tokens"),
    (TEXT, {"prompt": LONG}, "prompt", "maximum context length is 4096 tokens"),
    (TEXT, {"prompt": [1] * 5000}, "prompt", "has 5000 tokens"),
    (TEXT, {"prompt": "x", "max_tokens": 5000}, "max_tokens", "maximum context length is 4096 tokens"),
    (RESPONSES, {"input": LONG}, "input", "maximum context length is 4096 tokens"),
    (RESPONSES, {"input": "x", "max_output_tokens": 5000}, "max_output_tokens", "context length is 4096 tokens"),
    ("/generate", {"text": LONG}, "text", "maximum context length is 4096 tokens"),
    ("/generate", {"input_ids": [1] * 5000}, "input_ids", "maximum context length is 4096 tokens"),
    ("/generate", {"text": "x", "sampling_params": {"max_new_tokens": 5000}}, "sampling_params.max_new_tokens",
     "is 4096 tokens"),
    (MESSAGES, {"messages": [{"role": "user", "content": LONG}], "max_tokens": 4}, "messages",
     "prompt is too long: 5001 tokens > 4095 maximum"),
    (MESSAGES, {"messages": HI, "max_tokens": 5000}, "max_tokens",
     "input length and `max_tokens` exceed context limit: 3 + 5000 > 4096"),
]  # fmt: skip


async def test_words_that_other_software_looks_for() -> None:
    async with open_site() as site:
        for path, fields, param, says in TOO_LONG:
            status, answer = await site.post(path, fields)
            error = answer["error"]
            assert (status, error["param"], error["code"]) == (400, param, "context_length_exceeded"), (path, answer)
            assert says in error["message"], error["message"]
        await site.house.settled()


OWN = "sampling_params"
SOME = ["a", "b"]
SURE = {"type": "choice", "instructions": "Which?", "choices": [{"value": "a"}, {"value": "b"}]}
OF_SEVERAL: list[tuple[str, dict[str, Any], str, str]] = [
    (TEXT, {"prompt": ["a", LONG]}, "prompt[1]", "prompt[1]: the prompt has 5000 tokens"),
    (TEXT, {"prompt": ["a", [1, 300]], "n": 2}, "prompt[1]", "prompt[1]: token id 300 is outside"),
    (TEXT, {"prompt": ["a", ""]}, "prompt[1]", "the prompt[1] is empty"),
    (TEXT, {"prompt": ["a", LONG[:100]], "max_tokens": 4090}, "max_tokens", "prompt[1]: the prompt has 100 tokens and"),
    ("/generate", {"text": ["a", LONG]}, "text[1]", "text[1]: the prompt has 5000 tokens"),
    ("/generate", {"input_ids": [[1], [1] * 5000], "stream": True}, "input_ids[1]", "input_ids[1]: the prompt has"),
    ("/generate", {"input_ids": [[1], []]}, "input_ids[1]", "input_ids[1] is an empty list"),
    ("/generate", {"text": SOME, OWN: [{}, {"max_new_tokens": 5000}]}, f"{OWN}[1].max_new_tokens", "text[1]: "),
    ("/generate", {"text": SOME, OWN: [{}, {"logit_bias": {"300": 1}}]}, f"{OWN}[1].logit_bias", "text[1]: "),
    ("/generate", {"text": SOME, "logprob_start_len": [0, -2]}, "logprob_start_len[1]", "logprob_start_len[1] is -2"),
    ("/generate", {"text": SOME, "rid": ["a", "é"]}, "rid[1]", "rid[1] is 'é'"),
    ("/v1/choices", {"choices": ["a", LONG], "prompt": "x"}, "prompt", "choices[1]: the prompt has"),
    (DECISIONS, {"input": "x", "questions": [SURE, {**SURE, "instructions": LONG}]}, "input", "questions[1]: "),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "param", "says"), OF_SEVERAL)
async def test_an_error_names_which_of_several_prompts_it_is_of(
    path: str, fields: dict[str, Any], param: str, says: str
) -> None:
    async with open_site() as site:
        status, answer = await site.post(path, fields)
        assert (status, answer["error"]["param"]) == (400, param), answer
        assert answer["error"]["message"].startswith(says)
        await site.house.settled()


@given(Counts, Counts, Counts)
def test_what_is_told_can_be_read(tokens: int, new: int, most: int) -> None:
    theirs = Words(phrases=ANTHROPIC_PHRASES)
    counted_tokens, by_characters = prompt_too_long(tokens, most), prompt_too_long(tokens, most, characters=new)
    assert f"maximum context length is {most} tokens" in counted_tokens.message
    for error in (counted_tokens, by_characters):
        assert error.worded(theirs).message.startswith(f"prompt is too long: {tokens} tokens > {most - 1} maximum; ")
    said = reply_too_long(tokens, new, most).worded(theirs).message
    assert said.startswith(f"input length and `max_tokens` exceed context limit: {tokens} + {new} > {most}; ")
    other = RequestError("the input has 3 tokens; send fewer")
    assert other.worded(theirs).message == "the input has 3 tokens; send fewer"


async def test_characters_alone_may_be_too_many() -> None:
    """No token stands for more than the longest one of the vocabulary, so such a text is not tokenized at all."""
    said = prompt_too_long(9000, 4096, characters=36_000)
    assert "has 36000 characters, which are at least 9000 tokens, and the model's maximum" in said.message
    async with open_site() as site, claude(site) as api:
        text = "x" * 400_000
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long: 80001 tokens > 4095 maximum"):
            await api.messages.create(model="echo", max_tokens=4, messages=[{"role": "user", "content": text}])


# ── named as the API in use has it ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("param", ["prompt", "messages", "max_tokens", "grammar", "chat_template_kwargs", "stop"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}]}),
        (RESPONSES, {"input": "x", "tools": [{"type": "function", "name": "f"}]}),
        (MESSAGES, {"messages": HI, "max_tokens": 4, "tools": [{"name": "f", "input_schema": {}}]}),
    ],
)
async def test_an_error_names_a_field_that_the_api_has(path: str, body: dict[str, Any], param: str) -> None:
    refused = RequestError(f"{param} is wrong; correct it", param=param)
    async with serving(FakeFront([refused])) as url:
        status, answer = await post(url + path, body)
    assert status == 400
    (kind,) = {route.takes for route in ROUTES if route.path == path and route.takes}
    named = answer["error"]["param"].partition(".")[0]
    assert named in kind.__struct_fields__, named


# ── models ───────────────────────────────────────────────────────────────────────────────────


def claude(site: Site) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=site.url, api_key="any", max_retries=0, timeout=20)


async def test_models_in_each_clients_shape() -> None:
    async with open_site(names=("a", "b/c")) as site, claude(site) as theirs, client(site.url) as ours:
        listed = await theirs.models.list()
        assert [(model.id, model.type, model.display_name) for model in listed.data] == [
            ("a", "model", "a"),
            ("b/c", "model", "b/c"),
        ]
        assert (listed.first_id, listed.last_id, listed.has_more) == ("a", "b/c", False)
        found = await theirs.models.retrieve("a")
        assert (found.max_input_tokens, found.lifecycle) == (4096, "active") and found.created_at.year >= 2024
        assert [model.id async for model in theirs.models.list()] == ["a", "b/c"]
        with pytest.raises(anthropic.NotFoundError) as refused:
            await theirs.models.retrieve("x")
        assert refused.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        assert [(model.id, model.object) for model in (await ours.models.list()).data] == [
            ("a", "model"),
            ("b/c", "model"),
        ]
        with pytest.raises(openai.NotFoundError, match="'x' is not served"):
            await ours.models.retrieve("x")
