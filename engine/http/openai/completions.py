"""/v1/completions: texts and token ids that are gone on with.

The fields that it shares with chat completions are in bodies.py, and what the replies look like is in replies.py.
"""

from collections.abc import Mapping
from typing import Any, ClassVar
from uuid import uuid4

from aiohttp import web

from engine.errors import RequestError, Words
from engine.http.fields import Rule, unserved
from engine.http.grammars import OPENAI_FIELDS
from engine.http.openai.bodies import SamplingBody
from engine.http.openai.replies import TextCompletion, TextCompletionChunk, Wording, complete
from engine.http.openapi import ErrorReply, Route
from engine.http.service import (
    SERVICE,
    check_choices,
    check_kept,
    pack_ids,
    program_of,
    salt_of,
    sampling_of,
    session_of,
    told_apart,
)
from engine.http.sse import words_of
from engine.http.wire import TokenId
from engine.messages.request import Generate
from engine.params.sampling import COMPLETIONS

COMPLETION_MAX_TOKENS = 16  # OpenAI's default, where a reply seldom ends by itself
COMPLETION_WORDS = Words(COMPLETIONS.names)


@COMPLETIONS.fields
class CompletionBody(SamplingBody, kw_only=True):
    prompt: str | list[TokenId | str | list[TokenId]]
    echo: bool | None = None
    best_of: int | None = None
    suffix: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {**SamplingBody.rules, "suffix": unserved("")}


async def completions(request: web.Request, body: CompletionBody) -> web.StreamResponse:
    """Go on with texts or with token ids, whole or streamed."""
    request.app[SERVICE].check_model(body.model)
    if body.best_of not in (None, body.n or 1):
        raise RequestError(
            f"best_of is {body.best_of} and n is {body.n or 1}; replies are not ranked here: send n: {body.best_of} "
            "and logprobs, and choose among them",
            param="best_of",
        )
    fields, called = COMPLETIONS.given(body)
    fields["grammar"], field = OPENAI_FIELDS.asked(body)
    logprobs, about_prompt = fields.get("logprobs"), fields.get("prompt_logprobs")
    if body.echo and about_prompt is None:
        if logprobs is not None:
            fields["prompt_logprobs"], called["prompt_logprobs"] = logprobs, "logprobs"
        elif fields.get("max_tokens") == 0:
            fields["prompt_logprobs"] = 0  # the prompt is all of the reply, as where it is read for these
    sampling = sampling_of(request, COMPLETION_WORDS, fields, called=called, grammar=field)
    rid, salt = f"cmpl-{uuid4().hex}", salt_of(body.cache_salt)
    session = session_of(request, body.session_id)
    prompts = prompts_of(body.prompt)
    check_choices(len(prompts), 1 if body.n is None else body.n)
    places = [f"prompt[{index}]" for index in range(len(prompts))] if len(prompts) > 1 else ["prompt"]
    jobs = [
        Generate(
            rid,
            sampling,
            text=prompt if isinstance(prompt, str) else None,
            ids=None if isinstance(prompt, str) else pack_ids(prompt, place),
            priority=body.priority or 0,
            default_max_tokens=COMPLETION_MAX_TOKENS,
            cache_salt=salt,
            program=program_of(request, body.program),
            echo=bool(body.echo),
            special=body.add_special_tokens,
            last=check_kept(body.truncate_prompt_tokens),
            tell_prompt=bool(body.return_token_ids),
            session=session,
        )
        for prompt, place in zip(prompts, places, strict=True)
    ]
    wording = Wording(
        chat=False,
        logprobs=logprobs is not None,
        prompt_logprobs=about_prompt is not None,
        echo=bool(body.echo),
    )
    words = None if len(prompts) == 1 else lambda number: words_of(request).at(places[number], "prompt")
    return await complete(request, body, jobs, wording, words=words)


def prompts_of(prompt: str | list[int | str | list[int]]) -> list[str | list[int]]:
    """The prompts in `prompt`: a text, token ids, or a list that holds some of either."""
    if isinstance(prompt, str):
        return [prompt]
    message = "prompt mixes token ids with whole prompts; send one list of ids, or a list of prompts"
    ids, prompts = told_apart(prompt, RequestError(message, param="prompt"))
    return prompts or [ids]


ROUTES = (
    Route(
        "POST",
        "/v1/completions",
        completions,
        takes=CompletionBody,
        gives=TextCompletion,
        events=(TextCompletionChunk, ErrorReply),
    ),
)
