"""Messages of parts: what programs and clients say becomes the same parts, and what a template sees of them."""

from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from http_front import text_of

from engine.actors.tokenizer import Admission
from engine.cache.keys import media_keys
from engine.conversation.media import Piece, Placed, grow
from engine.conversation.parts import Call, Image, Message, Result, Text, Video, as_one, media_of, read_messages, said
from engine.conversation.template import ChatTemplate
from engine.errors import RequestError
from engine.http.anthropic.messages import CountBody, conversation_of
from engine.http.openai import chat as openai
from engine.http.responses.bodies import ResponsesBody
from engine.http.responses.bodies import messages_of as messages_of_items
from engine.http.responses.items import InputImage, InputText, MessageItem, OutputText, input_items
from engine.http.wire import Body, BodyDecoder
from engine.messages.assets import Bound
from engine.messages.media import MEDIA, MediaUse, Prepared, media_use
from engine.messages.request import Generate
from engine.params.sampling import SamplingParams
from engine.plugin.parsing import ToolParser
from engine.runtime.offline import to_request
from engine.text.tokenizer import Text as ModelText

URL = "data:image/png;base64,AAAA"
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "s"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is"},
            {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
            {"type": "video_url", "video_url": {"url": "http://a/b"}},
            {"type": "text", "text": "?"},
        ],
    },
    {
        "role": "assistant",
        "content": "Hm.",
        "reasoning_content": "t",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "sun"}]},
]
PARTS = [
    Message("system", (Text("s"),)),
    Message(
        "user",
        (
            Text("What is"),
            Image(URL, "messages[1].content[1]", "image_url", "low"),
            Video("http://a/b", "messages[1].content[2]", "video_url"),
            Text("?"),
        ),
    ),
    Message("assistant", (Text("Hm."), Call("f", "{}", "1")), reasoning="t"),
    Message("tool", (Result("1", (Text("sun"),)),)),
]


def body(kind: type[Body], value: Any) -> Any:
    return BodyDecoder(kind).decode(msgspec.json.encode(value))


# ── from every edge ──────────────────────────────────────────────────────────────────────────


class Messages(Body):
    messages: list[openai.ChatMessage]


def test_the_same_parts_from_a_program_and_from_openai_s_clients() -> None:
    assert read_messages(MESSAGES) == to_request(MESSAGES, None).messages == PARTS
    assert openai.messages_of(body(Messages, {"messages": MESSAGES}).messages) == PARTS


def test_parts_from_responses() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": URL}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {
            "type": "function_call_output",
            "call_id": "1",
            "output": [{"type": "input_image", "image_url": URL, "detail": "high"}],
        },
    ]
    assert messages_of_items(body(ResponsesBody, {"input": items}).input) == [
        Message("user", (Text("a"), Image(URL, "input[0].content[1]", "input_image"))),
        Message("assistant", (Call("f", "{}", "1"),)),
        Message("tool", (Result("1", (Image(URL, "input[2].output[0]", "input_image", "high"),)),)),
    ]


def test_messages_are_listed_as_items() -> None:
    calls = Message("assistant", (Text(""), Call("f", "{}", "1")), reasoning="t")
    shown = Message("user", (Text("a"), Text("b"), Image(URL, "here", "input_image", "low")))
    items = input_items([shown, calls, Message("assistant", ())], "k")
    assert [type(item).__name__ for item in items] == [
        "MessageItem",
        "ReasoningItem",
        "FunctionCallItem",
        "MessageItem",
    ]
    assert isinstance(items[0], MessageItem) and items[0].content == [InputText("ab"), InputImage(URL, "low")]
    assert isinstance(items[3], MessageItem) and items[3].content == [OutputText("")]


def test_parts_from_anthropic_s_clients() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    blocks = [
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image", "source": source}]},
        {"type": "image", "source": {"type": "url", "url": "https://a/b"}},
        {"type": "text", "text": "?"},
    ]
    messages = [{"role": "user", "content": blocks}, {"role": "user", "content": "Well?"}]
    assert conversation_of(body(CountBody, {"messages": messages})) == [
        Message("tool", (Result("1", (Image(URL, "messages[0].content[0].content[0]", "image"),)),)),
        Message(
            "user", (Image("https://a/b", "messages[0].content[1]", "image"), Text("?"), Text("\n"), Text("Well?"))
        ),
    ]


def test_parts_travel_between_processes() -> None:
    request = Generate("r", SamplingParams(), messages=PARTS)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Generate) == request


def test_one_message_of_several() -> None:
    run = [said("user", "a"), said("user", ""), said("user", "b", reasoning="t")]
    assert as_one(run, "\n") == Message("user", (Text("a"), Text("\n"), Text("b")), reasoning="t")
    assert as_one(run[:1], "\n") is run[0]


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image_url"}, "nor an image_url"),
        ({"type": "image_url", "image_url": {"url": 1}}, "nor an image_url"),
        ({"type": "text", "text": 1}, 'not {"type": "text"'),
        ("text", 'not {"type": "text"'),
    ],
)
def test_parts_that_are_none_are_refused(part: Any, says: str) -> None:
    with pytest.raises(RequestError, match=r"messages\[0\] has a content part") as refused:
        read_messages([{"role": "user", "content": [part]}])
    assert says in refused.value.message


# ── what a template sees ─────────────────────────────────────────────────────────────────────

CHATML = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
LOOP = "{% for part in m['content'] %}[{{ part.type }}{{ part.text }}]{% endfor %}"
PARTS_ONLY = "{% for m in messages %}" + LOOP + "{% endfor %}"
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}" + LOOP + "{% endif %}{% endfor %}"
)
TEMPLATES = [
    (CHATML, "text"),
    (PARTS_ONLY, "parts"),
    (EITHER, "either"),
    ("{% set all = messages[1:] if 0 else messages %}" + PARTS_ONLY.replace("in messages", "in all"), "parts"),
    ("{% for m in messages %}{% set c = m.content or [] %}{{ c | map(attribute='text') | join }}{% endfor %}", "parts"),
    ("{% set said = messages | list %}" + PARTS_ONLY.replace("in messages", "in said[0:]"), "parts"),
    ("{% for m in messages %}{% set c = m.content %}" + LOOP.replace("m['content']", "c") + "{% endfor %}", "parts"),
    (
        "{% macro show(c, n=1) %}" + LOOP.replace("m['content']", "c") + "{% endmacro %}"
        "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
        "parts",
    ),
    (
        "{% macro show(n, c) %}" + LOOP.replace("m['content']", "c") + "{% endmacro %}"
        "{% for m in messages %}{{ show(c=m.content, n=1) }}{% endfor %}",
        "parts",
    ),
    ("{% for m in messages %}{{ m.content | map(attribute='text') | join }}{% endfor %}", "parts"),
    ("{% for part in messages[0].content %}{{ part.text }}{% endfor %}", "parts"),
    ("{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}", "either"),
    ("{% for m in messages %}{% for w in m.content.split() %}{{ w }}{% endfor %}{% endfor %}", "text"),
    ("{% for m in messages %}{% for c in m.tool_calls %}{{ c }}{% endfor %}{{ m.content }}{% endfor %}", "text"),
    ("{% for t in tools %}{% for c in t.content %}{% endfor %}{% endfor %}", "text"),
]  # fmt: skip


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {}, ToolParser.syntax)


@pytest.mark.parametrize(("source", "content"), TEMPLATES)
def test_what_a_template_takes_as_content(source: str, content: str) -> None:
    assert template(source).content == content


def test_a_template_that_goes_through_parts_gets_them_and_others_a_text() -> None:
    several = [Message("user", (Text("a"), Text("b")))]
    shown = [Message("user", (Text("a"), Image(URL, "here"), Text("b")))]
    assert template(CHATML).render(several) == "<user>ab"
    assert template(PARTS_ONLY).render(several) == "[texta][textb]"
    assert template(EITHER).render(several) == "ab"
    assert template(EITHER).render(shown) == template(PARTS_ONLY).render(shown) == "[texta][image][textb]"
    with pytest.raises(RequestError, match="no place for here"):
        template(CHATML).render(shown)


@pytest.mark.parametrize("source", [PARTS_ONLY, EITHER])
def test_a_reply_goes_on_from_the_last_part(source: str) -> None:
    begun = [Message("user", (Text("a"),)), Message("assistant", (Text("b"), Text("c")))]
    rendered = template(source).render(begun, continue_final_message=True)
    assert rendered.endswith("c") and "b" in rendered


# ── what a model sees ────────────────────────────────────────────────────────────────────────


def admission(text: ModelText) -> Admission:
    made = Admission(text)
    made.max_model_len = 100
    return made


def test_media_are_refused_at_their_place_where_the_model_reads_text_alone() -> None:
    text = text_of(EITHER)
    for encode in (text.render_chat, text.encode_chat):
        with pytest.raises(RequestError) as refused:
            encode(PARTS[:2])
        assert refused.value.param == "messages[1].content[1].type"
        assert "the model reads text alone" in refused.value.message
    with pytest.raises(RequestError, match="reads text alone"):
        admission(text).admit(Generate("r", SamplingParams(), messages=PARTS[:2]))


class Sees:
    """A processor for whose template an image is a "*", and for which it takes three tokens."""

    def placed(self, ids: list[int], media: Sequence[Prepared], /) -> Placed:
        star = ord("*")
        return grow(ids, media, {star: "image"}, lambda medium: [Piece([star], medium.tokens)])


def test_the_tokenizer_gives_ids_and_keys() -> None:
    plain = text_of(None)
    source = EITHER.replace("[{{ part.type }}{{ part.text }}]", "{{ part.text if part.type == 'text' else '*' }}")
    sees = admission(ModelText(plain.spec, source, media=Sees()))
    star = plain.encode("*", False)

    def admitted(url: str, **options: Any) -> tuple[list[int], list[int]]:
        messages = [Message("user", (Text("a"), Image(url, "here"), Text("bc")))]
        media = (Prepared(b"pixels", (1,), 3, url.encode()),)
        _, admit = sees.admit(Generate("r", SamplingParams(), messages=messages, media=media, **options))
        (need,) = admit.needs
        assert (need.kind, need.content, need.payload) == (MEDIA, url.encode(), b"pixels")
        assert media_use(Bound(MEDIA, 1, need.use)) == MediaUse(((1, 3),), 3)
        return array("i", admit.ids).tolist(), array("i", admit.keys).tolist()

    ids, keys = admitted("one")
    assert ids == [*plain.encode("a", False), *star * 3, *plain.encode("bc", False)]
    assert keys == [ids[0], *media_keys(b"one", 3), *ids[4:]]
    assert admitted("other")[0] == ids and admitted("other")[1][1:4] == media_keys(b"other", 3).tolist()
    assert admitted("one", last=len(ids)) == (ids, keys)
    with pytest.raises(
        RequestError, match="6 tokens, of which 4 are to be kept, and one that shows media cannot be cut"
    ):
        admitted("one", last=4)
    _, text = sees.admit(Generate("r", SamplingParams(), messages=[said("user", "abc")]))
    assert text.keys == b""


def test_media_of_a_conversation_are_in_its_order() -> None:
    shown = [Image(URL, str(number)) for number in range(3)]
    messages = [Message("user", (shown[0], Text("a"))), Message("tool", (Result("1", (shown[1], shown[2])),))]
    assert media_of(messages) == shown
