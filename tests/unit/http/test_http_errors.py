"""Every refusal of the HTTP API: its status, its OpenAI shape, and that it names the value and the remedy."""

import re
from collections.abc import AsyncGenerator

import aiohttp
import openai
import pytest
from http_front import FakeFront, chunks, serving, text_of
from test_http import HI, client, post, stream

from engine.errors import RequestError, WorkerError
from engine.messages.reply import Chunk
from engine.messages.request import Generate
from engine.messages.text import Prepare
from engine.runtime.front import Health

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
NATIVE = "/generate"
OWN = "sampling_params"
IMAGE = {"type": "image", "text": ""}

# path, body, param, what the message must say
REFUSED = [
    (CHAT, {}, None, "missing required field `messages`; send it"),
    (CHAT, [], None, "expected `object`, got `array`"),
    (CHAT, {"messages": []}, "messages", "empty"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "needs a text"),
    (CHAT, {"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role", "'boss'"),
    (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type", "image"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content[0].type",
     "send one of 'text', 'image_url', 'video_url'"),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "smell"}]}]}, "input[0].content[0].type",
     "send one of 'input_text', 'output_text'"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour", "unknown field"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]", "missing required"),
    (CHAT, {"messages": HI, "temprature": 1}, "temprature", "did you mean temperature?"),
    (CHAT, {"messages": HI, "zzz": 1}, "zzz", "the fields here are"),
    (CHAT, {"messages": HI, "temperature": 2.5}, "temperature", "2.5; it must be a number from 0 to 2"),
    (CHAT, {"messages": HI, "temperature": "hot"}, "temperature", 'expected `float | null`, got `str` "hot"'),
    (CHAT, {"messages": HI, "max_tokens": 0}, "max_tokens", "0; it must be a whole number from 1"),
    (CHAT, {"messages": HI, "max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0"),
    (CHAT, {"messages": HI, "max_completion_tokens": 2, "max_tokens": 3}, "max_completion_tokens", "send one"),
    (CHAT, {"messages": HI, "stop": [""]}, "stop", "none of them empty"),
    (CHAT, {"messages": HI, "stop": ["a"] * 17}, "stop", "17 strings"),
    (CHAT, {"messages": HI, "stop": 3}, "stop", "got `int`"),
    (CHAT, {"messages": HI, "seed": 2**63}, "seed", "9223372036854775808"),
    (CHAT, {"messages": HI, "priority": 2**40}, "priority", "<= 2147483647"),
    (CHAT, {"messages": HI, "stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    (CHAT, {"messages": HI, "stream_options": {"include": True}}, "stream_options.include", "include_usage?"),
    (CHAT, {"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role", "send one of 'system', "),
    (CHAT, {"messages": HI, "n": 0}, "n", "from 1 to 128"),
    (CHAT, {"messages": HI, "n": 129}, "n", "from 1 to 128"),
    (CHAT, {"messages": HI, "n": True}, "n", "got `bool`"),
    (CHAT, {"messages": HI, "logprobs": 3}, "logprobs", "expected `bool | null`, got `int` 3; correct"),
    (CHAT, {"messages": HI, "top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21; it must be"),
    (CHAT, {"messages": HI, "response_format": {"type": "yaml"}}, "response_format.type", "'yaml'"),
    (CHAT, {"messages": HI, "guided_json": "{"}, "guided_json", "guided_json is no JSON"),
    (CHAT, {"messages": HI, "guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "not supported yet"),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, "tools[0]", "missing required field `function`"),
    (CHAT, {"messages": HI, "presence_penalty": 2.5}, "presence_penalty", "2.5; it must be a number from -2"),
    (CHAT, {"messages": HI, "logit_bias": {"5": 101}}, "logit_bias", "from -100"),
    (CHAT, {"messages": HI, "logit_bias": {"x": 1}}, "logit_bias", "expected `int`, got `str`"),
    (CHAT, {"messages": HI, "stop_regex": "("}, "stop_regex", "a regular expression"),
    (CHAT, {"messages": HI, "bad_words": [""]}, "bad_words", "none of them empty"),
    (CHAT, {"messages": HI, "allowed_token_ids": []}, "allowed_token_ids", "empty"),
    (CHAT, {"messages": HI, "cache_salt": ""}, "cache_salt", "1 to 1024"),
    (CHAT, {"messages": HI, "min_tokens": 5, "max_tokens": 4}, "min_tokens", "from 0 to 4"),
    (CHAT, {"messages": HI, "presence_penalty": 3}, "presence_penalty", "is 3; it must be a number from -2 to 2 ("),
    (CHAT, {"messages": HI, "repetition_penalty": 11.5}, "repetition_penalty", "above 0 and at most 10 ("),
    (TEXT, {"prompt": "x", "logprobs": 21}, "logprobs", "21; it must be a whole number from 0 to 20"),
    (TEXT, {"prompt": "x", "prompt_logprobs": -1}, "prompt_logprobs", "from 0 to 20"),
    (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens", "from 1"),
    (TEXT, {"prompt": "x", "suffix": "y"}, "suffix", "not supported yet"),
    (TEXT, {"prompt": "x", "best_of": 3}, "best_of", "not ranked here: send n: 3"),
    (TEXT, {"prompt": []}, "prompt", "at least one token id"),
    (TEXT, {"prompt": ["a", 1]}, "prompt", "mixes"),
    (TEXT, {"prompt": [["a"]]}, "prompt[0][0]", "got `str`"),
    (TEXT, {"prompt": ["a", []]}, "prompt[1]", "at least one token id"),
    (TEXT, {"prompt": ["a"] * 9, "n": 128}, "n", "9 prompts with 128 replies each are over the 1024"),
    (TEXT, {"prompt": [1, -2]}, "prompt[1]", ">= 0"),
    (TEXT, {"prompt": "x", "top_p": 0}, "top_p", "above 0 and at most 1"),
    (NATIVE, {}, "text", "neither text nor input_ids"),
    (NATIVE, {"text": "x", "input_ids": [1]}, "input_ids", "both text and input_ids"),
    (NATIVE, {"text": []}, "text", "empty list"),
    (NATIVE, {"input_ids": [[1], 2]}, "input_ids", "mixes"),
    (NATIVE, {"text": ["x", "y"], "rid": ["a"]}, "rid", "1 entry for 2 prompts"),
    (NATIVE, {"text": "x", "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len", "-2"),
    (NATIVE, {"text": "x", "return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num", "from 0 to 20"),
    (NATIVE, {"text": ["x"] * 2, "sampling_params": [{"n": 1}, {"n": 2}]}, "sampling_params", "one for all"),
    (NATIVE, {"input_ids": []}, "input_ids", "empty list"),
    (NATIVE, {"text": "x", "rid": ""}, "rid", "1 to 256"),
    (NATIVE, {"text": "x", "rid": "a\r\nSet-Cookie: b"}, "rid", "printable ASCII"),
    (NATIVE, {"text": "x", "token_ids_logprob": [1]}, "token_ids_logprob", "not supported yet"),
    (NATIVE, {"text": "x", "sampling_params": {"max_tokens": 3}}, "sampling_params.max_tokens", "max_new_tokens"),
    (NATIVE, {"text": "x", "sampling_params": {"max_new_tokens": -1}}, f"{OWN}.max_new_tokens", "max_new_tokens is -1"),
    (NATIVE, {"text": "x", "sampling_params": {"sampling_seed": 2**63}}, f"{OWN}.sampling_seed", "9223372036854775808"),
    (NATIVE, {"text": "x", "sampling_params": {"temperature": "hot"}}, f"{OWN}.temperature", "got `str`"),
    (NATIVE, {"text": "x", "sampling_params": {"temperature": 3}}, f"{OWN}.temperature", f"{OWN}.temperature is 3"),
    (NATIVE, {"text": "x", "sampling_params": {"n": 0}}, f"{OWN}.n", f"{OWN}.n is 0; it must be from 1"),
    (NATIVE, {"text": ["x"] * 2, "sampling_params": [{}, {"min_p": "a"}]}, f"{OWN}[1].min_p", "got `str`"),
    (NATIVE, {"text": ["x"] * 2, "sampling_params": [{}, {"min_p": 2}]}, f"{OWN}[1].min_p", f"{OWN}[1].min_p is 2"),
    (NATIVE, {"text": ["x"] * 2, "sampling_params": [{}, {"json_schema": "3"}]}, f"{OWN}[1].json_schema", "an object"),
    (NATIVE, {"text": ["x"] * 2, "sampling_params": {"min_p": 2}}, f"{OWN}.min_p", f"{OWN}.min_p is 2"),
    (NATIVE, {"text": "x", "sampling_params": {"regex": 3}}, "sampling_params.regex", "got `int`"),
    (NATIVE, {"text": "x", "sampling_params": {"json_schema": "3"}}, "sampling_params.json_schema", "an object, true"),
    ("/abort_request", {}, "rid", "send a rid"),
    ("/abort_request", {"rid": "a", "abort_all": True}, "rid", "not both"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "says"), REFUSED)
async def test_a_bad_request_is_refused(path: str, body: object, param: str | None, says: str) -> None:
    front = FakeFront()
    async with serving(front) as url:
        status, answer = await post(url + path, body)
    assert status == 400, answer
    assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
    error = answer["error"]
    assert says in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert isinstance(error["code"], str)
    assert not front.asked


class Tokenizing(FakeFront):
    """Refuses what the tokenizer of a model refuses that reads text."""

    def __init__(self) -> None:
        super().__init__()
        self.text = text_of("{% for m in messages %}{{ m.content }}{% endfor %}")

    async def generate(self, request: Generate) -> AsyncGenerator[Chunk, None]:
        assert self.texts is not None
        await self.texts.ask(Prepare(request, 2048, 1000))
        async for chunk in super().generate(request):
            yield chunk


SEEN = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": [SEEN]}
MEDIA = [
    (CHAT, "messages", {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, ""),
    (CHAT, "messages", {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, ""),
    (CHAT, "messages", {"type": "video_url", "video_url": {"url": "https://a/b"}}, ""),
    (CHAT, "messages", {"type": "file", "file": {"file_id": "a"}}, ""),
    ("/v1/responses", "input", {"type": "input_image", "image_url": "https://a/b"}, ""),
    ("/v1/responses", "input", {"type": "input_file", "file_id": "a"}, ""),
    ("/v1/messages", "messages", SEEN, ""),
    ("/v1/messages", "messages", {"type": "document", "source": {"type": "url", "url": "https://a/b"}}, ""),
    ("/v1/messages", "messages", RESULT, ".content[0]"),
    ("/tokenize", "messages", {"type": "image_url", "image_url": {"url": "https://a/b"}}, ""),
]


@pytest.mark.parametrize(("path", "field", "part", "inner"), MEDIA)
async def test_pictures_are_refused_because_the_model_reads_text(
    path: str, field: str, part: dict[str, object], inner: str
) -> None:
    body = {"max_tokens": 9} if path == "/v1/messages" else {}
    kind = SEEN["type"] if inner else part["type"]
    async with serving(Tokenizing()) as url:
        status, answer = await post(url + path, body | {field: [{"role": "user", "content": [part]}]})
    place = f"{field}[0].content[0]{inner}.type"
    assert (status, answer["error"]["param"]) == (400, place)
    assert answer["error"]["message"].startswith(f"{place} is {kind!r}, and the model reads text alone; send text")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": HI, "max_tokens": 9}, "max_tokens"),
        (CHAT, {"messages": HI, "max_completion_tokens": 9}, "max_completion_tokens"),
        (CHAT, {"messages": HI, "max_completion_tokens": 9, "stream": True}, "max_completion_tokens"),
        (NATIVE, {"text": "x", "sampling_params": {"max_new_tokens": 9}}, f"{OWN}.max_new_tokens"),
    ],
)
async def test_what_the_engine_refuses_goes_by_the_clients_name(path: str, body: object, param: str) -> None:
    said = "max_tokens 9 and a prompt of 8 tokens are over the model's length of 10; ask for at most 2 tokens"
    template = said.replace("max_tokens", "{max_tokens}").replace("2", "{room}")
    refused = RequestError(template, param="max_tokens", facts={"room": 2})
    assert refused.message == said
    async with serving(FakeFront([refused])) as url:
        status, answer = await post(url + path, body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["message"] == said.replace("max_tokens", param)


async def test_an_error_in_a_stream_goes_by_the_clients_name() -> None:
    late = RequestError("{max_tokens} is over {most}", param="max_tokens", facts={"most": 2})
    async with serving(FakeFront([*chunks("a", finish=None), late])) as url, aiohttp.ClientSession() as session:
        for path, body, name in (
            (CHAT, {"messages": HI, "max_completion_tokens": 9}, "max_completion_tokens"),
            (NATIVE, {"text": "x"}, f"{OWN}.max_new_tokens"),
            ("/v1/responses", {"input": "x"}, "max_output_tokens"),
        ):
            async with session.post(url + path, json={**body, "stream": True}) as response:
                assert response.status == 200
                assert f"{name} is over 2" in await response.text(), path


@pytest.mark.parametrize("body", [{"priority": None}, {"stream": True, "stream_options": {"include_usage": None}}])
async def test_null_is_the_same_as_leaving_out(body: dict[str, object]) -> None:
    async with (
        serving(FakeFront()) as url,
        aiohttp.ClientSession() as session,
        session.post(url + CHAT, json={"messages": HI, **body}) as response,
    ):
        assert response.status == 200, await response.text()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"prompt": "x", }', r"\(byte 16\)"),
        (b"", "0 bytes"),
        (b'{"prompt": "\xff"}', "utf-8|UTF-8"),  # msgspec before 0.23, and since
        (b'{"prompt": "x", "temperature": NaN}', r"\(byte 31\)"),
        (b'{"user": ' + b"[" * 200_000, "nested too deeply"),
    ],
)
async def test_what_is_not_json(body: bytes, says: str) -> None:
    async with (
        serving(FakeFront()) as url,
        aiohttp.ClientSession() as session,
        session.post(url + TEXT, data=body) as response,
    ):
        answer = await response.json()
    assert (response.status, answer["error"]["code"]) == (400, "invalid_json")
    assert re.search(says, answer["error"]["message"])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"prompt": "a", "echo": "yes", broken', "echo: expected `bool | null`, got `str`; correct"),
        (b'{"prompt": "a", "echo": "yes", "x": "\\ud8"}', "echo: expected `bool | null`, got `str`; correct"),
        (b'{"prompt": "a", "echo": ' + b"9" * 30 + b"}", "echo: expected `bool | null`, got"),
        (
            b'{"prompt": "a", "echo": "' + b"y" * 99 + b'"}',
            'echo: expected `bool | null`, got `str` "' + 76 * "y" + "...;",
        ),
        (b'{"prompt": "a", "echo": "' + b"y" * 70_000 + b'"}', "echo: expected `bool | null`, got `str`; correct"),
    ],
)
async def test_a_wrong_value_is_told_where_it_is_short_and_can_be_read(body: bytes, says: str) -> None:
    async with (
        serving(FakeFront()) as url,
        aiohttp.ClientSession() as session,
        session.post(url + TEXT, data=body) as response,
    ):
        answer = await response.json()
    assert response.status == 400
    assert says in answer["error"]["message"]


async def test_a_body_that_is_too_long() -> None:
    async with (
        serving(FakeFront()) as url,
        aiohttp.ClientSession() as session,
        session.post(url + TEXT, data=b" " * (32 * 2**20 + 1)) as response,
    ):
        answer = await response.json()
    assert (response.status, answer["error"]["code"]) == (413, "body_too_large")
    assert "33554432" in answer["error"]["message"]


async def test_unknown_routes_and_methods() -> None:
    async with (
        serving(FakeFront()) as url,
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/edits", json={}) as response,
    ):
        error = (await response.json())["error"]
        assert (response.status, error["code"], error["type"]) == (404, "not_found", "invalid_request_error")
        assert "/v1/edits" in error["message"] and CHAT in error["message"]
        async with session.get(url + CHAT) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (405, "method_not_allowed")
            assert response.headers["Allow"] == "POST"
            assert "does not take GET; use POST" in error["message"]


async def test_another_model() -> None:
    async with serving(FakeFront()) as url, client(url) as api:
        with pytest.raises(openai.NotFoundError) as caught:
            await api.completions.create(model="gpt", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "'gpt'" in caught.value.message and "'fake'" in caught.value.message


async def test_the_api_key() -> None:
    async with serving(FakeFront(), api_key=("sesame",)) as url, aiohttp.ClientSession() as session:
        async with client(url, "sesame") as api:
            assert (await api.models.list()).data
        async with client(url, "guess") as api:
            with pytest.raises(openai.AuthenticationError, match="API key is wrong") as caught:
                await api.models.list()
        assert caught.value.code == "invalid_api_key"
        for headers in ({}, {"Authorization": "Basic sesame"}, {"Authorization": "Bearer sésame"}):
            async with session.post(url + NATIVE, json={"text": "x"}, headers=headers) as response:
                assert response.status == 401
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert "Authorization: Bearer" in (await response.json())["error"]["message"]
        for path in ("/health", "/metrics"):
            async with session.get(url + path) as response:
                assert response.status == 200


# ── failures that come from the front ────────────────────────────────────────────────────────


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (
            RequestError("long", param="prompt", code="context_length_exceeded"),
            400,
            "prompt",
            "context_length_exceeded",
        ),
        (RequestError("in use", param="rid", code="rid_in_use", status=409), 409, "rid", "rid_in_use"),
        (RequestError("queue full", code="queue_full", status=503), 503, None, "queue_full"),
        (WorkerError("signal 9"), 503, None, "engine_unavailable"),
        (ZeroDivisionError("secret"), 500, None, "internal_error"),
    ],
)
async def test_a_refusal_before_the_first_chunk_has_its_own_status(
    streamed: bool, error: Exception, status: int, param: str | None, code: str
) -> None:
    async with (
        serving(FakeFront([error])) as url,
        aiohttp.ClientSession() as session,
        session.post(url + TEXT, json={"prompt": "x", "stream": streamed}) as response,
    ):
        answer = (await response.json())["error"]
    assert (response.status, answer["param"], answer["code"]) == (status, param, code)
    assert answer["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert ("Retry-After" in response.headers) == (status == 503)
    assert "secret" not in answer["message"]


@pytest.mark.parametrize(("seconds", "said"), [(12.5, "13"), (0, "1"), (3600, "60")])
async def test_draining_says_when_to_retry(seconds: float, said: str) -> None:
    front = FakeFront([RequestError("shutting down", code="draining", status=503)])
    front.state = Health("draining", "shutting down")
    async with (
        serving(front, drain_seconds=seconds) as url,
        aiohttp.ClientSession() as session,
        session.post(url + NATIVE, json={"text": "x"}) as response,
    ):
        assert (response.status, response.headers["Retry-After"]) == (503, said)


@pytest.mark.parametrize("error", [WorkerError("signal 9"), RequestError("out of luck"), ZeroDivisionError("secret")])
async def test_a_failure_inside_a_stream_is_its_last_event(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    front = FakeFront([*chunks("a", "b")[:1], error])
    async with serving(front) as url, client(url) as api:
        *_, last = await stream(url + CHAT, {"messages": HI})
        assert last.startswith('{"error":{"message":')
        assert ("ZeroDivisionError" in last) == isinstance(error, ZeroDivisionError)
        assert "secret" not in last
        with pytest.raises(openai.APIError) as caught:
            async for _ in await api.chat.completions.create(model="fake", messages=HI, stream=True):
                pass
    assert type(caught.value) is openai.APIError
    assert ("secret" in caplog.text) == isinstance(error, ZeroDivisionError)
