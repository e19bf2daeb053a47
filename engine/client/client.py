"""A server over HTTP, seen from its client: every reply is a stream of `Chunk`, as from an engine in the process.

Speaks OpenAI's API to any server that has it, and SGLang's native one. Left out: whole replies, retries.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec
from msgspec import Struct

from engine.errors import ConfigError, RequestError, WorkerError
from engine.messages.reply import Chunk
from engine.params.grammar import GrammarKeywords, keywords_of
from engine.params.sampling import SamplingParams


class _Delta(Struct):
    """Reasoning is shown as it comes, like the content; servers have two names for it."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str:
        return (self.reasoning_content or self.reasoning or "") + (self.content or "")


class _Choice(Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Details(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Completion(Struct):
    """An event of either kind of OpenAI stream."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Meta(Struct):
    finish_reason: dict[str, Any] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class _Generated(Struct):
    """An event of a native stream: the reply so far."""

    text: str = ""
    meta_info: _Meta | None = None
    error: Any = None


_COMPLETION = msgspec.json.Decoder(_Completion)
_GENERATED = msgspec.json.Decoder(_Generated)
# A reason of another server that is none of ours ended the reply without a stop of ours.
_FINISHES: dict[str, Any] = {"stop": "stop", "length": "length"}


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

    def complete(self, prompt: str, **fields: Any) -> AsyncGenerator[Chunk, None]:
        """The completion of a text; `fields` are those of /v1/completions."""
        return self._openai("/v1/completions", {"prompt": prompt, **fields})

    async def generate(self, prompt: str, sampling: dict[str, Any], **fields: Any) -> AsyncGenerator[Chunk, None]:
        """As `complete`, through /generate; `sampling` and `fields` are as that has them."""
        so_far = 0
        body = {"text": prompt, "sampling_params": sampling, "stream": True, **fields}
        async for data in self._events("/generate", body):
            event = _GENERATED.decode(data)
            if event.error is not None:
                raise WorkerError(error_message(event.error))
            meta = event.meta_info or _Meta()
            reason = meta.finish_reason
            finish = None if reason is None else _FINISHES.get(reason.get("type", ""), "abort")
            yield Chunk(
                "",
                event.text[so_far:],
                [],
                finish,
                None,
                meta.prompt_tokens,
                meta.cached_tokens,
                meta.completion_tokens,
            )
            so_far = len(event.text)

    async def _openai(self, path: str, fields: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
        """The last chunk comes with the end of the stream, so that it has the usage. A server that reports none
        leaves the counts 0."""
        body = {"model": self.model_name, "stream": True, "stream_options": {"include_usage": True}, **fields}
        usage = _Usage()
        finish = None
        async for data in self._events(path, {name: value for name, value in body.items() if value is not None}):
            event = _COMPLETION.decode(data)
            if event.error is not None:
                raise WorkerError(error_message(event.error))
            usage = event.usage or usage
            for choice in event.choices:
                text = choice.delta.text if choice.delta else choice.text or ""
                finish = choice.finish_reason or finish
                if text:
                    yield Chunk("", text, [])
        if finish is None:
            raise WorkerError(f"{self.url}{path} ended its reply without a finish reason")
        details = usage.prompt_tokens_details or _Details()
        counts = (usage.prompt_tokens, details.cached_tokens or 0, usage.completion_tokens)
        yield Chunk("", "", [], _FINISHES.get(finish, "abort"), None, *counts)

    # ── the wire ─────────────────────────────────────────────────────────────────────────────

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """The data of each server-sent event until `[DONE]`. Raises RequestError for an error answer."""
        payload = msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"}
        try:
            async with self._http.post(self.url + path, data=payload, headers=headers) as response:
                if response.status != 200:
                    raise RequestError(_refusal(await response.read()), status=response.status)
                rest = b""
                async for read in response.content.iter_any():
                    *lines, rest = (rest + read).split(b"\n")
                    for line in lines:
                        if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                            yield data
        except TimeoutError:
            raise WorkerError(f"{self.url}{path} took longer than {self._timeout.total:.0f} s") from None
        except aiohttp.ClientError as error:
            raise WorkerError(f"{self.url}{path} did not answer: {error or type(error).__name__}") from None

    async def _first_model(self) -> str:
        url = f"{self.url}/v1/models"
        try:
            async with self._http.get(url) as response:
                body = await response.read()
                if response.status != 200:
                    raise RequestError(f"{url} answered {response.status}: {_refusal(body)}", status=response.status)
            return str(msgspec.json.decode(body)["data"][0]["id"])
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ConfigError(
                f"no server answers at {self.url} ({error or type(error).__name__}); is it running?"
            ) from None
        except (msgspec.DecodeError, KeyError, IndexError, TypeError):
            raise ConfigError(f"{url} lists no model; name one with --model") from None


def changed(params: SamplingParams) -> dict[str, Any]:
    """The keywords of `params` that are not at their default."""
    default = settings_of(SamplingParams())
    return {name: value for name, value in settings_of(params).items() if value != default[name]}


def settings_of(params: SamplingParams) -> dict[str, Any]:
    """The keywords that make `params`, by name, those of its grammar among them."""
    fields = msgspec.structs.asdict(params)
    return fields | msgspec.structs.asdict(GrammarKeywords(**keywords_of(fields.pop("grammar"))))


def error_message(error: Any) -> str:
    """The message of an error object, as the servers we know word it."""
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _refusal(body: bytes) -> str:
    """What an error answer says."""
    try:
        said = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body.decode(errors="replace")[:500]
    if isinstance(said, dict):
        said = said.get("error") or said.get("detail") or said
    return error_message(said)
