"""Counts are refused before anything is built for each: the parts of a body, and what costs more than a part."""

import json
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest
from http_front import FakeFront, serving, text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_http import post

from engine.conversation.tools import as_written
from engine.errors import RequestError
from engine.http import parts
from engine.http.anthropic.messages import CountBody, conversation_of
from engine.http.native import generate as native
from engine.http.openai.chat import ChatBody
from engine.http.openai.completions import prompts_of
from engine.http.parts import MAX_PARTS, MAX_VALUES, UNCOUNTED, PartCounter, check_parts, sliced
from engine.http.responses.bodies import ResponsesBody, messages_of
from engine.http.wire import BodyDecoder, ignored_fields

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters(codec="utf-8"))
    | st.sampled_from(['"', "\\", '\\"', "[,{", "\n"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


def counted(value: Any) -> tuple[int, int]:
    """The parts of `value`, and its values."""
    match value:
        case str():
            return 1, 1
        case list() | dict():
            inner = [counted(each) for each in (value if isinstance(value, list) else value.values())]
            names = len(value) if isinstance(value, dict) else 0
            return 1 + names + sum(part for part, _ in inner), 1 + sum(number for _, number in inner)
    return 0, 1


@settings(deadline=None)
@given(value=VALUES, size=st.integers(1, 20), ascii=st.booleans(), indent=st.sampled_from([None, 2]))
def test_the_count_is_exact_however_a_body_is_sliced(value: Any, size: int, ascii: bool, indent: int | None) -> None:
    data = json.dumps(value, ensure_ascii=ascii, indent=indent).encode(errors="surrogatepass")
    counter = PartCounter()
    slices = list(sliced(data, size))
    for piece in slices:
        counter.feed(piece)
    assert b"".join(slices) == data and all(len(piece) <= size + 1 for piece in slices)
    found, values = counted(value)
    assert counter.parts == found
    assert values - found <= counter.values <= values  # of nested lists the first item has no comma


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(1, 20))
def test_what_is_no_json_is_counted_up_to_its_mistake(tail: bytes, size: int) -> None:
    data = b'{"a":["b","c",{"d":1}],' + tail
    counter = PartCounter()
    for piece in sliced(data, size):
        counter.feed(piece)
    assert counter.parts >= 7 - 1 and counter.values >= 4


@pytest.mark.anyio
@pytest.mark.parametrize("item", [b'""', b"[]", b"{}", b'"\\""'])
async def test_a_body_of_too_many_parts_is_not_decoded(item: bytes) -> None:
    most = b"[" + b",".join([item] * (MAX_PARTS - 1)) + b"]"
    await check_parts(most + b" " * UNCOUNTED)
    with pytest.raises(RequestError, match=f"over {MAX_PARTS} strings, lists and objects; send fewer") as refused:
        await check_parts(b"[" + item + b"," + most + b"]")
    assert (refused.value.status, refused.value.code) == (400, "too_many_parts")


@pytest.mark.anyio
async def test_a_million_token_ids_are_not_too_many() -> None:
    await check_parts(b'{"input_ids":[' + b"1," * (1 << 20) + b"1]}")
    with pytest.raises(RequestError, match=f"over {MAX_VALUES} values"):
        await check_parts(b'{"input_ids":[' + b"1," * MAX_VALUES + b"1]}")


@pytest.mark.anyio
async def test_others_run_between_the_slices_of_one_body() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    async with anyio.create_task_group() as group:
        group.start_soon(other)
        await anyio.lowlevel.checkpoint()
        await check_parts(b'"' + b"x" * (10 * parts.SLICE) + b'"')
        group.cancel_scope.cancel()
    assert turns >= 10


# ── what has limits of its own ───────────────────────────────────────────────────────────────

USER = {"role": "user", "content": "a"}
PARAMS = [{"stop_regex": [f"x{index}{each}" for each in range(4)]} for index in range(40)]


def tools(count: int) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": f"f{index}"}} for index in range(count)]


TEXTS = [{"type": "text", "text": ""}] * 30_000
ENUM = {"function": {"name": "f", "parameters": {"enum": [{}] * 150_000}}}
PLAIN_TOOL = {"name": "f", "input_schema": {}}
MANY = {"a": "x" * 70_000}
CHAT, TEXT, COUNT = "/v1/chat/completions", "/v1/completions", "/v1/messages/count_tokens"
TOO_MANY: list[tuple[str, dict[str, Any], str | None, str]] = [
    (CHAT, {"messages": [USER] * 10_001}, "messages", "has 10001 items, and at most 10000"),
    ("/tokenize", {"messages": [USER] * 10_001}, "messages", "has 10001 items"),
    (COUNT, {"messages": [USER] * 10_001}, "messages", "has 10001 items"),
    ("/v1/messages", {"messages": [USER] * 10_001, "max_tokens": 1}, "messages", "has 10001 items"),
    ("/v1/responses", {"input": [USER] * 10_001}, "input", "has 10001 items"),
    (CHAT, {"messages": [USER], "tools": tools(1025)}, "tools", "has 1025 items, and at most 1024"),
    ("/tokenize", {"messages": [USER], "tools": tools(1025)}, "tools", "has 1025 items"),
    ("/v1/responses", {"input": "a", "tools": [{"type": "function", "name": "f"}] * 1025}, "tools", "1025 items"),
    (COUNT, {"messages": [USER], "tools": [PLAIN_TOOL] * 1025}, "tools", "1025 items"),
    (TEXT, {"prompt": ["a"] * 1025}, "prompt", "1025 prompts with 1 reply each are over the 1024"),
    (TEXT, {"prompt": [[1]] * 50_000}, "prompt", "50000 prompts"),
    (TEXT, {"prompt": ["a"] * 9, "n": 128}, "n", "9 prompts with 128"),
    ("/generate", {"text": ["a"] * 1025}, "text", "1025 prompts"),
    ("/generate", {"input_ids": [[1]] * 50_000}, "input_ids", "50000 prompts"),
    ("/generate", {"text": "a", "sampling_params": {"n": 129}}, "sampling_params.n", "n is 129"),
    ("/generate", {"text": ["a"] * 40, "sampling_params": PARAMS}, "sampling_params", "160 different expressions"),
    ("/generate", {"text": "a", "sampling_params": {"stop": ["a"] * 9000}}, "sampling_params.stop", "9000 strings"),
    (TEXT, {"prompt": "a", "stop": ["a"] * 9000}, "stop", "9000 strings"),
    (TEXT, {"prompt": "a", "stop_regex": ["a"] * 9000}, "stop_regex", "9000 strings"),
    (TEXT, {"prompt": "a", "stop_token_ids": [1] * 9000}, "stop_token_ids", "9000 ids"),
    (TEXT, {"prompt": "a", "bad_words": ["a"] * 9000}, "bad_words", "9000 strings"),
    (TEXT, {"prompt": "a", "allowed_token_ids": [1] * 300_000}, "allowed_token_ids", "300000 ids"),
    (TEXT, {"prompt": "a", "logit_bias": {str(id): 1 for id in range(9000)}}, "logit_bias", "9000 biases"),
    (TEXT, {"prompt": "a", "choice": ["a"] * 9000}, "choice", "1 to 1024 strings"),
    ("/v1/messages", {"messages": [USER], "max_tokens": 1, "stop_sequences": ["a"] * 9000}, "stop_sequences", "9000"),
    ("/v1/embeddings", {"input": ["a"] * 2049}, "input", "2049 entries"),
    ("/v1/score", {"text_1": "a", "text_2": ["a"] * 2049}, "text_2", "2049 entries"),
    ("/v1/responses", {"input": "a", "metadata": {str(key): "" for key in range(17)}}, "metadata", "length <= 16"),
    (CHAT, {"messages": [USER], "chat_template_kwargs": MANY}, "chat_template_kwargs", "70008 bytes"),
    (CHAT, {"messages": [{"role": "user", "content": TEXTS}]}, None, "parts"),
    (COUNT, {"messages": [{"role": "user", "content": TEXTS}]}, None, "parts"),
    (CHAT, {"messages": [USER], "metadata": [[]] * 150_000}, None, "strings, lists and objects"),
    (CHAT, {"messages": [USER], "tools": [ENUM]}, None, "strings, lists and objects"),
    ("/detokenize", {"tokens": [1] * 70_000}, "tokens", "70000 ids, and at most 65536"),
    ("/v1/embeddings", {"input": [1] * 1_200_000}, None, f"over {MAX_VALUES} values"),
]


@pytest.mark.anyio
async def test_too_many_are_refused_in_words() -> None:
    front = FakeFront()
    front.text = text_of(None)
    async with serving(front) as url:
        for path, body, param, says in TOO_MANY:
            status, answer = await post(url + path, body)
            told = {name: answer["error"][name] for name in ("message", "param")}
            assert status == 400 and says in told["message"] and told["param"] == param, (path, list(body), told)
    assert not front.asked


@pytest.mark.anyio
async def test_more_tokens_than_are_counted_are_refused() -> None:
    front = FakeFront()
    front.text = text_of("{% for m in messages %}{{ m.content }}{% endfor %}")
    long = "x" * 70_000
    async with serving(front) as url:
        for path, body, param in (
            ("/tokenize", {"prompt": long}, "prompt"),
            ("/tokenize", {"messages": [USER | {"content": long}]}, "messages"),
            ("/v1/messages/count_tokens", {"messages": [USER | {"content": long}]}, "messages"),
        ):
            status, answer = await post(url + path, body)
            assert (status, answer["error"]["param"]) == (400, param)
            assert (
                answer["error"]["code"] == "context_length_exceeded" and "at most 65536" in answer["error"]["message"]
            )


def test_a_name_of_any_length_is_refused_in_short_words() -> None:
    decoder = BodyDecoder(ChatBody)
    for body in (
        {"x" * 100_000: 1},
        {" - at `$" * 10_000: 1},
        {"messages": [{"role": "x" * 100_000}]},
        {"messages": [], "response_format": {"type": "x" * 100_000}},
        {"messages": [], "audio": "x" * 100_000},
    ):
        with pytest.raises(RequestError) as refused:
            ignored_fields(decoder.decode(msgspec.json.encode(body)))
        assert len(refused.value.message) < 2000


# ── joined in time that goes by their length ─────────────────────────────────────────────────


def test_turns_of_one_role_become_one() -> None:
    blocks = [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"type": "tool_use", "id": "1", "name": "f", "input": {"of": "a\u2028b"}}
    turns = [
        {"role": "user", "content": "one"},
        {"role": "user", "content": ""},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": [*blocks, call]},
        {"role": "assistant", "content": [call]},
    ]
    said = conversation_of(BodyDecoder(CountBody).decode(msgspec.json.encode({"messages": turns, "system": "s"})))
    function = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"of":"a\u2028b"}'}}
    assert list(as_written(said, text_arguments=True)) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "ab", "reasoning_content": "t", "tool_calls": [function, function]},
    ]


def test_items_of_one_turn_become_one() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    items = [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}]}, call, call]
    body = BodyDecoder(ResponsesBody).decode(msgspec.json.encode({"input": [USER, *items, USER]}))
    function = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert list(as_written(messages_of(body.input), text_arguments=True)) == [
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [function, function]},
        USER,
    ]


def test_prompts_and_ids_are_told_apart() -> None:
    assert native.prompts_of(native.GenerateBody(input_ids=[1, 2])) == ([[1, 2]], False)
    assert native.prompts_of(native.GenerateBody(input_ids=[[1], [2]])) == ([[1], [2]], True)
    assert prompts_of([[1], "a"]) == [[1], "a"]
    assert prompts_of([]) == [[]]
    for mixed in ([1, "a"], ["a", 1]):
        with pytest.raises(RequestError, match="mixes"):
            prompts_of(mixed)
