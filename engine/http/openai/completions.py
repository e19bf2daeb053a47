"""The OpenAI API: /v1/chat/completions and /v1/completions.

The fields of requests are in completion_bodies.py, messages and tools in conversation.py, what replies may be asked to
be in grammars.py, what they look like in choices.py, and how much the model is to think in effort.py.
"""

import struct
from typing import Any
from uuid import uuid4

import msgspec
from aiohttp import web

from engine.conversation.reading import NOTHING, Reading, Wanted, reading_of
from engine.errors import RequestError
from engine.http.fields import ignore
from engine.http.openai.bodies import ChatBody, CompletionBody, SamplingBody, StreamOptions
from engine.http.openai.conversation import (
    AllowedChoice,
    NamedTool,
    among,
    either,
    plain_messages,
    template_options,
    tools_of,
)
from engine.http.openai.effort import with_effort
from engine.http.openai.grammars import grammar_fields
from engine.http.openai.replies import (
    ChatCompletion,
    ChatCompletionChunk,
    OpenAIReply,
    TextCompletion,
    TextCompletionChunk,
    Wording,
)
from engine.http.openapi import ErrorReply, Route
from engine.http.service import SERVICE, answer
from engine.messages.request import Generate, SamplingParams
from engine.params.sampling import check_sampling

MAX_SAMPLES = 128  # replies to one prompt
MAX_CHOICES = 1024  # replies to one request
MAX_SALT_LENGTH = 1024
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions, where a reply seldom ends by itself


# ── handlers ─────────────────────────────────────────────────────────────────────────────────


async def chat_completions(request: web.Request, body: ChatBody) -> web.StreamResponse:
    """Answer a conversation, whole or streamed."""
    request.app[SERVICE].check_model(body.model)
    request.app[SERVICE].check_template(body.chat_template)
    if body.max_completion_tokens not in (None, body.max_tokens) and body.max_tokens is not None:
        raise RequestError(
            f"max_tokens is {body.max_tokens} and max_completion_tokens is {body.max_completion_tokens}; "
            "they mean the same, so send one",
            param="max_completion_tokens",
        )
    if body.top_logprobs and not body.logprobs:
        raise RequestError(f"top_logprobs is {body.top_logprobs}; it needs logprobs: true", param="top_logprobs")
    new, names = body.max_tokens, {"logprobs": "top_logprobs"}
    if body.max_completion_tokens is not None:
        new, names["max_tokens"] = body.max_completion_tokens, "max_completion_tokens"
    sampling = sampling_of(
        body,
        names,
        max_tokens=new,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    messages, wanted, text = plain_messages(body.messages), wanted_of(body), request.app[SERVICE].front.text
    options = template_options(body)
    if body.reasoning_effort is not None:
        options, degree = with_effort(text, options, body.reasoning_effort, tools=bool(wanted.offered))
        if not degree:
            ignore(request, "reasoning_effort")
    reading = reading_of(
        text,
        sampling,
        messages,
        options,
        wanted,
        separate=body.separate_reasoning is not False,
        told=_tells_reasoning(body),
        names=names | grammar_fields(body)[1],
    )
    first = Generate(
        f"chatcmpl-{uuid4().hex}",
        sampling,
        messages=messages,
        priority=body.priority or 0,
        cache_salt=salt_of(body.cache_salt),
        **prompt_fields(body),
        **options,
        **reading.job,
    )
    wording = Wording(chat=True, logprobs=bool(body.logprobs), prompt_logprobs=body.prompt_logprobs is not None)
    return await _complete(request, body, [first], wording, reading)


async def completions(request: web.Request, body: CompletionBody) -> web.StreamResponse:
    """Go on with texts or with token ids, whole or streamed."""
    request.app[SERVICE].check_model(body.model)
    if body.best_of not in (None, body.n or 1):
        raise RequestError(
            f"best_of is {body.best_of} and n is {body.n or 1}; replies are not ranked here: send n: {body.best_of} "
            "and logprobs, and choose among them",
            param="best_of",
        )
    about_prompt, names = body.prompt_logprobs, {}
    if body.echo and body.logprobs is not None and about_prompt is None:
        about_prompt, names = body.logprobs, {"prompt_logprobs": "logprobs"}
    elif body.echo and body.max_tokens == 0 and about_prompt is None:
        about_prompt = 0  # the prompt is all of the reply, as where it is read for its log-probabilities
    sampling = sampling_of(
        body, names, max_tokens=body.max_tokens, logprobs=body.logprobs, prompt_logprobs=about_prompt
    )
    rid, salt = f"cmpl-{uuid4().hex}", salt_of(body.cache_salt)
    prompts = prompts_of(body.prompt)
    check_choices(len(prompts), 1 if body.n is None else body.n)
    jobs = [
        Generate(
            rid,
            sampling,
            text=prompt if isinstance(prompt, str) else None,
            ids=None if isinstance(prompt, str) else pack_ids(prompt, "prompt"),
            priority=body.priority or 0,
            default_max_tokens=COMPLETION_MAX_TOKENS,
            cache_salt=salt,
            echo=bool(body.echo),
            **prompt_fields(body),
        )
        for prompt in prompts
    ]
    wording = Wording(
        chat=False,
        logprobs=body.logprobs is not None,
        prompt_logprobs=body.prompt_logprobs is not None,
        echo=bool(body.echo),
    )
    return await _complete(request, body, jobs, wording)


async def _complete(
    request: web.Request,
    body: SamplingBody,
    prompts: list[Generate],
    wording: Wording,
    reading: Reading = NOTHING,
) -> web.StreamResponse:
    """Answer with `body.n` replies to each of `prompts`, worded as `wording` and the stream's options say."""
    options = body.stream_options or StreamOptions()
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    rid, samples = prompts[0].rid, 1 if body.n is None else body.n
    jobs = sampled(prompts, samples)
    wording = msgspec.structs.replace(
        wording,
        samples=samples,
        choices=len(jobs),
        token_ids=bool(body.return_token_ids),
        usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
    )
    reply = OpenAIReply(rid, request.app[SERVICE].model, wording, reading)
    endpoint = "chat" if wording.chat else "completions"
    names = {"prompt": "messages"} if wording.chat else {}
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    called = grammar_fields(body)[1]
    names |= called | reading.grammar_names(called.get("grammar"))
    return await answer(
        request, rid, jobs, reply, endpoint=endpoint, stream=bool(body.stream), samples=samples, names=names
    )


# ── from a body to a Generate ────────────────────────────────────────────────────────────────


SAME = (
    "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "min_tokens", "presence_penalty",
    "frequency_penalty", "logit_bias", "skip_special_tokens", "include_stop_str_in_output", "detokenize",
)  # fmt: skip


def sampling_of(
    body: SamplingBody,
    names: dict[str, str],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """The checked SamplingParams of `body`; `names` says what its client called a field, if not by its own name."""
    given = {name: value for name in SAME if (value := getattr(body, name)) is not None}
    if body.repetition_penalty is None and body.repeat_penalty is not None:
        names["repetition_penalty"] = "repeat_penalty"
    grammar, called = grammar_fields(body)
    sampling = SamplingParams(
        max_tokens=max_tokens,
        repetition_penalty=either(body, "repetition_penalty", "repeat_penalty"),
        stop=stop_strings(body.stop),
        stop_regex=stop_strings(body.stop_regex),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        bad_words=tuple(body.bad_words or ()),
        allowed_token_ids=allowed_ids(body.allowed_token_ids),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        **given,
        **grammar,
    )
    check_sampling(sampling, names | called)
    return sampling


def prompt_fields(body: SamplingBody) -> dict[str, Any]:
    """What `body` says of the tokens of its prompt, as Generate takes it."""
    if body.truncate_prompt_tokens == 0:
        message = "truncate_prompt_tokens is 0; keep at least one token, or send -1 for as many as there is room for"
        raise RequestError(message, param="truncate_prompt_tokens")
    return {
        "special": body.add_special_tokens,
        "last": body.truncate_prompt_tokens,
        "tell_prompt": bool(body.return_token_ids),
    }


def _tells_reasoning(body: ChatBody) -> bool:
    """Whether the reply has what the model thinks."""
    told = body.include_reasoning is not False
    if not told and body.separate_reasoning is False:
        raise RequestError(
            "separate_reasoning is false, which leaves reasoning in the content, and include_reasoning is false, which "
            "leaves it out; send one",
            param="include_reasoning",
        )
    return told


def allowed_ids(ids: list[int] | None) -> tuple[int, ...]:
    """`allowed_token_ids`, where an empty list allows nothing."""
    if ids == []:
        raise RequestError("allowed_token_ids is empty; allow at least one, or leave it out", param="allowed_token_ids")
    return tuple(ids or ())


def salt_of(salt: str | None) -> str:
    """`cache_salt`, by default that of everybody."""
    if salt is not None and not 1 <= len(salt) <= MAX_SALT_LENGTH:
        raise RequestError(
            f"cache_salt has {len(salt)} characters; send 1 to {MAX_SALT_LENGTH}, or leave it out", param="cache_salt"
        )
    return salt or ""


def check_choices(prompts: int, samples: int, name: str = "prompt") -> None:
    """Raise RequestError when so many replies to each of so many prompts, which the client calls `name`, are too many.

    To be asked before anything is made for each of them."""
    if not 1 <= samples <= MAX_SAMPLES:
        raise RequestError(f"n is {samples}; it must be from 1 to {MAX_SAMPLES}", param="n")
    if prompts * samples > MAX_CHOICES:
        raise RequestError(
            f"{prompts} prompts with {samples} replies each are over the {MAX_CHOICES} of one request; send less",
            param="n" if samples > 1 else name,
        )


def sampled(prompts: list[Generate], samples: int) -> list[Generate]:
    """`samples` requests for each of `prompts`, in order. Of a seeded one, sample i has seed + i.

    Those that would share an id have `-` and their number appended to it."""
    check_choices(len(prompts), samples)
    if samples == 1 and len({prompt.rid for prompt in prompts}) == len(prompts):
        return prompts
    jobs: list[Generate] = []
    for prompt in prompts:
        for sample in range(samples):
            params = prompt.sampling
            if params.seed is not None and sample:
                seed = (params.seed + sample + (1 << 63)) % (1 << 64) - (1 << 63)
                params = msgspec.structs.replace(params, seed=seed)
            jobs.append(msgspec.structs.replace(prompt, rid=f"{prompt.rid}-{len(jobs)}", sampling=params))
    return jobs


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """`stop` as every API spells it: nothing, one string, or a list of them."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def wanted_of(body: ChatBody) -> Wanted:
    """What `body` says of tools."""
    tools, choice = tools_of(body.tools), body.tool_choice
    parallel = body.parallel_tool_calls is not False
    match choice:
        case NamedTool(function):
            return Wanted(tools, "required", function.name, parallel)
        case AllowedChoice(allowed):
            names = [tool.function.name for tool in allowed.tools]
            few = among(tools, names, "tool_choice.allowed_tools.tools")
            return Wanted(few, allowed.mode, None, parallel, held=len(few) < len(tools))
    return Wanted(tools, choice or "auto", None, parallel)


def prompts_of(prompt: str | list[int | str | list[int]]) -> list[str | list[int]]:
    """The prompts in `prompt`: a text, token ids, or a list that holds some of either."""
    if isinstance(prompt, str):
        return [prompt]
    message = "prompt mixes token ids with whole prompts; send one list of ids, or a list of prompts"
    ids, prompts = told_apart(prompt, RequestError(message, param="prompt"))
    return prompts or [ids]


def told_apart(items: list[Any], mixed: RequestError) -> tuple[list[int], list[Any]]:
    """`items` as token ids or as whole prompts, and an empty list of the other. Raises `mixed` for some of both.

    There may be a million, so the loop over them is not Python's."""
    kinds = set(map(type, items))
    if kinds <= {int}:
        return items, []
    if int in kinds:
        raise mixed
    return [], items


def pack_ids(ids: list[int], param: str) -> bytes:
    """Token ids as little-endian int32."""
    if not ids:
        raise RequestError(f"{param} is an empty list; send at least one token id", param=param)
    return struct.pack(f"<{len(ids)}i", *ids)


ROUTES = (
    Route(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        takes=ChatBody,
        gives=ChatCompletion,
        events=(ChatCompletionChunk, ErrorReply),
    ),
    Route(
        "POST",
        "/v1/completions",
        completions,
        takes=CompletionBody,
        gives=TextCompletion,
        events=(TextCompletionChunk, ErrorReply),
    ),
)
