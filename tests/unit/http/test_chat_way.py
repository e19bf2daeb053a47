"""Which files of the engine one chat request enters on its way from its handler to the front."""

import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import aiohttp
import pytest
from http_front import FakeFront, serving

import engine
from engine.http.openai import chat
from engine.messages.reply import Chunk
from engine.messages.request import Generate

pytestmark = pytest.mark.anyio
ROOT = str(Path(engine.__file__).parent)
FILES = [
    "conversation/reading.py",
    "http/metrics.py",
    "http/openai/chat.py",
    "http/openai/replies.py",
    "http/request_id.py",
    "http/service.py",
    "params/grammar.py",
    "params/sampling.py",
]


async def test_a_chat_request_enters_no_other_file(monkeypatch) -> None:
    entered: list[str] = []
    handler = chat.chat_completions.__code__

    def note(frame, event, argument):
        if event == "call":
            if frame.f_code is handler and not entered:
                entered.append(str(Path(frame.f_code.co_filename)))
            elif entered and frame.f_code.co_filename.startswith(ROOT):
                entered.append(frame.f_code.co_filename)

    class Front(FakeFront):
        async def generate(self, request: Generate) -> AsyncGenerator[Chunk, None]:
            sys.setprofile(None)
            async for chunk in super().generate(request):
                yield chunk

    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0.5, "max_tokens": 4}
    async with serving(Front()) as url, aiohttp.ClientSession() as session:
        sys.setprofile(note)
        try:
            async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                assert response.status == 200
        finally:
            sys.setprofile(None)
    files = sorted({name.removeprefix(ROOT).lstrip("/") for name in entered})
    assert files == FILES
