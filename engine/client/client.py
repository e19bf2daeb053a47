"""A server over HTTP, seen from its client: every reply is a stream of `Chunk`, as from an engine in the process.

Speaks OpenAI's chat API to any server that has it. Left out: whole replies, retries, and load (engine/client/bench).
"""

from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from engine.client.events import DONE, Reading, refusal
from engine.errors import ConfigError, RequestError, WorkerError
from engine.messages.reply import Chunk
from engine.params.grammar import GrammarKeywords, keywords_of
from engine.params.sampling import SamplingParams


class Client:
    """One server; use it as an async context manager. `model` is what requests name, by default the server's first."""

    def __init__(
        self, url: str, *, api_key: str | None = None, model: str | None = None, timeout: float | None = None
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url is {url!r}, but takes http://host:port or https://host:port")
        self.model_name = model or ""
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout)

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0)
        self._http = aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=self._timeout)
        try:
            self.model_name = self.model_name or await self._first_model()
        except BaseException:
            await self._http.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    def chat(self, messages: list[dict[str, Any]], params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        """The reply to a chat; parameters at their default are left to the server. Log-probabilities are not shown,
        so not asked for."""
        given = {name: value for name, value in changed(params).items() if not name.endswith("logprobs")}
        return self._openai("/v1/chat/completions", {"messages": messages, **given})

    async def _openai(self, path: str, fields: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
        """The last chunk comes with the end of the stream, so that it has the usage. A server that reports none
        leaves the counts 0."""
        body = {"model": self.model_name, "stream": True, "stream_options": {"include_usage": True}, **fields}
        reading = Reading("openai")
        async for data in self._events(path, {name: value for name, value in body.items() if value is not None}):
            if text := reading.take(data):
                yield Chunk("", text, [])
        if reading.finish is None:
            raise WorkerError(f"{self.url}{path} ended its reply without a finish reason")
        counts = (reading.prompt_tokens, reading.cached_tokens, reading.completion_tokens)
        yield Chunk("", "", [], reading.finish, None, *counts)

    # ── the wire ─────────────────────────────────────────────────────────────────────────────

    def events(self, path: str) -> AsyncGenerator[bytes, None]:
        """The data of each event of a stream that is there to be read. Raises as requests do."""
        return self._events(path, None)

    async def _events(self, path: str, body: dict[str, Any] | None) -> AsyncGenerator[bytes, None]:
        """The data of each server-sent event until `[DONE]`. Raises RequestError for an error answer."""
        method, payload = ("GET", None) if body is None else ("POST", msgspec.json.encode(body))
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            async with self._http.request(method, self.url + path, data=payload, headers=headers) as response:
                if response.status != 200:
                    raise RequestError(refusal(await response.read()), status=response.status)
                rest = b""
                async for read in response.content.iter_any():
                    *lines, rest = (rest + read).split(b"\n")
                    for line in lines:
                        if line.startswith(b"data:") and (data := line[5:].strip()) != DONE:
                            yield data
        except TimeoutError:
            raise WorkerError(f"{self.url}{path} took longer than {self._timeout.total:.0f} s") from None
        except aiohttp.ClientError as error:
            raise WorkerError(
                f"{self.url}{path} did not answer: {cause_of(error)}; is a server running there?"
            ) from None

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> bytes:
        """What the server answers at `path`. Raises RequestError for an error answer, ConfigError for none."""
        return await self._answer("GET", path, query)

    async def post(self, path: str) -> bytes:
        """As `get`, of a POST without a body."""
        return await self._answer("POST", path)

    async def _answer(self, method: str, path: str, query: Mapping[str, str] | None = None) -> bytes:
        url = f"{self.url}{path}"
        try:
            async with self._http.request(method, url, params=query) as response:
                body = await response.read()
                if response.status != 200:
                    raise RequestError(f"{url} answered {response.status}: {refusal(body)}", status=response.status)
                return body
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ConfigError(f"no server answers at {self.url} ({cause_of(error)}); is it running?") from None

    async def _first_model(self) -> str:
        return str((await self._models())[0]["id"])

    async def _models(self) -> list[Any]:
        """The models that the server lists, at least one."""
        body = await self.get("/v1/models")
        try:
            listed: list[Any] = msgspec.json.decode(body)["data"]
            listed[0]["id"]
            return listed
        except (msgspec.DecodeError, KeyError, IndexError, TypeError):
            raise ConfigError(f"{self.url}/v1/models lists no model; name one with --model") from None


def changed(params: SamplingParams) -> dict[str, Any]:
    """The keywords of `params` that are not at their default."""
    return {name: value for name, value in settings_of(params).items() if value != DEFAULTS[name]}


def settings_of(params: SamplingParams) -> dict[str, Any]:
    """The keywords that make `params`, by name, those of its grammar among them."""
    fields = msgspec.structs.asdict(params)
    return fields | msgspec.structs.asdict(GrammarKeywords(**keywords_of(fields.pop("grammar"))))


DEFAULTS = settings_of(SamplingParams())


def cause_of(error: Exception) -> str:
    """Why nothing came back, in the system's words where it refused to connect: aiohttp's speak of TLS for any URL."""
    return (
        str(error.os_error) if isinstance(error, aiohttp.ClientConnectorError) else str(error) or type(error).__name__
    )
