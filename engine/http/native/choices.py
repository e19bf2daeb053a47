"""/v1/choices: the log-probabilities of some texts behind one prompt, all in one step over one cached prefix.

`select` of engine.lang asks it. The prompt is a text or a chat; a choice goes on with it, or with the assistant's
message. Left out: a choice by words of its own (/v1/decisions), and sampling.
"""

from collections.abc import Sequence
from typing import Annotated, Any
from uuid import uuid4

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from engine.errors import RequestError, Words
from engine.http.native.tokenize import texts_of
from engine.http.openai.chat import ChatMessage, messages_of, template_options
from engine.http.openapi import Route
from engine.http.service import SERVICE, Service, program_of, salt_of
from engine.http.sse import WORDS, words_of
from engine.http.tools import FEW_MESSAGES
from engine.http.turns import in_turn
from engine.http.wire import Body, Priority, Reply, json_response
from engine.media.store import showing
from engine.messages.reply import Chunk
from engine.messages.text import Tokenize, Tokenized
from engine.runtime.choices import MOST_CHOICES, Plan, Scores, check_choices, planned
from engine.runtime.mailbox import whole


class ChoicesBody(Body):
    """Either `prompt` or `messages`, and what each of `choices` goes on with. With `alone` the choices are scored
    without the prompt as well."""

    choices: Annotated[list[str], Meta(max_length=MOST_CHOICES)]
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], FEW_MESSAGES] | None = None
    alone: bool | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    program: str | None = None
    priority: Priority | None = None


class ScoredChoice(Reply, frozen=True):
    """The ids of a choice's tokens, from the first that is not the prompt's own, and their log-probabilities."""

    ids: list[int]
    logprobs: list[float]
    alone: list[float] | UnsetType = UNSET


class ChoicesUsage(Reply, frozen=True):
    """The tokens of all prompts that were scored, and how many of these were cached."""

    prompt_tokens: int
    cached_tokens: int


class ChoicesReply(Reply, frozen=True):
    """A score for each choice, in their order."""

    choices: list[ScoredChoice]
    usage: ChoicesUsage


async def choices(request: web.Request, body: ChoicesBody) -> web.Response:
    """Score some texts behind one prompt."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    service.check_template(body.chat_template)
    check_choices(body.choices)
    if (body.prompt is None) == (body.messages is None):
        both = "neither prompt nor messages is" if body.prompt is None else "both prompt and messages are"
        raise RequestError(f"{both} given; send exactly one", param="prompt")
    if body.messages is not None:
        request[WORDS] = Words({"prompt": "messages"})
    rid, said = f"choices-{uuid4().hex}", [] if body.messages is None else messages_of(body.messages)
    async with showing(service.front.media, rid, said) as (messages, media):
        if body.prompt is not None:
            job = Tokenize(body.prompt, special=body.add_special_tokens is not False)
        else:
            job = Tokenize(None, messages, template_options(body), special=bool(body.add_special_tokens))
        plan = await planned_for(
            service, job, body.choices, rid, alone=bool(body.alone), media=media,
            cache_salt=salt_of(body.cache_salt), priority=body.priority or 0, program=program_of(request, body.program),
        )  # fmt: skip
        replies = await scored(request, [plan], "choices")
    return json_response(ChoicesReply(list(map(_told, plan.read(replies))), usage_of(replies)))


def _told(scores: Scores) -> ScoredChoice:
    return ScoredChoice(scores.ids, scores.logprobs, UNSET if scores.alone is None else scores.alone)


def usage_of(replies: Sequence[Chunk]) -> ChoicesUsage:
    """The tokens of the requests that `replies` answer."""
    return ChoicesUsage(sum(each.prompt_tokens for each in replies), sum(each.cached_tokens for each in replies))


async def planned_for(
    service: Service, job: Tokenize, choices: Sequence[str], rid: str, *, alone: bool = False, **fields: Any
) -> Plan:
    """How to score `choices` behind the prompt of `job`."""
    found = await texts_of(service).ask(msgspec.structs.replace(job, endings=tuple(choices)))
    assert isinstance(found, Tokenized), f"a Tokenize was answered by {type(found).__name__}"
    return planned(found, choices, rid, alone=alone, **fields)


async def scored(request: web.Request, plans: Sequence[Plan], endpoint: str) -> list[Chunk]:
    """The replies to all requests of `plans`, in their order, once all have come."""
    jobs = [job for plan in plans for job in plan.jobs]
    places = [place for plan in plans for place in plan.places]
    opened = request.app[SERVICE].replies(
        request, jobs[0].rid, jobs, endpoint=endpoint, words=lambda number: words_of(request).at(places[number])
    )
    async with opened as boxes:
        return await in_turn(request, whole(boxes))


ROUTES = (Route("POST", "/v1/choices", choices, takes=ChoicesBody, gives=ChoicesReply),)
