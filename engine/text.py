"""Text in, text out: a model's tokenizer and chat template. How replies are decoded is in decoding.py.

Pure logic: it knows neither channels nor torch. Left out: tools, documents and media in chat templates.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders

from engine.decoding import ByteDecoder, Decoder, NoDecoder, ReplyDecoder, Spelling, TokenBytes, WindowDecoder
from engine.errors import ConfigError, RequestError
from engine.plugin.specs import TextSpec

TEMPLATES = 16  # templates of requests that are kept compiled
ROLES = ("system", "developer", "user", "assistant", "tool")


class Text:
    """One model's text: prompts to token ids, token ids to text.

    `chat_template` takes the place of the checkpoint's own. Raises ConfigError when the template is malformed.
    """

    def __init__(self, spec: TextSpec, chat_template: str | None = None) -> None:
        self.spec = spec
        self.vocab_size: int = spec.tokenizer.get_vocab_size(with_added_tokens=True)
        self.longest_token = max(map(len, spec.tokenizer.get_vocab()), default=1)  # characters of one
        source = chat_template if chat_template is not None else spec.chat_template
        self._template = None if source is None else compile_template(source)
        added = spec.tokenizer.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)
        byte_level = isinstance(spec.tokenizer.decoder, decoders.ByteLevel)
        self._token_bytes = TokenBytes(spec.tokenizer, self._special) if byte_level else None
        self._all_bytes = TokenBytes(spec.tokenizer) if byte_level else None  # with those of special tokens
        self.spelling = Spelling(spec.tokenizer, self._special, self._token_bytes)
        self._requested_template = lru_cache(TEMPLATES)(requested_template)

    @property
    def has_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a completion prompt, with the first token that the model asks for.

        Raises RequestError when `text` holds half of a surrogate pair."""
        check_unicode(text, "prompt")
        ids = self._encode(text, add_special_tokens)
        if not add_special_tokens:
            return ids
        if self.spec.add_bos and self.spec.bos_id is not None and ids[:1] != [self.spec.bos_id]:
            return [self.spec.bos_id, *ids]
        return ids

    def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation as `render_chat` writes it; the options are its own.

        Raises RequestError when the model has no template, or it refuses the messages."""
        text = self.render_chat(messages, **options)
        check_unicode(text, "messages")
        if not (ids := self._encode(text, False)):
            raise RequestError("the chat template makes an empty prompt of the messages; say more", param="messages")
        return ids

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # A batch, even of one, is encoded without the interpreter's lock; `encode` would hold it all along.
        (encoding,) = self.spec.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> str:
        """The conversation as the chat template writes it, up to where the assistant speaks.

        `continue_final_message` ends it inside the last message instead, for the reply to go on from there.
        `template_kwargs` are variables of the template's own; `chat_template` takes its place. Raises RequestError as
        `encode_chat` does."""
        template = self._template if chat_template is None else self._requested_template(chat_template)
        if template is None:
            raise RequestError(
                "the model has no chat template; send text to /v1/completions instead", code="no_chat_template"
            )
        if not messages:
            raise RequestError("messages is empty; send at least one message", param="messages")
        plain = [plain_message(index, message) for index, message in enumerate(messages)]
        if continue_final_message:
            plain[-1] = _left_open(plain[-1])
        own = {
            "messages": plain,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "bos_token": self.spec.bos_token,
            "eos_token": self.spec.eos_token,
            "tools": None,
        }
        if taken := sorted(own.keys() & (template_kwargs or {})):
            raise RequestError(
                f"chat_template_kwargs sets {', '.join(taken)}, which the request itself does; leave it out there",
                param="chat_template_kwargs",
            )
        try:
            text = template.render({"documents": None, **(template_kwargs or {}), **own})
        except Exception as error:  # the template is a program of the checkpoint's: it may raise anything
            raise RequestError(f"the chat template refuses the messages: {error}", param="messages") from error
        return _up_to_mark(text) if continue_final_message else text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        text: str = self.spec.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token(self, id: int) -> str:
        """How the vocabulary writes the token `id`; a gap in the vocabulary is empty."""
        return self.spec.tokenizer.id_to_token(id) or ""

    def reply(
        self,
        stop: tuple[str, ...] = (),
        stop_regex: tuple[str, ...] = (),
        min_tokens: int = 0,
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        detokenize: bool = True,
    ) -> ReplyDecoder:
        """A decoder for one reply that ends before the first of `stop` and `stop_regex` after `min_tokens` tokens, or
        with `include_stop` after it. Without `detokenize` it makes no text, and there is no stop.

        Raises RequestError for an empty stop."""
        if not all(stop):
            raise RequestError(f"stop is {list(stop)!r}; an empty string would end every reply", param="stop")
        if not detokenize:
            return ReplyDecoder(NoDecoder())
        decoder = self._decoder(skip_special_tokens)
        return ReplyDecoder(decoder, stop, stop_regex, min_tokens, include_stop)

    def _decoder(self, skip_special_tokens: bool) -> Decoder:
        token_bytes = self._token_bytes if skip_special_tokens else self._all_bytes
        if token_bytes is not None:
            return ByteDecoder(token_bytes)
        return WindowDecoder(self.spec.tokenizer, self._special if skip_special_tokens else frozenset())


# ── prompts ──────────────────────────────────────────────────────────────────────────────────


def check_unicode(text: str, param: str) -> None:
    """Raises RequestError when `text` cannot be written as UTF-8: JSON may carry half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param} holds half of a surrogate pair, {text[error.start]!r}; send whole characters", param=param
        ) from None


def plain_message(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """`message` with its content as one string, as templates expect it. Raises RequestError when it is malformed."""

    def refuse(what: str) -> NoReturn:
        raise RequestError(f"messages[{index}] {what}", param="messages")

    if not isinstance(message, dict):
        refuse(f"is {message!r}; an object with role and content is needed")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        refuse(f"has role {role!r}; it must be one of {', '.join(ROLES)}")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                refuse('has a content part that is not {"type": "text", "text": "..."}; this model reads only text')
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        refuse(f"has content {content!r}; a string or a list of text parts is needed")
    return {**message, "content": content}


OPEN_END = "\ue000 the reply goes on here \ue000"  # private-use characters: no text holds this by chance


def _left_open(message: dict[str, Any]) -> dict[str, Any]:
    """`message` with its end marked: whatever the template puts after it is cut off once it is rendered."""
    if message["role"] != "assistant":
        raise RequestError(
            f"continue_final_message needs a last message of the assistant's, and it is of the {message['role']}'s; "
            "append the beginning of the reply",
            param="continue_final_message",
        )
    return {**message, "content": message["content"] + OPEN_END}


def _up_to_mark(text: str) -> str:
    before, mark, _ = text.rpartition(OPEN_END)
    if not mark:
        raise RequestError(
            "the chat template leaves out the last message, so it cannot be continued; drop continue_final_message",
            param="continue_final_message",
        )
    return before


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def read_template(option: str | None) -> str | None:
    """The template that --chat-template names: a file's content, or the option itself where it holds Jinja.

    Raises ConfigError when there is no such file, or the template is malformed."""
    if option is None:
        return None
    source = option
    if "{{" not in option and "{%" not in option:
        try:
            source = Path(option).read_text()
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(
                f"--chat-template {option!r:.200} cannot be read ({error}); give a text file with a Jinja template, "
                "or a template itself, with {{ }} or {% %} in it"
            ) from None
    compile_template(source)
    return source


def requested_template(source: str) -> jinja2.Template:
    """The chat template that a request brings. Raises RequestError when it is malformed."""
    try:
        return compile_template(source)
    except ConfigError as error:
        raise RequestError(f"{error}; correct it, or leave chat_template out", param="chat_template") from None
    except Exception as error:  # jinja2 and Python refuse some templates in ways of their own: nesting, long numbers
        raise RequestError(
            f"the chat template does not compile ({type(error).__name__}: {error}); simplify it", param="chat_template"
        ) from error


def compile_template(source: str) -> jinja2.Template:
    """A chat template in jinja2's sandbox, with the names that Hugging Face gives templates.

    Raises ConfigError when it is malformed."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja2's own escapes HTML

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template is malformed at line {error.lineno}: {error.message}") from error
