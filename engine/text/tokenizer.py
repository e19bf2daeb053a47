"""A model's tokenizer with its chat template. decoding.py decodes replies.

Pure logic: it knows neither channels nor torch.
"""

import json
from collections.abc import Sequence
from functools import cache, lru_cache, partial
from typing import Any

from msgspec import Struct
from tokenizers import normalizers, pre_tokenizers

from engine.conversation.media import MediaProcessor, Placed, readable
from engine.conversation.parsers import Parsers
from engine.conversation.parts import Message
from engine.conversation.template import ChatTemplate, requested
from engine.errors import RequestError, counted
from engine.messages.media import Prepared
from engine.params.lengths import THE_INPUT, check_unicode
from engine.params.sampling import SamplingDefaults
from engine.plugin.parsing import ToolParser
from engine.plugin.specs import TextSpec
from engine.text.decoding import (
    ByteDecoder,
    ByteTokens,
    Decoder,
    NoDecoder,
    ReplyDecoder,
    Spelling,
    TokenBytes,
    WindowDecoder,
    is_byte_level,
    special_ids,
)
from engine.text.endings import encoded

OPENAI_DEFAULTS = SamplingDefaults()
TOOL_USE = "tool_use"  # the name of the template for conversations with tools
LOSSLESS = frozenset({"ByteLevel", "Split", "Digits"})  # pre-tokenizers that keep every character
# Characters of the longest text that is tokenized: so many for each token that is taken, or the second number where
# that is more. The tokenizer takes about 500 bytes of memory a token.
CHARACTERS, MOST_CHARACTERS = 8, 1 << 22
MOST_COMPOSED = 4  # characters that Unicode's normal form C makes one of, at most (UAX 15)
TEMPLATES = 16  # templates of requests that are kept compiled
WORDS_KEPT = 4096  # words whose tokens the tokenizer remembers: of up to 255 bytes, and up to 8 KiB each


class Prompt(Struct, frozen=True):
    """A text on its way to token ids, checked. With `special` the tokenizer adds what it adds to a text, with `bos` the
    model's first token is put before it where that is missing. A conversation has its `messages`; `media` are what it
    has places for, in order."""

    text: str
    special: bool
    bos: bool
    messages: Sequence[Message] | None = None
    media: Sequence[Prepared] = ()


class Text:
    """One model's text: prompts to token ids, token ids to text.

    `chat_template` replaces the checkpoint's own, `parsers` read the replies, and `defaults` are the values of sampling
    fields that requests leave out; without a processor for `media` the model reads text alone. Raises ConfigError
    when the template is malformed.
    """

    def __init__(
        self,
        spec: TextSpec,
        chat_template: str | None = None,
        parsers: Parsers | None = None,
        defaults: SamplingDefaults = OPENAI_DEFAULTS,
        media: MediaProcessor | None = None,
    ) -> None:
        self.spec = spec
        self.media = media
        self.defaults = defaults
        self.parsers = parsers = parsers or Parsers()
        if resize := getattr(spec.tokenizer.model, "_resize_cache", None):  # of a kind that keeps words
            resize(WORDS_KEPT)
        self.vocab_size: int = spec.tokenizer.get_vocab_size(with_added_tokens=True)
        self._width = width_of(spec.tokenizer)
        self.chat_template = source = chat_template if chat_template is not None else spec.chat_template
        syntax = (parsers.tool or ToolParser).syntax
        tokens = {"bos_token": spec.bos_token, "eos_token": spec.eos_token, **spec.special_tokens}
        marks = ({name: token for name, token in tokens.items() if token}, syntax)
        named = {} if chat_template is not None else spec.named_templates
        self._named = {name: ChatTemplate(template, *marks) for name, template in named.items()}
        self._template = None if source is None else ChatTemplate(source, *marks)
        added = spec.tokenizer.get_added_tokens_decoder()
        self._special = special_ids(spec.tokenizer)
        self.special_tokens = [added[id].content for id in sorted(self._special)]
        self._unmarked = frozenset(id for id in self._special if added[id].content not in parsers.special)
        self._byte_level = is_byte_level(spec.tokenizer)
        self._byte_tokens = ByteTokens(spec.tokenizer)
        self._token_bytes = cache(partial(TokenBytes, spec.tokenizer))  # by the special tokens that are skipped
        self.spelling = Spelling(spec.tokenizer)
        self._requested_template = lru_cache(TEMPLATES)(requested(*marks))

    @property
    def has_template(self) -> bool:
        return self._template is not None or TOOL_USE in self._named

    def encode(
        self, text: str, add_special_tokens: bool = True, *, most: int | None = None, name: str = "prompt"
    ) -> list[int]:
        """Token ids of a completion prompt, with the first token that the model asks for.

        Raises RequestError when `text`, which the client calls `name`, holds half of a surrogate pair, or cannot have
        at most `most` tokens: a text that is sure to be too long is not encoded."""
        return list(self.encode_prompt(self.prompt(text, add_special_tokens, most=most, name=name)).ids)

    def prompt(
        self, text: str, add_special_tokens: bool = True, *, most: int | None = None, name: str = "prompt"
    ) -> Prompt:
        """A text that can be encoded. Raises RequestError as `encode` does."""
        check_unicode(text, name)
        self._check_fits(text, most, name)
        return Prompt(text, add_special_tokens, add_special_tokens and self.spec.add_bos)

    def encode_first(self, text: str, kept: int, *, most: int | None = None, name: str = "prompt") -> list[int]:
        """Token ids of the beginning of `text`, `kept` at most, with what the tokenizer adds around it.

        Raises RequestError as `encode` does, and where what is added is as many already."""
        check_unicode(text, name)
        self._check_fits(text, most, name)
        tokenizer = self.spec.tokenizer
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        added = tokenizer.num_special_tokens_to_add(False)
        first = self.spec.bos_id if self.spec.add_bos and not added else None
        room = kept - added - (first is not None)
        if room < 1:
            raise RequestError(
                f"truncate_prompt_tokens is {kept}, and {kept - room} of them are added around a text; keep more",
                param="truncate_prompt_tokens",
            )
        encoding.truncate(room)
        ids: list[int] = tokenizer.post_process(encoding, None, True).ids
        return ids if first is None else [first, *ids]

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """The token ids of `encode_conversation`."""
        return list(self.encode_conversation(messages, **options).ids)

    def encode_conversation(
        self,
        messages: Sequence[Message],
        *,
        media: Sequence[Prepared] = (),
        opening: str = "",
        special: bool = False,
        most: int | None = None,
        **options: Any,
    ) -> Placed:
        """Token ids of a conversation as `render_chat` writes it, and of `opening` behind it; the options are its own.
        With `special` the tokenizer adds what it adds to a text. With them comes what is said of `media`.

        Raises RequestError when the model has no template, it refuses the messages, or these are too long, as in
        `encode`."""
        prompt = self.conversation(messages, media=media, opening=opening, special=special, most=most, **options)
        return self.encode_prompt(prompt)

    def conversation(
        self,
        messages: Sequence[Message],
        *,
        media: Sequence[Prepared] = (),
        opening: str = "",
        special: bool = False,
        most: int | None = None,
        **options: Any,
    ) -> Prompt:
        """The conversation as a text that can be encoded. Raises RequestError as `encode_conversation` does."""
        text = self.render_chat(messages, **options) + opening
        check_unicode(text, "messages")
        self._check_fits(text, most, "prompt")
        return Prompt(text, special, special and self.spec.add_bos, messages, media)

    # ── from a prompt to its ids ─────────────────────────────────────────────────────────────

    def encode_prompt(self, prompt: Prompt) -> Placed:
        """Token ids, and what is said of media among them."""
        return self.finished(prompt, self._encode(prompt.text, prompt.special))

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """What the tokenizer makes of each, in its own threads and without the interpreter's lock; `finished` makes
        ids of it. May be called in a thread."""
        made: dict[int, list[int]] = {}
        for special in (False, True):
            chosen = [index for index, prompt in enumerate(prompts) if prompt.special is special]
            texts = [prompts[index].text for index in chosen]
            encodings = self.spec.tokenizer.encode_batch_fast(texts, add_special_tokens=special) if texts else ()
            made |= {index: encoding.ids for index, encoding in zip(chosen, encodings, strict=True)}
        return [made[index] for index in range(len(prompts))]

    def encode_alike(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each; all but the first begin with nearly all of it, which is encoded once."""
        first = prompts[0]
        lossless = self._width is not None
        made = encoded(
            self.spec.tokenizer, [prompt.text for prompt in prompts], special=first.special, lossless=lossless
        )
        return [list(self.finished(prompt, ids).ids) for prompt, ids in zip(prompts, made, strict=True)]

    def finished(self, prompt: Prompt, ids: list[int], media: Sequence[Prepared] = ()) -> Placed:
        """`ids`, which the tokenizer has made of `prompt`, with what the tokenizer does not know of; of a text, `media`
        are what it has places for.

        Raises RequestError for a conversation of which nothing is left."""
        if prompt.bos and self.spec.bos_id is not None and ids[:1] != [self.spec.bos_id]:
            ids = [self.spec.bos_id, *ids]
        if prompt.messages is not None and not ids:
            raise RequestError("the chat template makes an empty prompt of the messages; say more", param="messages")
        return self.placed(ids, prompt.media or media)

    def placed(self, ids: Sequence[int], media: Sequence[Prepared]) -> Placed:
        """`ids` with `media` in their places. Raises RequestError where the model reads text alone, or there are not as
        many places."""
        if not media:
            return Placed(ids)
        if self.media is None:
            raise RequestError(
                "media came with the prompt, and the model reads text alone; send text", param="messages"
            )
        return self.media.placed(list(ids), media)

    def _check_fits(self, text: str, most: int | None, name: str) -> None:
        if most is None:
            return
        what, size = "{input}" if name == "input" else f"the {name}", counted(len(text), "character")
        if len(text) > (taken := max(MOST_CHARACTERS, CHARACTERS * most)):
            raise RequestError(
                f"{what} has {size}, and at most {taken} are tokenized at once; shorten it",
                param=name,
                code="context_length_exceeded",
                facts=THE_INPUT,
            )
        if self._width is None or len(text) <= most * self._width.most:
            return
        if (least := self._width.fewest(text)) > most:
            raise TooWide(
                f"{what} has {size}, which are at least {counted(least, 'token')}, and at most {most} are taken; "
                "shorten it",
                param=name,
                least=least,
                characters=len(text),
            )

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # A batch, even of one, is encoded without the interpreter's lock; `encode` would hold it all along.
        (encoding,) = self.spec.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """The conversation as the chat template writes it, up to where the assistant speaks; the options are those of
        ChatTemplate.render. `chat_template`, a template or the name of one of the model's, takes the place of the one
        that the model has for this. Raises RequestError as `encode_chat` does, and for media where the
        model reads text alone."""
        readable(messages, self.media)
        return self._template_for(chat_template, bool(tools)).render(messages, tools=tools, **options)

    def reasoning_open(
        self,
        start: str,
        end: str,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        tools: bool = False,
        **options: Any,
    ) -> bool | None:
        """As ChatTemplate.reasoning_open: whether the prompt ends inside of reasoning; `tools` is whether there are."""
        return self._template_for(chat_template, tools).reasoning_open(start, end, messages, **options)

    def template_variables(self, chat_template: str | None, *, tools: bool) -> frozenset[str]:
        """The variables that the template in use reads; none where there is no template."""
        if chat_template is None and not self.has_template:
            return frozenset()
        return self._template_for(chat_template, tools).variables

    def _template_for(self, chat_template: str | None, tools: bool) -> ChatTemplate:
        name = chat_template if chat_template is not None else TOOL_USE if tools else ""
        template = self._named.get(name)
        if template is None:
            template = self._template if chat_template is None else self._requested_template(chat_template)
        if template is None:
            raise RequestError(
                "the model has no chat template; send text to /v1/completions instead", code="no_chat_template"
            )
        return template

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        mended = self._byte_tokens.mended(ids)
        text: str = self.spec.tokenizer.decode(mended, skip_special_tokens=skip_special_tokens)
        return text

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary."""
        id: int | None = self.spec.tokenizer.token_to_id(token)
        return id

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
        show_marks: bool = False,
    ) -> ReplyDecoder:
        """A decoder for one reply that ends before the first of `stop` and `stop_regex` after `min_tokens` tokens, or
        with `include_stop` after it. Without `detokenize` it makes no text, and there is no stop. With `show_marks`
        the special tokens that the parsers look for are not skipped.

        Raises RequestError for an empty stop."""
        if not all(stop):
            message = "{stop} is {given}; an empty string would end every reply"
            raise RequestError(message, param="stop", facts={"given": repr(list(stop))})
        if not detokenize:
            return ReplyDecoder(NoDecoder())
        decoder = self._decoder(skip_special_tokens, show_marks)
        return ReplyDecoder(decoder, stop, stop_regex, min_tokens, include_stop)

    def _decoder(self, skip_special_tokens: bool, show_marks: bool) -> Decoder:
        skipped = frozenset() if not skip_special_tokens else self._unmarked if show_marks else self._special
        if self._byte_level:
            return ByteDecoder(self._token_bytes(skipped))
        return WindowDecoder(self.spec.tokenizer, skipped, self._byte_tokens)


class TooWide(RequestError):
    """A text has more `characters` than the allowed number of tokens can stand for: it has at least `least` tokens."""

    def __init__(self, message: str, *, param: str, least: int, characters: int) -> None:
        super().__init__(message, param=param, code="context_length_exceeded", facts=THE_INPUT)
        self.least = least
        self.characters = characters


class Width(Struct, frozen=True):
    """The most characters of a text that one token can stand for, not counting the characters `dropped`, which have no
    token."""

    most: int
    dropped: tuple[str, ...]

    def fewest(self, text: str) -> int:
        """A number of tokens that `text` has at least."""
        return -(-(len(text) - sum(map(text.count, self.dropped))) // self.most)


def width_of(tokenizer: Any) -> Width | None:
    """The width of the tokens of `tokenizer`; None if it may leave out some of a text.

    BERT's tokenizer, for example, drops spaces and accents, and makes one token of a long unknown word."""
    steps = [] if tokenizer.pre_tokenizer is None else _kinds(json.loads(tokenizer.pre_tokenizer.__getstate__()))
    composes = isinstance(tokenizer.normalizer, normalizers.NFC)
    if not (
        "ByteLevel" in steps
        and LOSSLESS.issuperset(steps)
        and (tokenizer.normalizer is None or composes)
        and tokenizer.truncation is None
        and not any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values())
    ):
        return None
    vocabulary = tokenizer.get_vocab()
    # A byte without a token is dropped. Behind a first byte come others, so of longer characters something is left.
    if any(_symbol(chr(byte)) not in vocabulary for byte in range(0x80, 0xC0)):
        return None
    dropped = tuple(chr(byte) for byte in range(0x80) if _symbol(chr(byte)) not in vocabulary)
    return Width(max(map(len, vocabulary)) * (MOST_COMPOSED if composes else 1), dropped)


def _symbol(character: str) -> str:
    """How a byte-level vocabulary writes the last byte of `character`."""
    ((symbols, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(character)
    return str(symbols[-1])


def _kinds(step: dict[str, Any]) -> list[str]:
    """The kinds of the steps that a pre-tokenizer consists of; one that leaves text out is of none that is known."""
    if step["type"] == "Sequence":
        return [kind for inner in step["pretokenizers"] for kind in _kinds(inner)]
    return ["Removed" if step.get("behavior") == "Removed" else step["type"]]
