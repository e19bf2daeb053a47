"""How a server is asked for a reply under load, and what its answer says once it is read.

A connection is kept for the next request. Left out: chat templates (the server's), and tools.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from engine.client.bench.load import Clock, Read, Record
from engine.client.bench.wire import Address, Answer, Connection
from engine.client.events import DONE, Reading, refusal
from engine.errors import EngineError, WorkerError

Api = Literal["openai", "chat", "native"]
PATHS = {"openai": "/v1/completions", "chat": "/v1/chat/completions", "native": "/generate"}


class Target(Struct, frozen=True):
    """A server and how it is asked. `extra` is merged into each body; null leaves out a field that is sent."""

    url: str
    model: str
    api: Api = "openai"
    api_key: str | None = None
    extra: dict[str, Any] = {}
    timeout: float = 600.0

    def body(self, said: Sequence[str], length: int) -> dict[str, Any]:
        """The body that asks for `length` tokens after `said`: what the client and the model have said in turn."""
        if self.api == "native":
            sampling = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
            body = {"text": "".join(said), "sampling_params": sampling, "stream": True}
        else:
            body = {"model": self.model, "max_tokens": length, "temperature": 0, "ignore_eos": True}
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            roles = ("user", "assistant")
            turns = [{"role": roles[index % 2], "content": text} for index, text in enumerate(said)]
            body |= {"messages": turns} if self.api == "chat" else {"prompt": "".join(said)}
        return {name: value for name, value in (body | self.extra).items() if value is not None}


class Asker:
    """Asks one server, over as many connections as there are requests at a time. Close it in the end."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._address = Address.of(target.url)
        self._headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        self._idle: list[Connection] = []

    async def __call__(self, said: Sequence[str], length: int, record: Record, now: Clock) -> Read:
        body = msgspec.json.encode(self.target.body(said, length))
        request = self._address.request(PATHS[self.target.api], body, self._headers)
        try:
            async with asyncio.timeout(self.target.timeout):
                answer = await self._answer(request)
        except TimeoutError:
            record.error = f"{self.target.url} took longer than {self.target.timeout:g} s"
        except EngineError as error:
            record.error = str(error)
        else:
            if answer.status != 200:
                record.error = refusal(answer.body)
        record.ended = now()
        if record.error is not None:
            return lambda: ""
        return lambda: read(answer, self.target.api, length, record, now.began)

    async def _answer(self, request: bytes) -> Answer:
        while True:
            kept = self._connection()
            connection = kept or await Connection.to(self._address)
            answer = connection.ask(request)
            try:
                await answer.done
            except WorkerError:
                if kept is None or answer.status:  # else the server had closed it meanwhile
                    raise
                continue
            except BaseException:  # the time is over, or the load is
                connection.close()
                raise
            if connection.open:
                self._idle.append(connection)
            return answer

    def _connection(self) -> Connection | None:
        while self._idle:
            if (kept := self._idle.pop()).open:
                return kept
        return None

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


def read(answer: Answer, api: Api, length: int, record: Record, began: float) -> str:
    """Enter what `answer` says into `record`, with times since `began`; its text."""
    reading = Reading(api)
    texts: list[str] = []
    rest = b""
    try:
        for at, payload in answer.payloads():
            *lines, rest = (rest + payload).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:") or (data := line[5:].strip()) == DONE:
                    continue
                record.events += 1
                if text := reading.take(data):
                    record.pieces.append(at - began)
                    texts.append(text)
        if reading.finish is None:
            raise WorkerError("the server ended its reply without a finish reason")
    except (EngineError, msgspec.DecodeError) as error:
        record.error = str(error)
        return ""
    if not record.pieces:  # tokens without a text, such as half a character
        record.pieces.append(record.ended)
    record.input_tokens, record.cached_tokens = reading.prompt_tokens, reading.cached_tokens
    record.count(reading.completion_tokens, reading.finish, length)
    return "".join(texts)
