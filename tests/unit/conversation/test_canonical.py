"""The canonical text of a request and its hashes: what router and worker have to agree on."""

import hashlib
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.conversation.canonical import (
    BLOCK,
    arrival_space,
    arrival_text,
    chained,
    of_ids,
    of_messages,
    space_of,
    written,
)
from engine.conversation.parts import Call, Image, Message, Result, Text, Video
from engine.http.anthropic import messages as anthropic
from engine.http.openai import chat
from engine.http.responses import bodies as responses
from engine.http.responses.responses import wanted_of as wanted_of_response

CHAT, RESPONSES, ANTHROPIC = "/v1/chat/completions", "/v1/responses", "/v1/messages"
PICTURE = "data:image/png;base64,aGVsbG8="
texts = st.text(max_size=40)
shown = st.one_of(
    texts.map(Text),
    st.builds(Image, texts, st.just("here"), detail=st.sampled_from([None, "low"])),
    st.builds(Video, texts, st.just("here")),
)
calls = st.builds(Call, texts, texts, st.none() | texts)
messages = st.lists(
    st.one_of(
        st.builds(
            Message,
            st.sampled_from(["system", "developer", "user", "assistant"]),
            st.lists(shown | calls, max_size=3).map(tuple),
            name=st.none() | texts,
            reasoning=st.none() | texts,
        ),
        st.builds(lambda parts: Message("tool", (Result("id", tuple(parts)),)), st.lists(shown, max_size=2)),
    ),
    max_size=6,
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)

TOOL = {"name": "look_up", "description": "Finds a page.", "parameters": {"properties": {"page": {"type": "string"}}}}
SPOKEN = "The weather in a town\nis what I ask for."
CONVERSATION = {
    "messages": [
        {"role": "developer", "content": "Be short."},
        {
            "role": "user",
            "content": [{"type": "text", "text": SPOKEN}, {"type": "image_url", "image_url": {"url": PICTURE}}],
        },
        {
            "role": "assistant",
            "reasoning_content": "I had better look.",
            "content": "One moment.",
            "tool_calls": [{"id": "a", "function": {"name": "look_up", "arguments": '{"page": "towns", "n": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "It rains."},
        {"role": "user", "content": "Thanks."},
    ],
    "tools": [{"type": "function", "function": TOOL}],
}
RESPONSE = {
    "instructions": "Be short.",
    "input": [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": SPOKEN}, {"type": "input_image", "image_url": PICTURE}],
        },
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "I had better look."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "One moment."}]},
        {"type": "function_call", "call_id": "b", "name": "look_up", "arguments": '{"page":"towns","n":1}'},
        {"type": "function_call_output", "call_id": "b", "output": "It rains."},
        {"role": "user", "content": "Thanks."},
    ],
    "tools": [{"type": "function", **TOOL}, {"type": "web_search"}],
}
ANTHROPIC_BODY = {
    "max_tokens": 5,
    "system": [{"type": "text", "text": "Be short."}],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": SPOKEN},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I had better look.", "signature": ""},
                {"type": "text", "text": "One moment."},
                {"type": "tool_use", "id": "c", "name": "look_up", "input": {"page": "towns", "n": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c", "content": "It rains."},
                {"type": "text", "text": "Thanks."},
            ],
        },
    ],
    "tools": [{"name": "look_up", "description": TOOL["description"], "input_schema": TOOL["parameters"]}],
}


# ── hashes ───────────────────────────────────────────────────────────────────────────────────


def test_a_hash_is_that_of_all_text_up_to_the_end_of_its_block() -> None:
    text = "an ä and \ud800 in it" * 20
    ends = range(BLOCK, len(text) + 1, BLOCK)
    digests = [
        hashlib.blake2b(text[:end].encode("utf-8", "surrogatepass"), digest_size=8, key=b"salt").digest()
        for end in ends
    ]
    assert list(chained(text, b"salt")) == [int.from_bytes(digest, "little") for digest in digests]
    assert len(digests) == len(text) // BLOCK == 2


@given(st.text(max_size=500), st.text(max_size=300), st.binary(max_size=8))
@settings(max_examples=30)
def test_a_longer_text_has_the_hashes_of_a_shorter_one(text: str, more: str, space: bytes) -> None:
    short, long = chained(text, space), chained(text + more, space)
    assert long[: len(short)] == short
    assert len(long) == len(text + more) // BLOCK


def test_spaces_share_no_hash_and_no_salt_is_no_space() -> None:
    text = "x" * 300
    assert not set(chained(text, space_of("one"))) & set(chained(text, space_of("two")))
    assert space_of("") == b"" == arrival_space({"cache_salt": None}) == arrival_space({"cache_salt": 5})
    assert arrival_space({"cache_salt": "one"}) == space_of("one") != b""
    assert arrival_space([]) == b""  # type: ignore[arg-type]


# ── texts ────────────────────────────────────────────────────────────────────────────────────


@given(messages, messages)
@settings(max_examples=60)
def test_a_conversation_that_grows_begins_with_what_it_was(first: list[Message], more: list[Message]) -> None:
    assert of_messages([*first, *more]).startswith(of_messages(first))


@given(messages)
@settings(max_examples=40)
def test_texts_stand_where_the_canonical_text_says(conversation: list[Message]) -> None:
    made = written(conversation)
    text = made.whole()
    said = [part.text for message in conversation for part in message.shown if isinstance(part, Text)]
    assert [text[start : start + len(part)] for start, part in made.texts] == said == [part for _, part in made.texts]
    assert made.length == len(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Message("user", (Text("a"),)), Message("assistant", (Text("a"),))),
        (Message("user", (Text("a"),)), Message("user", (Text("a"),), name="Ann")),
        (Message("user", (Image("a", ""),)), Message("user", (Image("b", ""),))),
        (Message("user", (Image("a", ""),)), Message("user", (Video("a", ""),))),
        (Message("user", (Image("a", ""),)), Message("user", (Image("a", "", detail="low"),))),
        (Message("assistant", (Text("a"),)), Message("assistant", (), reasoning="a")),
        (Message("assistant", (Call("f", "{}"),)), Message("assistant", (Call("f", '{"a":1}'),))),
        (Message("assistant", (Call("f", "{}"),)), Message("assistant", (Call("g", "{}"),))),
        (Message("tool", (Result(None, (Text("a"),)),)), Message("tool", (Result(None, (Text("b"),)),))),
    ],
)
def test_what_the_model_tells_apart_differs(one: Message, other: Message) -> None:
    assert of_messages([one]) != of_messages([other])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Message("developer", (Text("a"),)), Message("system", (Text("a"),))),
        (Message("user", (Text("a"), Text("b"))), Message("user", (Text("ab"),))),
        (Message("user", (Image("a", "here"),)), Message("user", (Image("a", "there", kind="input_image"),))),
        (Message("assistant", (Call("f", '{"a": 1}', "x"),)), Message("assistant", (Call("f", '{"a":1}', "y"),))),
        (Message("assistant", (Text("a"),)), Message("assistant", (Text("a"),), reasoning="")),
    ],
)
def test_what_the_model_does_not_tell_apart_is_the_same(one: Message, other: Message) -> None:
    assert of_messages([one]) == of_messages([other])


def test_tools_come_first_and_count() -> None:
    hello = {"messages": [{"role": "user", "content": "hello"}]}
    tools = [{"type": "function", "function": TOOL}]
    plain, offered = arrival_text(CHAT, hello), arrival_text(CHAT, {**hello, "tools": tools})
    assert offered.endswith(plain) and "look_up" in offered
    assert arrival_text(CHAT, {**hello, "tools": tools, "tool_choice": "none"}) == plain
    other = {"type": "function", "function": {"name": "other"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": tools}}
    assert arrival_text(CHAT, {**hello, "tools": [*tools, other], "tool_choice": allowed}) == offered


def test_a_conversation_is_the_same_text_in_all_apis() -> None:
    text = arrival_text(CHAT, CONVERSATION)
    assert arrival_text(RESPONSES, RESPONSE) == text
    assert arrival_text(ANTHROPIC, ANTHROPIC_BODY) == text
    assert arrival_text("/v1/messages/count_tokens", ANTHROPIC_BODY) == text
    for said in (SPOKEN, "I had better look.", "One moment.", "It rains.", "Thanks.", "Be short."):
        assert said in text
    assert PICTURE not in text


def test_it_is_the_text_that_the_engine_makes_of_the_same_body() -> None:
    chatting = msgspec.convert(CONVERSATION, chat.ChatBody)
    made = of_messages(
        chat.messages_of(chatting.messages), [tool.described() for tool in chat.wanted_of(chatting).offered]
    )
    assert arrival_text(CHAT, CONVERSATION) == made
    responding = msgspec.convert(RESPONSE, responses.ResponsesBody)
    spoken = [Message("system", (Text("Be short."),)), *responses.messages_of(responding.input)]
    tools = [tool.described() for tool in wanted_of_response(responding).offered]
    assert arrival_text(RESPONSES, RESPONSE) == of_messages(spoken, tools)
    asking = msgspec.convert(ANTHROPIC_BODY, anthropic.MessagesBody)
    tools = [tool.described() for tool in anthropic.wanted_of(asking).offered]
    assert arrival_text(ANTHROPIC, ANTHROPIC_BODY) == of_messages(anthropic.conversation_of(asking), tools)


def test_texts_are_themselves_and_ids_have_four_characters() -> None:
    assert arrival_text("/v1/completions", {"prompt": "once"}) == "once" == arrival_text("/generate", {"text": "once"})
    ids = arrival_text("/v1/completions", {"prompt": [1, 2, 300]})
    assert len(ids) == 12
    assert ids == arrival_text("/generate", {"input_ids": [1, 2, 300]})
    assert ids == of_ids(b"\1\0\0\0\2\0\0\0\x2c\1\0\0")
    assert arrival_text("/v1/completions", {"prompt": [1, 2, 300, 4]}).startswith(ids)
    assert arrival_text("/v1/completions", {"prompt": ["once", "twice"]}) == "oncetwice"
    assert arrival_text("/v1/completions", {"prompt": [[1, 2, 300], [5]]}).startswith(ids)


def test_a_text_beside_a_picture_begins_with_the_first_one() -> None:
    def text(**media: Any) -> str:
        return arrival_text("/generate", {"text": "once", **media})

    one = text(image_data=PICTURE)
    assert one.endswith("once") and one == of_messages([Message("user", (Image(PICTURE, ""),))])[6:] + "once"
    for same in ([PICTURE], [None, PICTURE, "b"], [[PICTURE, "b"], ["c"]], {"url": PICTURE}, [{"url": PICTURE}]):
        assert text(image_data=same) == one
    others = {"image_data": "b"}, {"video_data": PICTURE}, {"image_data": [{"url": PICTURE, "detail": "low"}]}, {}
    assert len({one, *(text(**media) for media in others)}) == 5
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert text(image_data=deep) == text(image_data=5) == text(image_data=[{"url": 5}]) == "once"


# ── bodies that are wrong ────────────────────────────────────────────────────────────────────

FIELDS = ("messages", "input", "prompt", "text", "input_ids", "system", "tools", "tool_choice", "instructions")
INNER = (
    "role",
    "content",
    "type",
    "text",
    "image_url",
    "source",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "input",
)
wrong = st.dictionaries(
    st.sampled_from(FIELDS),
    values
    | st.lists(values, max_size=3)
    | st.lists(st.dictionaries(st.sampled_from(INNER), values | st.lists(values, max_size=2), max_size=4), max_size=3),
    max_size=4,
)


@given(st.sampled_from([CHAT, RESPONSES, ANTHROPIC, "/v1/completions", "/anything"]), wrong | values)
@settings(max_examples=150)
def test_a_wrong_body_has_a_text_too(path: str, body: Any) -> None:
    assert isinstance(arrival_text(path, body), str)
    assert isinstance(chained(arrival_text(path, body)), type(chained("")))


def test_a_body_that_nests_deeply_or_holds_half_characters_has_a_text() -> None:
    deep: Any = {}
    for _ in range(100_000):
        deep = {"a": deep}
    call = {"function": {"name": "f", "arguments": deep}}
    body = {
        "messages": [{"role": "assistant", "content": "\ud800", "tool_calls": [call]}],
        "tools": [{"function": deep}],
    }
    assert "\ud800" in arrival_text(CHAT, body)
    nested = {
        "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 99_999}}]}]
    }
    assert "[[[" in arrival_text(CHAT, nested)


def test_it_is_read_without_torch_templates_or_tokenizers() -> None:
    heavy = "torch", "jinja2", "tokenizers", "anyio", "aiohttp"
    code = f"import sys, engine.conversation.canonical; print(*[name for name in {heavy!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
