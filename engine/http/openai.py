"""The OpenAI API: /v1/models, /v1/chat/completions and /v1/completions.

Beyond OpenAI's own fields, requests take top_k, min_p, stop_token_ids, ignore_eos and priority. One request has
one prompt and one reply: `n`, batches of prompts, log probabilities, tools, penalties and response formats are
refused by name until they are served.
"""

import struct
import time
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

from aiohttp import web
from msgspec import Meta

from engine.errors import RequestError
from engine.http.service import SERVICE, answer
from engine.http.sse import DONE
from engine.http.wire import Body, BodyDecoder, check_served, json_response, to_json
from engine.messages import Chunk, Generate, SamplingParams
from engine.sampling import INT32_MAX, check_sampling

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions, where a reply seldom ends by itself
TokenId = Annotated[int, Meta(ge=0, le=INT32_MAX)]
Priority = Annotated[int, Meta(ge=-INT32_MAX, le=INT32_MAX)]


# ── requests ─────────────────────────────────────────────────────────────────────────────────


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # ignored: no padding is added


class SamplingBody(Body):
    """Fields that both kinds of completion share. Null is the same as absent."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    priority: Priority = 0
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Any = None  # ignored
    n: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "repetition_penalty": (1,),
        "logit_bias": ({},),
        "logprobs": (False,),
    }


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message. A developer's is a system message to the model; the parts of a content are joined."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None

    # An assistant's message comes back as the client got it, with these empty.
    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {
        "refusal": (),
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "tool_calls": ([],),
    }


class ChatBody(SamplingBody, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    # Ignored: they change nothing that the engine does.
    metadata: Any = None
    store: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    service_tier: Any = None
    tools: Any = None
    tool_choice: Any = None
    top_logprobs: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {
        **SamplingBody.unserved,
        "audio": (),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "top_logprobs": (0,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }


class CompletionBody(SamplingBody, kw_only=True):
    prompt: str | list[TokenId | str | list[TokenId]]
    best_of: Any = None
    echo: Any = None
    suffix: Any = None

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {
        **SamplingBody.unserved,
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
        "logprobs": (),  # a count here: 0 would ask for one
    }


CHAT = BodyDecoder(ChatBody)
COMPLETION = BodyDecoder(CompletionBody)


# ── handlers ─────────────────────────────────────────────────────────────────────────────────


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions"""
    body = CHAT.decode(await request.read())
    request.app[SERVICE].check_model(body.model)
    if body.max_completion_tokens is None:
        sampling = sampling_of(body, body.max_tokens)
    elif body.max_tokens in (None, body.max_completion_tokens):
        sampling = sampling_of(body, body.max_completion_tokens, "max_completion_tokens")
    else:
        raise RequestError(
            f"max_tokens is {body.max_tokens} and max_completion_tokens is {body.max_completion_tokens}; "
            "they mean the same, so send one",
            param="max_completion_tokens",
        )
    rid = f"chatcmpl-{uuid4().hex}"
    generate = Generate(rid, sampling, messages=plain_messages(body.messages), priority=body.priority)
    return await _complete(request, body, generate, chat=True)


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions"""
    body = COMPLETION.decode(await request.read())
    request.app[SERVICE].check_model(body.model)
    sampling = sampling_of(body, body.max_tokens)
    prompt = single_prompt(body.prompt)
    text, ids = (prompt, None) if isinstance(prompt, str) else (None, pack_ids(prompt, "prompt"))
    generate = Generate(
        f"cmpl-{uuid4().hex}",
        sampling,
        text=text,
        ids=ids,
        priority=body.priority,
        default_max_tokens=COMPLETION_MAX_TOKENS,
    )
    return await _complete(request, body, generate, chat=False)


async def _complete(request: web.Request, body: SamplingBody, generate: Generate, *, chat: bool) -> web.StreamResponse:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    usage = body.stream_options is not None and body.stream_options.include_usage
    reply = OpenAIReply(generate.rid, request.app[SERVICE].model, chat=chat, usage=usage)
    endpoint = "chat" if chat else "completions"
    return await answer(request, generate, reply, endpoint=endpoint, stream=bool(body.stream))


async def models(request: web.Request) -> web.Response:
    """GET /v1/models"""
    return json_response({"object": "list", "data": [_model(request)]})


async def model(request: web.Request) -> web.Response:
    """GET /v1/models/{model}"""
    request.app[SERVICE].check_model(request.match_info["model"])
    return json_response(_model(request))


def _model(request: web.Request) -> dict[str, Any]:
    service = request.app[SERVICE]
    info = service.front.info
    return {
        "id": service.model,
        "object": "model",
        "created": service.front.created,
        "owned_by": "engine",
        "max_model_len": info.max_model_len if info is not None else None,
    }


# ── from a body to a Generate ────────────────────────────────────────────────────────────────


def sampling_of(body: SamplingBody, max_tokens: int | None, max_tokens_name: str = "max_tokens") -> SamplingParams:
    """The checked SamplingParams of `body`; `max_tokens_name` is what its client called the limit."""
    fields = ("temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos")
    given = {name: value for name in fields if (value := getattr(body, name)) is not None}
    sampling = SamplingParams(
        max_tokens=max_tokens,
        stop=stop_strings(body.stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        **given,
    )
    check_sampling(sampling, {"max_tokens": max_tokens_name})
    return sampling


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """`stop` as every API spells it: nothing, one string, or a list of them."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as a chat template takes them: {"role", "content"} and "name" where it was given."""
    if not messages:
        raise RequestError("messages is empty; send at least one message", param="messages")
    plain: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        check_served(message, f"messages[{index}].")
        content = message.content
        if content is None and message.role != "assistant":
            path = f"messages[{index}].content"
            raise RequestError(f"{path} is missing; a {message.role} message needs a text", param=path)
        text = content if isinstance(content, str) else "".join(part.text for part in content or ())
        role = "system" if message.role == "developer" else message.role
        plain.append({"role": role, "content": text} | ({"name": message.name} if message.name else {}))
    return plain


def single_prompt(prompt: str | list[int | str | list[int]]) -> str | list[int]:
    """The one prompt in `prompt`: a text, token ids, or a list that holds one of either."""
    if isinstance(prompt, str):
        return prompt
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return ids
    if len(prompt) > 1:
        message = f"prompt holds {len(prompt)} prompts, which is not supported yet; send one request for each"
        raise RequestError(message, param="prompt", code="unsupported_parameter")
    only = prompt[0]
    assert not isinstance(only, int)
    return only


def pack_ids(ids: list[int], param: str) -> bytes:
    """Token ids as little-endian int32."""
    if not ids:
        raise RequestError(f"{param} is an empty list; send at least one token id", param=param)
    return struct.pack(f"<{len(ids)}i", *ids)


# ── replies ──────────────────────────────────────────────────────────────────────────────────


def usage_of(last: Chunk) -> dict[str, Any]:
    """OpenAI's usage object for a reply that ends with `last`."""
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "total_tokens": last.prompt_tokens + last.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": last.cached_tokens},
    }


class OpenAIReply:
    """Chunks as chat.completion(.chunk) or text_completion objects.

    All but the text of an event is encoded once, so a chunk costs one string escape and one join.
    """

    def __init__(self, rid: str, model: str, *, chat: bool, usage: bool) -> None:
        self._chat = chat
        self._usage = usage
        self._head = {"id": rid, "object": "chat.completion" if chat else "text_completion"}
        self._head |= {"created": int(time.time()), "model": model}  # type: ignore[dict-item]
        kind = {"object": "chat.completion.chunk" if chat else "text_completion"}
        opening = to_json(self._head | kind)[:-1]
        end = b',"usage":null}\n\n' if usage else b"}\n\n"
        self._before_choices = b"data: " + opening + b',"choices":['
        self._before = self._before_choices + b'{"index":0,' + (b'"delta":{"content":' if chat else b'"text":')
        self._after = (b"}" if chat else b"") + b',"logprobs":null,"finish_reason":null}]' + end
        self._end = b"]" + end
        self._first = chat

    def event(self, chunk: Chunk) -> bytes:
        """The events of `chunk`; a chat opens with the role, and ends with finish, usage if asked for, DONE."""
        events = b""
        if self._first:
            self._first = False
            events = self._choice({"delta": {"role": "assistant", "content": ""}})
        if chunk.text:
            events += self._before + to_json(chunk.text) + self._after
        if chunk.finish is not None:
            events += self._choice({"delta": {}} if self._chat else {"text": ""}, chunk)
            if self._usage:
                events += self._before_choices + b'],"usage":' + to_json(usage_of(chunk)) + b"}\n\n"
            events += DONE
        return events

    def _choice(self, fields: dict[str, Any], last: Chunk | None = None) -> bytes:
        return self._before_choices + to_json(choice(fields, last)) + self._end

    def whole(self, text: str, ids: list[int], last: Chunk) -> bytes:
        """The object of a reply that is not streamed."""
        fields = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        return to_json(self._head | {"choices": [choice(fields, last)], "usage": usage_of(last)})


def choice(fields: dict[str, Any], last: Chunk | None) -> dict[str, Any]:
    """The only entry of `choices`; `matched_stop`, an extension, is the stop string or token id that ended it."""
    shared = {"index": 0, **fields, "logprobs": None, "finish_reason": None}
    return shared if last is None else shared | {"finish_reason": last.finish, "matched_stop": last.matched}
