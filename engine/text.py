"""Text in, text out: a model's tokenizer and chat template, and the incremental decoder of one reply.

Pure logic: it knows neither channels nor torch. Left out: tools, documents and media in chat templates.
"""

import codecs
import json
from bisect import bisect_left
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders

from engine.errors import ConfigError, RequestError
from engine.plugin.specs import TextSpec

ROLES = ("system", "developer", "user", "assistant", "tool")
REPLACEMENT = "\ufffd"  # what bytes that are not, or not yet, UTF-8 decode to


class Text:
    """One model's text: prompts to token ids, token ids to text.

    `chat_template` takes the place of the checkpoint's own. Raises ConfigError when the template is malformed.
    """

    def __init__(self, spec: TextSpec, chat_template: str | None = None) -> None:
        self.spec = spec
        self.vocab_size: int = spec.tokenizer.get_vocab_size(with_added_tokens=True)
        source = chat_template if chat_template is not None else spec.chat_template
        self._template = None if source is None else compile_template(source)
        added = spec.tokenizer.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)
        byte_level = isinstance(spec.tokenizer.decoder, decoders.ByteLevel)
        self._token_bytes = _TokenBytes(spec.tokenizer, self._special) if byte_level else None

    def encode(self, text: str) -> list[int]:
        """Token ids of a completion prompt, with the first token that the model asks for.

        Raises RequestError when `text` holds half of a surrogate pair."""
        check_unicode(text, "prompt")
        ids: list[int] = self.spec.tokenizer.encode(text).ids
        if self.spec.add_bos and self.spec.bos_id is not None and ids[:1] != [self.spec.bos_id]:
            return [self.spec.bos_id, *ids]
        return ids

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation as the chat template writes it, up to where the assistant speaks.

        Raises RequestError when the model has no template, or it refuses the messages."""
        text = self.render_chat(messages)
        check_unicode(text, "messages")
        ids: list[int] = self.spec.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """The conversation as the chat template writes it. Raises RequestError as `encode_chat` does."""
        if self._template is None:
            raise RequestError(
                "the model has no chat template; send text to /v1/completions instead", code="no_chat_template"
            )
        if not messages:
            raise RequestError("messages is empty; send at least one message", param="messages")
        try:
            return self._template.render(
                messages=[plain_message(index, message) for index, message in enumerate(messages)],
                add_generation_prompt=True,
                bos_token=self.spec.bos_token,
                eos_token=self.spec.eos_token,
                tools=None,
                documents=None,
            )
        except RequestError:
            raise
        except Exception as error:  # the template is a program of the checkpoint's: it may raise anything
            raise RequestError(f"the chat template refuses the messages: {error}", param="messages") from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.spec.tokenizer.decode(ids, skip_special_tokens=True)

    def reply(self, stop: tuple[str, ...] = ()) -> "ReplyDecoder":
        """A decoder for one reply that ends before the first of `stop`. Raises RequestError for an empty one."""
        if not all(stop):
            raise RequestError(f"stop is {list(stop)!r}; an empty string would end every reply", param="stop")
        if self._token_bytes is not None:
            return ReplyDecoder(_ByteDecoder(self._token_bytes), stop)
        return ReplyDecoder(_WindowDecoder(self.spec.tokenizer, self._special), stop)


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


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


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


# ── replies ──────────────────────────────────────────────────────────────────────────────────


class _Decoder(Protocol):
    """Token ids in, text out as soon as it is certain; `flush` gives what never became certain."""

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


class _TokenBytes(dict[int, bytes]):
    """The bytes of a byte-level token, filled in as ids are seen; special and unknown ones have none."""

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        # byte-level vocabularies write each byte as a printable character: itself, or else the next from U+0100 on
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = sorted(set(range(256)) - set(printable))
        self._byte = {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}

    def __missing__(self, id: int) -> bytes:
        token = None if id in self._special else self._tokenizer.id_to_token(id)
        if token is None:
            token = ""
        if all(character in self._byte for character in token):
            self[id] = bytes(self._byte[character] for character in token)
        else:  # an added token, which is written as it is
            self[id] = token.encode()
        return self[id]


class _ByteDecoder:
    """For byte-level tokenizers: tokens are bytes, and text is their UTF-8."""

    def __init__(self, token_bytes: _TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        table = self._token_bytes
        return self._utf8.decode(table[ids[0]] if len(ids) == 1 else b"".join([table[id] for id in ids]))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """For any other tokenizer: decodes the last tokens again, after those before them for context.

    A text that ends in U+FFFD may be a character cut in two and waits for more, for at most `PATIENCE` pushes.
    Byte-fallback tokens that never become UTF-8 may so come out as fewer or more U+FFFD than decoded as a whole.
    """

    PATIENCE = 16

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._ids: list[int] = []  # context, then tokens whose text is not released
        self._context = 0  # how many are context, and what they read
        self._context_text = ""
        self._waited = 0

    def push(self, ids: Sequence[int]) -> str:
        self._ids += [id for id in ids if id not in self._special]
        text = self._tokenizer.decode(self._ids)
        new = text[len(self._context_text) :]
        if not new or (new.endswith(REPLACEMENT) and self._waited < self.PATIENCE):
            self._waited += 1
            return ""
        del self._ids[: self._context]
        self._context, self._context_text, self._waited = len(self._ids), self._tokenizer.decode(self._ids), 0
        return new

    def flush(self) -> str:
        return self._tokenizer.decode(self._ids)[len(self._context_text) :]


def beginnings(stop: Sequence[str]) -> dict[str, list[str]]:
    """All that begins one of `stop` without being all of it, longest first, by its last character."""
    by_last: dict[str, list[str]] = {}
    for start in sorted({word[:end] for word in stop for end in range(1, len(word))}, key=len, reverse=True):
        by_last.setdefault(start[-1], []).append(start)
    return by_last


class ReplyDecoder:
    """Turns one reply's tokens into text that may be sent at once, and ends it at a stop string.

    However the tokens are split over `push`, all that `push` and `flush` return is the text of the tokens up to
    the stop string that is complete first; of several that end at one character, the longest.

    `matched` is that stop string, None until there is one. `kept` is then how many tokens hold the text before it.
    """

    def __init__(self, decoder: _Decoder, stop: tuple[str, ...]) -> None:
        self.matched: str | None = None
        self.kept = 0
        self._decoder = decoder
        self._stop = stop
        self._beginnings = beginnings(stop)
        self._held = ""  # text that could begin a stop string
        self._length = 0  # characters of text so far, and per token those up to and with it
        self._ends: list[int] = []

    @property
    def used(self) -> int:
        """Tokens read up to and with the one that completed `matched`."""
        return len(self._ends)

    def push(self, ids: Sequence[int]) -> str:
        """Take tokens; return the text that they make certain, in whole characters."""
        if not self._stop:
            return self._decoder.push(ids)
        released = ""
        for id in ids:  # one by one, for `kept`
            if self.matched is not None:
                break
            text = self._decoder.push((id,))
            self._length += len(text)
            self._ends.append(self._length)
            released += self._scan(text)
        return released

    def flush(self) -> str:
        """The reply has ended: return what is held. `matched` may become set, by a last, broken character."""
        if self.matched is not None:
            return ""
        text = self._decoder.flush()
        if not self._stop:
            return text
        if text:
            self._length += len(text)
            self._ends[-1] = self._length
        released = self._scan(text)
        held, self._held = self._held, ""
        return released + held

    def _scan(self, new: str) -> str:
        """Add `new` to the held text; return what of both is safe, holding back a possible beginning."""
        text = self._held + new
        self._held = ""
        for word in self._stop:
            if word in text:
                return self._end(text)
        for start in self._beginnings.get(text[-1:], ()):
            if text.endswith(start):
                self._held = start
                return text[: -len(start)]
        return text

    def _end(self, text: str) -> str:
        """`text`, the last there is, holds a stop string: return what stands before it."""
        found = ((text.index(word), word) for word in self._stop if word in text)
        at, self.matched = min(found, key=lambda match: (match[0] + len(match[1]), match[0]))
        before = self._length - len(text) + at
        self.kept = bisect_left(self._ends, before) + 1 if before else 0
        return text[:at]
