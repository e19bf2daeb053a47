"""Programs call a server over HTTP: ours, or any with OpenAI's API.

Replies come from /v1/completions and /v1/chat/completions, so the server's own template writes roles; they are streamed
where somebody follows them. A select asks our server once (/v1/choices). What another server has no field for is
refused before anything is sent. Left out: retries.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Any, Self

import anyio
import msgspec

from engine.client.client import changed
from engine.client.events import Reading
from engine.errors import RequestError, WorkerError
from engine.lang.answers import Chosen, Decided, Whole
from engine.lang.backend import Offer, Piece, Spoken
from engine.lang.local import written
from engine.lang.remote import Remote
from engine.lang.scored import Scored
from engine.lang.transcript import Prompt
from engine.lang.values import Meta
from engine.params.sampling import CHAT, COMPLETIONS, SamplingParams
from engine.runtime.choices import Scores
from engine.runtime.decisions import Question

MOST_ENDED = 1024  # programs that the server is told of at once
LAST_SECONDS = 5.0  # for which leaving waits until the server has been told
OWNER = "engine"  # of the models that our server lists
# What every server with OpenAI's API has a field for.
COMMON = {"temperature", "top_p", "seed", "max_tokens", "stop", "logprobs"}
COMMON |= {"presence_penalty", "frequency_penalty", "logit_bias"}
STREAMED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
FORMATS = {"json_object", "json_schema", "strict_schema"}
HAS = COMMON | FORMATS


class Server(Remote):
    """A server at `url`, used as any Remote; the arguments are those of Client."""

    def __init__(self, url: str, **options: Any) -> None:
        """Raises ConfigError for a URL without http:// or https://."""
        super().__init__(url, **options)
        self._owner = ""
        self._ended: list[str] = []  # programs that the server has not been told of
        self._telling: asyncio.Task[None] | None = None

    @property
    def _ours(self) -> bool:
        return self._owner == OWNER

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        try:
            listed = await self._models()
        except BaseException:
            await self._http.close()
            raise
        self._owner = str(listed[0].get("owned_by", ""))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            while (telling := self._telling) is not None and not telling.done():  # programs may end meanwhile
                await asyncio.wait([telling], timeout=LAST_SECONDS)
                telling.cancel()  # of a server that hangs
                await asyncio.wait([telling])
        await super().__aexit__(kind, error, trace)

    # ── what it can do ───────────────────────────────────────────────────────────────────────

    @property
    def _who(self) -> str:
        return f"the server at {self.url} ({self._owner or 'of unknown make'})"

    def check(self, prompt: Prompt, params: SamplingParams | None, *, separate: bool = False) -> None:
        if separate and not prompt.messages:
            raise RequestError("separate_reasoning needs roles: where reasoning ends, the server's template says")
        if params is not None:
            self._check(params, None if self._ours else HAS)
        if self._ours:
            return
        if params is None:
            self._cannot("tells no log-probabilities of a prompt, which select needs; use a server of ours, or Engine")
        if prompt.begun:
            self._cannot("cannot go on from the beginning of a message; let each assistant(...) begin with its gen")

    # ── calls ────────────────────────────────────────────────────────────────────────────────

    async def reply(
        self, prompt: Prompt, params: SamplingParams, *, separate: bool, stream: bool, program: str
    ) -> AsyncGenerator[Piece, None]:
        path, body = self._request(prompt, params, separate, program)
        reading, scored = Reading("openai"), self._scored(params)
        async with aclosing(self._said(path, body, stream=stream)) as events:
            async for data in events:
                text = reading.take(data)
                if scored is not None:
                    scored.take(data)
                thought = reading.reasoning if separate else ""
                yield Piece(text[len(thought) :], thought)
        if reading.finish is None:
            raise WorkerError(f"{self.url}{path} ended its reply without a finish reason")
        yield Piece("", "", self._meta(params, reading, scored))

    def _scored(self, params: SamplingParams) -> Scored | None:
        """What reads log-probabilities, if they are asked for."""
        asked = params.logprobs is not None or params.prompt_logprobs is not None
        return Scored(params.logprobs, params.prompt_logprobs) if asked else None

    def _meta(self, params: SamplingParams, reading: Reading, scored: Scored | None) -> Meta:
        """What is known of a whole reply. Raises RequestError where a server of another make has passed over what it
        was asked for."""
        counts = reading.prompt_tokens, reading.cached_tokens, reading.completion_tokens
        meta = Meta(reading.finish or "", reading.matched, *counts)
        if scored is None:
            return meta
        if params.logprobs is not None and not scored.tokens and reading.completion_tokens:
            self._cannot("has told no {logprobs}, which it was asked for; leave them out, or use a server of ours")
        return msgspec.structs.replace(meta, logprobs=tuple(scored.tokens), prompt_logprobs=tuple(scored.prompt))

    async def _said(self, path: str, body: dict[str, Any], *, stream: bool) -> AsyncGenerator[bytes, None]:
        """The events of a reply, or the whole of it."""
        if not stream:
            yield await self._ask(path, body)
            return
        async with aclosing(self._events(path, {**body, **STREAMED})) as events:
            async for data in events:
                yield data

    async def answer(
        self, prompt: Prompt, params: SamplingParams, offer: Offer, *, separate: bool, program: str
    ) -> Spoken:
        path, body = self._request(prompt, params, separate, program)
        body |= {"tools": [tool.described for tool in offer.tools], "tool_choice": offer.choice}
        answer = await self._ask(path, body)
        reading, scored = Reading("openai"), self._scored(params)
        text = reading.take(answer)
        if scored is not None:
            scored.take(answer)
        thought = reading.reasoning if separate else ""
        calls = msgspec.json.decode(answer, type=Whole).calls
        return Spoken(text[len(thought) :], thought, calls, self._meta(params, reading, scored))

    def _request(
        self, prompt: Prompt, params: SamplingParams, separate: bool, program: str
    ) -> tuple[str, dict[str, Any]]:
        """The path and the body of a request for one reply."""
        api = CHAT if prompt.messages else COMPLETIONS
        fields = {api.names.get(name, name): value for name, value in changed(params).items()}
        if api is CHAT and params.logprobs is not None:
            fields["logprobs"] = True
        body: dict[str, Any] = {"model": self.model_name, **(fields if self._ours else in_openai_words(fields))}
        if self._ours:
            body["program"] = program
            if not {"logprobs", "prompt_logprobs"}.isdisjoint(fields):
                body["return_token_ids"] = True  # with which log-probabilities have ids and ranks
        if prompt.text is not None:
            return "/v1/completions", {**body, "prompt": prompt.text}
        body["messages"] = prompt.messages
        if self._ours:
            body |= {**written(prompt), "separate_reasoning": separate}
        return "/v1/chat/completions", body

    async def scores(
        self, prompt: Prompt, choices: Sequence[str], *, alone: bool, program: str
    ) -> tuple[list[Scores], Meta]:
        said = {"prompt": prompt.text} if prompt.text is not None else {"messages": prompt.messages, **written(prompt)}
        body = {"model": self.model_name, **said, "choices": choices, "alone": alone, "program": program}
        answer = msgspec.json.decode(await self._ask("/v1/choices", body), type=Chosen)
        usage = answer.usage
        return answer.choices, Meta("length", None, usage.prompt_tokens, usage.cached_tokens)

    async def decide(
        self, messages: Sequence[dict[str, Any]], question: Question, *, program: str
    ) -> tuple[list[float], Meta]:
        asked = [in_openai_question(question)]
        body = {"model": self.model_name, "input": in_openai_items(messages), "questions": asked}
        if self._ours:
            body["program"] = program
        answer = msgspec.json.decode(await self._ask("/v1/decisions", body), type=Decided)
        (found,), usage = answer.answers, answer.usage
        meta = Meta("length", None, usage.input_tokens, usage.input_tokens_details.cached_tokens)
        return [found.probability, 1 - found.probability] if found.probability is not None else found.shares, meta

    async def end(self, program: str) -> None:
        if not self._ours or self._http.closed:  # a program that runs by itself may end after its server was left
            return
        self._ended.append(program)
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell_ended())

    async def _tell_ended(self) -> None:
        """Tell the server of all programs that have ended; those that end meanwhile are told together."""
        while self._ended:
            ended, self._ended = self._ended[:MOST_ENDED], self._ended[MOST_ENDED:]
            with suppress(RequestError, WorkerError):  # it forgets them by itself, later
                await self._ask("/v1/programs/end", {"programs": ended})


def in_openai_items(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of a chat as /v1/decisions takes them: calls of tools and their results are items of their own."""
    items: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            content = [in_openai_part(part, role) for part in content]
        if role == "tool":
            items.append({"type": "function_call_output", "call_id": message["tool_call_id"], "output": content})
        elif content:
            items.append({"role": role, "content": content})
        for call in message.get("tool_calls") or ():
            items.append({"type": "function_call", "call_id": call["id"], **call["function"]})
    return items


def in_openai_part(part: dict[str, Any], role: str) -> dict[str, Any]:
    """A part of a message's content as an item of /v1/decisions has it; our server alone reads clips."""
    match part:
        case {"type": "text", "text": text}:
            return {"type": "output_text" if role == "assistant" else "input_text", "text": text}
        case {"type": "video_url", "video_url": {"url": url}}:
            return {"type": "input_video", "video_url": url}
    return {"type": "input_image", "image_url": part["image_url"]["url"]}


def in_openai_question(question: Question) -> dict[str, Any]:
    """`question` as /v1/decisions takes it."""
    said: dict[str, Any] = {"type": question.kind, "instructions": question.instructions}
    if question.kind != "predicate":
        name, key = ("choices", "value") if question.kind == "choice" else ("levels", "label")
        said[name] = [
            {key: option.text, **({"description": option.description} if option.description else {})}
            for option in question.options
        ]
    return said


def in_openai_words(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with a grammar as OpenAI has it, in response_format."""
    left = {name: value for name, value in fields.items() if name not in FORMATS}
    if fields.get("json_object"):
        left["response_format"] = {"type": "json_object"}
    if (schema := fields.get("json_schema")) is not None:
        named = {"name": "reply", "schema": msgspec.json.decode(schema), "strict": fields.get("strict_schema", True)}
        left["response_format"] = {"type": "json_schema", "json_schema": named}
    return left
