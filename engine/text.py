"""Text in, text out: a model's tokenizer, with its chat template. How replies are decoded is in decoding.py.

Pure logic: it knows neither channels nor torch.
"""

from collections.abc import Sequence
from functools import cache, lru_cache, partial
from typing import Any

from tokenizers import decoders

from engine.decoding import ByteDecoder, Decoder, NoDecoder, ReplyDecoder, Spelling, TokenBytes, WindowDecoder
from engine.errors import RequestError
from engine.parsers import Parsers
from engine.plugin.parsing import ToolParser
from engine.plugin.specs import TextSpec
from engine.sampling import SamplingDefaults
from engine.template import ChatTemplate, requested

OPENAI_DEFAULTS = SamplingDefaults()
TOOL_USE = "tool_use"  # the name of the template for conversations with tools
TEMPLATES = 16  # templates of requests that are kept compiled
WORDS_KEPT = 4096  # words whose tokens the tokenizer remembers: of up to 255 bytes, and up to 8 KiB each


class Text:
    """One model's text: prompts to token ids, token ids to text.

    `chat_template` takes the place of the checkpoint's own; `parsers` are those that will read replies; `defaults` are
    the values of sampling fields that requests leave out. Raises ConfigError when the template is malformed.
    """

    def __init__(
        self,
        spec: TextSpec,
        chat_template: str | None = None,
        parsers: Parsers | None = None,
        defaults: SamplingDefaults = OPENAI_DEFAULTS,
    ) -> None:
        self.spec = spec
        self.defaults = defaults
        self.parsers = parsers = parsers or Parsers()
        if resize := getattr(spec.tokenizer.model, "_resize_cache", None):  # of a kind that keeps words
            resize(WORDS_KEPT)
        self.vocab_size: int = spec.tokenizer.get_vocab_size(with_added_tokens=True)
        self.longest_token = max(map(len, spec.tokenizer.get_vocab()), default=1)  # characters of one
        self.chat_template = source = chat_template if chat_template is not None else spec.chat_template
        syntax = (parsers.tool or ToolParser).syntax
        tokens = {"bos_token": spec.bos_token, "eos_token": spec.eos_token, **spec.special_tokens}
        marks = ({name: token for name, token in tokens.items() if token}, syntax)
        named = {} if chat_template is not None else spec.named_templates
        self._named = {name: ChatTemplate(template, *marks) for name, template in named.items()}
        self._template = None if source is None else ChatTemplate(source, *marks)
        added = spec.tokenizer.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)
        self.special_tokens = [added[id].content for id in sorted(self._special)]
        self._unmarked = frozenset(id for id in self._special if added[id].content not in parsers.special)
        self._byte_level = isinstance(spec.tokenizer.decoder, decoders.ByteLevel)
        self._token_bytes = cache(partial(TokenBytes, spec.tokenizer))  # by the special tokens that are skipped
        spelled = self._token_bytes(self._special) if self._byte_level else None
        self.spelling = Spelling(spec.tokenizer, self._special, spelled)
        self._requested_template = lru_cache(TEMPLATES)(requested(*marks))

    @property
    def has_template(self) -> bool:
        return self._template is not None or TOOL_USE in self._named

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

    def encode_chat(self, messages: list[dict[str, Any]], *, opening: str = "", **options: Any) -> list[int]:
        """Token ids of a conversation as `render_chat` writes it, and of `opening` behind it; the options are its own.

        Raises RequestError when the model has no template, or it refuses the messages."""
        text = self.render_chat(messages, **options) + opening
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
        chat_template: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """The conversation as the chat template writes it, up to where the assistant speaks; the options are those of
        ChatTemplate.render. `chat_template`, a template or the name of one of the model's, takes the place of the one
        that the model has for this. Raises RequestError as `encode_chat` does."""
        return self._template_for(chat_template, bool(tools)).render(messages, tools=tools, **options)

    def reasoning_open(
        self,
        start: str,
        end: str,
        messages: list[dict[str, Any]],
        *,
        chat_template: str | None = None,
        tools: bool = False,
        **options: Any,
    ) -> bool | None:
        """As ChatTemplate.reasoning_open: whether the prompt ends inside of reasoning; `tools` is whether there are."""
        return self._template_for(chat_template, tools).reasoning_open(start, end, messages, **options)

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
        text: str = self.spec.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
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
            raise RequestError(f"stop is {list(stop)!r}; an empty string would end every reply", param="stop")
        if not detokenize:
            return ReplyDecoder(NoDecoder())
        decoder = self._decoder(skip_special_tokens, show_marks)
        return ReplyDecoder(decoder, stop, stop_regex, min_tokens, include_stop)

    def _decoder(self, skip_special_tokens: bool, show_marks: bool) -> Decoder:
        skipped = frozenset() if not skip_special_tokens else self._unmarked if show_marks else self._special
        if self._byte_level:
            return ByteDecoder(self._token_bytes(skipped))
        return WindowDecoder(self.spec.tokenizer, skipped)


# ── prompts ──────────────────────────────────────────────────────────────────────────────────


def check_unicode(text: str, param: str) -> None:
    """Raises RequestError when `text` cannot be written as UTF-8: JSON may carry half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param} holds half of a surrogate pair, {text[error.start]!r}; send whole characters", param=param
        ) from None
