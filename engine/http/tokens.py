"""/tokenize, /detokenize and /tokenizer_info, shaped as vLLM's: the model's tokenizer, without running the model.

A long text is encoded in a thread (the tokenizers library lets go of the interpreter lock), so it does not delay
the replies of others.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import anyio.to_thread
from aiohttp import web

from engine.errors import RequestError
from engine.http.conversation import ChatMessage, ToolBody, plain_messages, template_options, tools_of
from engine.http.openai import TokenId
from engine.http.service import SERVICE, Service
from engine.http.wire import Body, Reply, json_response
from engine.text import Text

THREAD_SIZE = 20_000  # characters or tokens

Result = TypeVar("Result")


class TokenizeBody(Body):
    """Either `prompt` or `messages`. Special tokens are added by default to a prompt, not to a rendered chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[ToolBody] | None = None
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

    def info(text: Text) -> TokenizerInfo:
        spec = text.spec
        return TokenizerInfo(
            "PreTrainedTokenizerFast", text.vocab_size, length, spec.bos_token or None, spec.bos_id,
            spec.eos_token or None, spec.eos_ids, text.chat_template, text.special_tokens,
        )  # fmt: skip

    return json_response(await with_text(service, 0, info))


async def tokenize(request: web.Request, body: TokenizeBody) -> web.Response:
    """Turn a prompt or a chat into token ids."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    service.check_template(body.chat_template)
    if (body.prompt is None) == (body.messages is None):
        both = "neither prompt nor messages is" if body.prompt is None else "both prompt and messages are"
        raise RequestError(f"{both} given; send exactly one", param="prompt")
    special = body.add_special_tokens
    if body.prompt is not None:
        prompt = body.prompt
        ids = await with_text(service, len(prompt), lambda text: text.encode(prompt, special is not False))
    else:
        messages = plain_messages(body.messages or [])
        tools = [tool.described() for tool in tools_of(body.tools)]
        options = {"tools": tools, **template_options(body)}
        encode = partial(_of_chat, messages=messages, special=bool(special), options=options)
        ids = await with_text(service, size_of(messages, tools), encode)
    names = None
    if body.return_token_strs:
        names = await with_text(service, len(ids), lambda text: [text.token(id) for id in ids])
    length = None if service.front.info is None else service.front.info.max_model_len
    return json_response(TokenizeReply(len(ids), length, ids, names))


async def detokenize(request: web.Request, body: DetokenizeBody) -> web.Response:
    """Turn token ids into the text that they stand for."""
    service = request.app[SERVICE]
    service.check_model(body.model)

    def decode(text: Text) -> str:
        for index, token in enumerate(body.tokens):
            if token >= text.vocab_size:
                raise _outside(index, token, text.vocab_size)
        return text.decode(body.tokens, body.skip_special_tokens)

    return json_response(DetokenizeReply(await with_text(service, len(body.tokens), decode)))


def _outside(index: int, token: int, vocabulary: int) -> RequestError:
    message = f"tokens[{index}] is {token}, outside the vocabulary; use ids from 0 to {vocabulary - 1}"
    return RequestError(message, param=f"tokens[{index}]")


def _of_chat(tokenizer: Text, messages: list[dict[str, Any]], special: bool, options: dict[str, Any]) -> list[int]:
    if not special:
        return tokenizer.encode_chat(messages, **options)
    return tokenizer.encode(tokenizer.render_chat(messages, **options))


def size_of(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> int:
    """About how many characters `messages` and `tools` have, for `with_text`."""
    return len(str(tools)) + sum(len(message["content"]) for message in messages)


async def with_text(service: Service, size: int, use: Callable[[Text], Result]) -> Result:
    """What `use` makes of the model's tokenizer; in a thread if `size` is large."""
    text = service.front.text
    if text is None:
        raise RequestError("the model is still loading; try again in a moment", code="starting", status=503)
    if size <= THREAD_SIZE:
        return use(text)
    return await anyio.to_thread.run_sync(use, text)
