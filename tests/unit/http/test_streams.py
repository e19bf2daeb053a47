"""Streams of replies: events are written in the step that makes them, and merged only where a client takes nothing."""

import asyncio
import gc
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import anyio
import anyio.lowlevel
import pytest
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpVersion10, HttpVersion11, StreamWriter
from aiohttp.test_utils import make_mocked_request
from anyio.abc import ByteStream
from house import open_house
from http_front import FakeFront, serving
from http_raw import dial, post
from hypothesis import given, settings
from hypothesis import strategies as st
from real_server import over_http

from engine.config import ServerOptions
from engine.conversation.reading import NOTHING
from engine.errors import RequestError
from engine.http.anthropic.reply import AnthropicReply
from engine.http.native.generate import NativeReply, Scores
from engine.http.openai.replies import OpenAIReply, Wording
from engine.http.streams import Choice, Events, Stream, send_replies
from engine.http.turns import TURNS, Turns
from engine.messages.reply import Chunk
from engine.messages.request import Generate
from engine.runtime.mailbox import Gathered, Mailbox, Nobody, joined, whole

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})])]

Part = tuple[int, str, list[int], bool]  # choice, text, ids, and whether the detokenizer calls it plain


# ── a connection whose other end is the test ─────────────────────────────────────────────────


class Wire(asyncio.Transport):
    """Keeps what is written; while `full`, it holds more than it may."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.full = self.closed = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 2 if self.full else 0

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return 0, 1


def body_of(data: bytes) -> bytes:
    """The body of an answer, out of its chunks if it has any."""
    head, _, body = data.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head.lower():
        return body
    parts, at = [b""], 0
    while parts:
        line = body.index(b"\r\n", at)
        begin, length = line + 2, int(body[at:line], 16)
        parts.append(body[begin : begin + length])
        at = begin + length + 2
        assert body[at - 2 : at] == b"\r\n"
        if not length:
            break
    assert at == len(body)
    return b"".join(parts)


class Line(BaseProtocol):
    """A protocol on which a request can be made up."""

    ssl_context = peername = sockname = None


class Site:
    """An answer that is streamed over a Wire; `done` is its task."""

    def __init__(
        self, events: Events, choices: int = 1, *, http: Any = HttpVersion11, turns: Turns | None = None
    ) -> None:
        loop = asyncio.get_running_loop()
        self.wire = Wire()
        self.protocol = Line(loop)
        self.protocol.connection_made(self.wire)
        self.boxes = [Mailbox(str(index), str(index)) for index in range(choices)]
        self.counts = [0] * choices
        app = web.Application()
        app[TURNS] = turns or Turns()
        writer = StreamWriter(self.protocol, loop)
        request = make_mocked_request(
            "POST", "/", version=http, writer=writer, protocol=self.protocol, transport=self.wire, app=app
        )  # type: ignore[arg-type]

        @asynccontextmanager
        async def opened() -> AsyncIterator[Sequence[Mailbox]]:
            try:
                yield self.boxes
            finally:
                for box in self.boxes:
                    box.close()

        self.done = loop.create_task(send_replies(request, opened(), events))

    def chunk(self, index: int, text: str, ids: list[int], *, finish: Any = None) -> Chunk:
        """The next part of a reply; as the detokenizer would hand it over."""
        self.counts[index] += len(ids)
        return Chunk(str(index), text, ids, finish, None, 7, 4, self.counts[index])

    def plain(self, index: int, text: str, ids: list[int]) -> Chunk:
        """Hand over plain tokens; what they would be as a chunk."""
        self.boxes[index].taker.tokens(text, ids, 0.0)
        return self.chunk(index, text, ids)

    async def rest(self) -> None:
        """Let the handler do what it can."""
        for _ in range(5):
            await asyncio.sleep(0)


def reply_of(api: str, choices: int, **fields: bool) -> Any:
    if api == "messages":
        return AnthropicReply("r", "m", NOTHING)
    if api == "generate":
        return NativeReply([str(index) for index in range(choices)], [Scores()] * choices, listed=choices > 1)
    reply = OpenAIReply("r", "m", Wording(chat=api == "chat", choices=choices, samples=choices, **fields))
    reply._head = ("r", 0, "m")
    return reply


# ── the bytes are those of one event after another ───────────────────────────────────────────

TEXTS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["", '"', "\\", "\n", "\x85", "\u2028", "\u2029", "\ufffd", "😀", "\x7f", "\0"]),
)


@st.composite
def replies(draw: Any) -> tuple[str, int, dict[str, bool], list[Part]]:
    """An API, the number of its choices, what is asked of the wording, and what comes."""
    api = draw(st.sampled_from(["completions", "chat", "messages", "generate"]))
    choices = 1 if api == "messages" else draw(st.integers(1, 3))
    asked = {}
    if api in ("completions", "chat"):
        asked = draw(st.fixed_dictionaries({name: st.booleans() for name in ("usage", "token_ids")}))
        asked["continuous_usage"] = draw(st.booleans())
    part = st.tuples(
        st.integers(0, choices - 1), TEXTS, st.lists(st.integers(0, 9), min_size=1, max_size=3), st.booleans()
    )
    return api, choices, asked, draw(st.lists(part, max_size=12))


@settings(deadline=None, max_examples=60)
@given(asked=replies(), http=st.sampled_from([HttpVersion10, HttpVersion11]))
def test_a_stream_has_the_bytes_of_its_events(
    anyio_backend: Any, asked: tuple[str, int, dict[str, bool], list[Part]], http: Any
) -> None:
    api, choices, fields, parts = asked

    async def run() -> tuple[bytes, bytes]:
        site = Site(reply_of(api, choices, **fields), choices, http=http)
        other = reply_of(api, choices, **fields)
        expected = b""

        async def put(index: int, text: str, ids: list[int], finish: Any = None) -> None:
            nonlocal expected
            chunk = site.chunk(index, text, ids, finish=finish)
            expected += other.event((index, chunk))
            site.boxes[index].put(chunk)
            await site.rest()

        for index in range(choices):
            await put(index, "é", [1])
        for index, text, ids, plain in parts:
            if plain:
                expected += other.event((index, site.plain(index, text, ids)))
            else:
                await put(index, text, ids)
        for index in range(choices):
            await put(index, ".", [2], "stop")
        await asyncio.wait_for(site.done, 5)
        return body_of(b"".join(site.wire.written)), expected

    written, expected = asyncio.run(run())
    assert written == expected
    text = written.decode()
    assert text.split("\n") == [*text.splitlines(), ""], "clients that split as Python does find other lines"


async def test_a_plain_token_is_one_write_and_wakes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    wakes = calls_of(monkeypatch, Stream, "wake")
    site = Site(reply_of("chat", 1))
    site.boxes[0].put(site.chunk(0, "a", [1]))
    await site.rest()
    before, woken = len(site.wire.written), len(wakes)
    events = calls_of(monkeypatch, Choice, "events")
    for _ in range(100):
        site.plain(0, "b", [2])
    assert len(site.wire.written) == before + 100
    assert len(wakes) == woken and not events
    site.boxes[0].put(site.chunk(0, "c", [3], finish="stop"))
    assert len(site.wire.written) == before + 101, "the text of the last token waits for no handler"
    assert b'"content":"c"' in site.wire.written[-1]
    await site.done
    assert len(site.wire.written) == before + 102, "what ends the answer is one write"


def calls_of(monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> list[object]:
    """What the method `name` of `kind` is called for from now on."""
    calls: list[object] = []
    real: Callable[..., Any] = getattr(kind, name)

    def counted(self: object, *given: Any, **named: Any) -> Any:
        calls.append(self)
        return real(self, *given, **named)

    monkeypatch.setattr(kind, name, counted)
    return calls


# ── a client that takes nothing ──────────────────────────────────────────────────────────────


async def test_what_a_full_connection_does_not_take_is_merged() -> None:
    site, other = Site(reply_of("completions", 1)), reply_of("completions", 1)
    first = site.chunk(0, "a", [1])
    site.boxes[0].put(first)
    await site.rest()
    before = len(site.wire.written)
    site.protocol.pause_writing()
    site.wire.full = True
    expected = other.event((0, first)) + other.event((0, site.plain(0, "b", [2])))
    for _ in range(50):
        site.plain(0, "c", [3])
        await asyncio.sleep(0)
    assert len(site.wire.written) == before + 1, "nothing is written to a connection that is full"
    site.wire.full = False
    site.protocol.resume_writing()
    await site.rest()
    expected += other.event((0, Chunk("0", "c" * 50, [3] * 50, None, None, 7, 4, 52)))
    expected += other.event((0, site.plain(0, "d", [4])))
    last = site.chunk(0, "e", [5], finish="length")
    site.boxes[0].put(last)
    await site.done
    assert body_of(b"".join(site.wire.written)) == expected + other.event((0, last))


async def all_of(stream: ByteStream) -> bytes:
    """What comes until the server closes."""
    return b"".join([data async for data in stream])


class Flood(FakeFront):
    """Says `count` texts of `size` characters to each request, as fast as it can; the loop has turns in between."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.count, self.size = count, size
        self.said = anyio.Event()

    def begin(self, request: Generate) -> Mailbox:
        self.asked.append(request)
        box = Mailbox(request.rid, request.rid)
        self._pumps[box] = asyncio.get_running_loop().create_task(self._flood(box))
        return box

    async def _flood(self, box: Mailbox) -> None:
        box.put(Chunk(box.key, "x" * self.size, [1], None, None, 7, 4, 1))
        await anyio.sleep(0.05)
        for _ in range(self.count - 2):
            box.taker.tokens("x" * self.size, [1], 0.0)
            await anyio.lowlevel.checkpoint()
        box.put(Chunk(box.key, "x" * self.size, [1], "length", None, 7, 4, self.count))
        self.said.set()


async def test_a_client_that_does_not_read_has_fewer_events_and_all_the_text() -> None:
    front = Flood(count=400, size=60_000)
    async with serving(front) as url, dial(url) as stream:
        await stream.send(post(b'{"prompt": "x", "stream": true}', b"Connection: close", path="/v1/completions"))
        await front.said.wait()  # which waits for no client
        answer = body_of(await all_of(stream))
    events = [event.removeprefix("data: ") for event in answer.decode().split("\n\n") if event]
    assert events.pop() == "[DONE]"
    said = [json.loads(event)["choices"][0]["text"] for event in events]
    assert "".join(said) == "x" * 400 * 60_000
    assert 10 < len(events) < 390


async def test_a_client_that_reads_has_an_event_for_each_token_beside_one_that_does_not() -> None:
    front = Flood(count=400, size=20_000)
    async with serving(front) as url, dial(url) as stuck:
        request = post(b'{"prompt": "x", "stream": true}', b"Connection: close", path="/v1/completions")
        await stuck.send(request)
        await front.said.wait()
        front.size = 10
        async with dial(url) as reading:
            await reading.send(request)
            answer = body_of(await all_of(reading))
    assert answer.count(b"data: ") == 400 + 1 + 1  # the finish and the end


# ── errors, and clients that leave ───────────────────────────────────────────────────────────


async def test_an_error_comes_after_what_was_said() -> None:
    site, other = Site(reply_of("completions", 2), 2), reply_of("completions", 2)
    first = site.chunk(0, "a", [1])
    site.boxes[0].put(first)
    await site.rest()
    expected = other.event((0, first)) + other.event((0, site.plain(0, "b", [2])))
    site.boxes[1].fail(RequestError("too late", code="late"))
    await site.done
    body = body_of(b"".join(site.wire.written))
    assert body.startswith(expected)
    assert json.loads(body.removeprefix(expected).removeprefix(b"data: "))["error"]["code"] == "late"


async def test_an_error_before_the_first_event_is_raised() -> None:
    site = Site(reply_of("completions", 1))
    site.boxes[0].fail(RequestError("refused"))
    with pytest.raises(RequestError, match="refused"):
        await site.done
    assert not site.wire.written


async def test_a_wording_that_fails_ends_its_own_stream(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(OpenAIReply):
        def event(self, part: tuple[int, Chunk]) -> bytes:
            if part[1].text == "b":
                raise ValueError("no words")
            return super().event(part)

    site = Site(Broken("r", "m", Wording(chat=False)))
    site.boxes[0].put(site.chunk(0, "a", [1]))
    await site.rest()
    site.boxes[0].put(site.chunk(0, "b", [1]))  # in the detokenizer's step, which must go on
    await site.done
    assert b"internal_error" in body_of(b"".join(site.wire.written))
    assert "nothing foresaw" in caplog.text


async def test_a_closed_connection_ends_the_stream() -> None:
    site = Site(reply_of("completions", 1))
    site.boxes[0].put(site.chunk(0, "a", [1]))
    await site.rest()
    site.wire.closed = True
    site.plain(0, "b", [1])
    with pytest.raises(ConnectionError):
        await site.done
    assert isinstance(site.boxes[0].taker, Nobody)


@asynccontextmanager
async def served_house(**options: Any) -> AsyncIterator[tuple[str, Any]]:
    """The real actors over a fake device, and HTTP in front."""
    async with open_house(**options) as house, over_http(house.front, ServerOptions(port=0)) as url:
        yield url, house


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 200},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 200},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 200},
    "/v1/responses": {"input": "a", "max_output_tokens": 200},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 200, "temperature": 0}},
}


@pytest.mark.parametrize("path", BODIES)
async def test_no_task_is_woken_for_a_token(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wakes = calls_of(monkeypatch, Stream, "wake")
    body = BODIES[path] | {"stream": True} | ({} if path == "/generate" else {"temperature": 0})
    async with served_house(seconds=0.0005) as (url, house), aiohttp.ClientSession() as session:
        async with session.post(url + path, json=body) as response:
            data = await response.read()
        assert response.status == 200
        await house.settled()
    assert data.count(b"data: ") > 100
    assert len(wakes) <= 8, "for the first events and the last"


async def test_metrics_count_each_token_of_a_stream() -> None:
    async with served_house(seconds=0.0005) as (url, house), aiohttp.ClientSession() as session:
        for stream in (True, False):
            body = BODIES["/v1/completions"] | {"stream": stream, "ignore_eos": True}
            async with session.post(f"{url}/v1/completions", json=body) as response:
                await response.read()
        async with session.get(f"{url}/metrics") as response:
            page = await response.text()
        await house.settled()
    found = dict(re.findall(r"^(engine_\S+) (\S+)$", page, re.MULTILINE))
    assert float(found["engine_inter_token_seconds_count"]) == 2 * 199
    assert 0 < float(found["engine_inter_token_seconds_sum"]) <= float(found["engine_request_seconds_sum"])
    assert float(found["engine_time_to_first_token_seconds_count"]) == 2
    assert float(found['engine_requests_total{endpoint="completions",reason="length"}']) == 2


async def test_a_client_that_leaves_leaves_nothing() -> None:
    async with served_house(seconds=0.002) as (url, house):
        async with dial(url) as stream:
            body = json.dumps({"prompt": "a", "max_tokens": 3000, "stream": True, "ignore_eos": True}).encode()
            await stream.send(post(body, path="/v1/completions"))
            said = b""
            while said.count(b"data: ") < 10:
                said += await stream.receive()
        await house.settled()
        assert not house.front.boxes and not house.front.open
        gc.collect()
        assert not [one for one in gc.get_objects() if issubclass(type(one), Choice | Stream)]


# ── mailboxes ────────────────────────────────────────────────────────────────────────────────


@given(parts=st.lists(st.tuples(st.text(max_size=3), st.lists(st.integers(0, 9), min_size=1), st.booleans())))
def test_what_is_gathered_is_one_chunk(anyio_backend: Any, parts: list[tuple[str, list[int], bool]]) -> None:
    gathered, chunks = Gathered(), [Chunk("r", "a", [1], None, None, 7, 4, 1)]
    gathered.chunk(chunks[0])
    for text, ids, plain in parts:
        chunks.append(Chunk("r", text, ids, None, None, 7, 4, chunks[-1].completion_tokens + len(ids)))
        if plain:
            gathered.tokens(text, ids, 0.0)
        else:
            gathered.chunk(chunks[-1])
    assert gathered.take() == joined(chunks)
    assert not gathered


async def test_whole_replies_end_at_the_first_error() -> None:
    boxes = [Mailbox(name, name) for name in "ab"]
    boxes[1].fail(RequestError("refused"))
    with anyio.fail_after(5), pytest.raises(RequestError, match="refused"):
        await whole(boxes)


async def test_a_whole_reply_wakes_its_reader_once() -> None:
    box = Mailbox("a", "a")
    reader = whole([box])
    waited = reader.send(None)  # what its task would sleep on
    box.put(Chunk("a", "a", [1], None, None, 1, 0, 1))
    for _ in range(50):
        box.taker.tokens("b", [2], 0.0)
    assert not waited.done()
    box.put(Chunk("a", "", [3], "stop", None, 1, 0, 52))
    assert waited.done()
    with pytest.raises(StopIteration) as made:
        reader.send(None)
    (reply,) = made.value.value
    assert (reply.text, len(reply.ids), reply.finish) == ("a" + "b" * 50, 52, "stop")
