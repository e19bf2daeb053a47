"""/tokenize, /detokenize and /tokenizer_info, shaped as vLLM's: the model's tokenizer, without running the model.

What is long is done in a process of the text pool, so it does not delay the replies of others. What has more than
several times as many tokens as the model's length is refused.
"""

import struct
from array import array
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from aiohttp import web

from engine.conversation.parts import media_of, without_sources
from engine.errors import RequestError, Words
from engine.http.openai.chat import ChatMessage, ToolBody, messages_of, template_options, tools_of
from engine.http.openapi import Route
from engine.http.service import SERVICE, Service
from engine.http.sse import WORDS
from engine.http.tools import FEW_MESSAGES, FEW_TOOLS
from engine.http.wire import Body, Reply, TokenId, json_response
from engine.messages.text import Detokenize, Detokenized, Tokenize, Tokenized

if TYPE_CHECKING:
    from engine.text.pool import TextPool

# How many tokens are counted or put into words in one request: so many lengths of the model, within bounds.
LENGTHS = 16
FEWEST_TOKENS, MOST_TOKENS = 1 << 16, 1 << 20


class TokenizeBody(Body):
    """Either `prompt` or `messages`. Special tokens are added by default to a prompt, not to a rendered chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], FEW_MESSAGES] | None = None
    tools: Annotated[list[ToolBody], FEW_TOOLS] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeReply(Reply, frozen=True):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(Body):
    tokens: list[TokenId]
    model: str | None = None
    skip_special_tokens: bool = False


class DetokenizeReply(Reply, frozen=True):
    prompt: str


class TokenizerInfo(Reply, frozen=True):
    """Named as in a tokenizer_config.json, as far as it is known; `eos_token_ids` are all that end a reply."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int | None
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_ids: tuple[int, ...]
    chat_template: str | None
    additional_special_tokens: list[str]


async def tokenizer_info(request: web.Request) -> web.Response:
    """Tell the tokenizer's special tokens, its size and the chat template in use."""
    service = request.app[SERVICE]
    length = None if service.front.info is None else service.front.info.max_model_len
    text = texts_of(service).admission.text
    spec = text.spec
    info = TokenizerInfo(
        "PreTrainedTokenizerFast", text.vocab_size, length, spec.bos_token or None, spec.bos_id,
        spec.eos_token or None, spec.eos_ids, text.chat_template, text.special_tokens,
    )  # fmt: skip
    return json_response(info)


async def tokenize(request: web.Request, body: TokenizeBody) -> web.Response:
    """Turn a prompt or a chat into token ids."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    service.check_template(body.chat_template)
    if (body.prompt is None) == (body.messages is None):
        both = "neither prompt nor messages is" if body.prompt is None else "both prompt and messages are"
        raise RequestError(f"{both} given; send exactly one", param="prompt")
    special, names = body.add_special_tokens, bool(body.return_token_strs)
    if body.prompt is not None:
        job = Tokenize(body.prompt, special=special is not False, names=names)
    else:
        messages = messages_of(body.messages or [])
        options = {"tools": [tool.described() for tool in tools_of(body.tools)], **template_options(body)}
        job = Tokenize(None, messages, options, special=bool(special), names=names)
    if body.messages is not None:
        request[WORDS] = Words({"prompt": "messages"})
    found = await tokenized(service, job)
    ids = array("i", found.ids).tolist()
    length = None if service.front.info is None else service.front.info.max_model_len
    return json_response(TokenizeReply(len(ids), length, ids, found.names))


async def detokenize(request: web.Request, body: DetokenizeBody) -> web.Response:
    """Turn token ids into the text that they stand for."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    if len(body.tokens) > (most := most_tokens(service)):
        raise _too_many(f"tokens has {len(body.tokens)} ids", most, "tokens")
    ids = struct.pack(f"<{len(body.tokens)}i", *body.tokens)
    answer = await texts_of(service).ask(Detokenize(ids, body.skip_special_tokens))
    assert isinstance(answer, Detokenized), f"a Detokenize was answered by {type(answer).__name__}"
    return json_response(DetokenizeReply(answer.text))


async def tokenized(service: Service, job: Tokenize) -> Tokenized:
    """The answer to `job`, whose media are got first. Raises RequestError where its text or its messages have more
    tokens than are counted, or a medium cannot be got."""
    most, media = most_tokens(service), job.media
    if service.front.media is not None and job.messages is not None:
        media = await service.front.media.resolved(media_of(job.messages))
        job = msgspec.structs.replace(job, messages=[without_sources(message) for message in job.messages])
    answer = await texts_of(service).ask(msgspec.structs.replace(job, most=most, media=media))
    assert isinstance(answer, Tokenized), f"a Tokenize was answered by {type(answer).__name__}"
    return answer


def most_tokens(service: Service) -> int:
    """How many tokens are taken in one request: several times as many as a prompt may have, so that a client can tell
    by how much it is too long."""
    info = service.front.info
    length = MOST_TOKENS if info is None else info.max_model_len
    return max(length, FEWEST_TOKENS, min(LENGTHS * length, MOST_TOKENS))


def texts_of(service: Service) -> "TextPool":
    """What does text jobs. Raises RequestError (503) until the model's text is read."""
    if (texts := service.front.texts) is None:
        raise RequestError("the model is still loading; try again in a moment", code="starting", status=503)
    return texts


def _too_many(what: str, most: int, param: str) -> RequestError:
    message = f"{what}, and at most {most} are taken; send them in parts"
    return RequestError(message, param=param, code="context_length_exceeded")


ROUTES = (
    Route("POST", "/tokenize", tokenize, takes=TokenizeBody, gives=TokenizeReply),
    Route("POST", "/detokenize", detokenize, takes=DetokenizeBody, gives=DetokenizeReply),
    Route("GET", "/tokenizer_info", tokenizer_info, gives=TokenizerInfo),
)
