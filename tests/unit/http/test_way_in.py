"""How many files of the engine a chat request enters on its way from HTTP to the front."""

import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from http_front import FakeFront, serving, text_of
from test_http import HI, post

import engine
from engine.http.openai.chat import chat_completions
from engine.messages.reply import Chunk
from engine.messages.request import Generate
from engine.params import grammar

pytestmark = pytest.mark.anyio
HOUSE = Path(engine.__file__).parent
CHAT = "/v1/chat/completions"
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
SAMPLING = {"temperature": 0.5, "max_tokens": 9, "stop": "x", "seed": 3, "logit_bias": {"5": 1}}


class Traced(FakeFront):
    """A front that ends the trace when it is called, before any chunk of its reply is made."""

    def __init__(self) -> None:
        super().__init__()
        self.text = text_of("{{ messages[0].content }}", "hermes")
        self.files: set[str] = set()

    def generate(self, request: Generate) -> AsyncGenerator[Chunk, None]:
        sys.setprofile(None)
        return super().generate(request)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """From the first line of the handler on, note the file of each function that is called or goes on."""

        def entered(frame: Any, event: str, _: Any) -> None:
            if event == "call" and frame.f_code is chat_completions.__code__:
                self.files.clear()
            if event == "call" and Path(frame.f_code.co_filename).is_relative_to(HOUSE):
                self.files.add(str(Path(frame.f_code.co_filename).relative_to(HOUSE)))

        sys.setprofile(entered)
        try:
            yield
        finally:
            sys.setprofile(None)


PLAIN = {
    "http/openai/chat.py",
    "http/openai/replies.py",
    "http/service.py",
    "params/fields.py",
    "params/grammar.py",
    "conversation/reading.py",
}

TOOLS = {"http/tools.py", "conversation/calls.py", "conversation/parsers.py", "plugin/parsing.py", "plugin/stream.py"}


@pytest.mark.parametrize(
    ("fields", "files"),
    [
        ({}, PLAIN),
        ({"n": 2, **SAMPLING}, PLAIN),
        ({"response_format": FORMAT}, PLAIN),
        ({"tools": [TOOL]}, PLAIN | TOOLS),
    ],
)
async def test_a_chat_request_enters_seven_files(fields: dict[str, Any], files: set[str]) -> None:
    """Counted are the files under engine/ of which a function runs between the handler's first line and the call of
    `front.generate`, and the front's own. The first three requests have no tools and no reasoning. A tool adds the two
    files that know tools, and three in which the parsers of its replies are made.

    Not counted are the middlewares and the decoding of the body, before the handler, and what the reply comes back
    through (metrics, ids, the stream of events), which begins with the first chunk that is waited for."""
    front = Traced()
    async with serving(front) as url:
        await post(url + CHAT, {"messages": HI})  # what is made once is made
        with front.watching():
            status, answer = await post(url + CHAT, {"messages": HI, **fields})
    assert status == 200 and len(front.asked) >= 2, answer
    assert front.files == files
    assert len(PLAIN | {"runtime/front.py"}) <= 7


@pytest.mark.parametrize("schema", [SCHEMA, msgspec.json.encode(SCHEMA).decode()])
async def test_a_schema_is_decoded_and_walked_once(schema: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From HTTP to the scheduler's queue; the body itself is decoded by a decoder of its own."""
    from test_http_routes import open_site

    decoded: list[Any] = []
    walked: list[Any] = []
    decode, walk = msgspec.json.decode, grammar.nests_deeply
    monkeypatch.setattr(msgspec.json, "decode", lambda data, **kind: decoded.append(data) or decode(data, **kind))
    monkeypatch.setattr(grammar, "nests_deeply", lambda value: walked.append(value) or walk(value))
    async with open_site() as site:
        status, answer = await site.post(CHAT, {"messages": HI, "json_schema": schema, "max_tokens": 1})
        assert status == 200, answer
        assert walked == [SCHEMA]
        assert [one for one in decoded if one == schema] == ([schema] if isinstance(schema, str) else [])
