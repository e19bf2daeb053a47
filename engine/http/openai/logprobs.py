"""Log-probabilities on the wire, as chat completions, text completions and vLLM's prompt_logprobs word them."""

import codecs
from collections.abc import Sequence

from msgspec import UnsetType

from engine.http.wire import Reply
from engine.messages.reply import TokenLogprob


class LikelyToken(Reply, frozen=True):
    token: str
    bytes: list[int]
    logprob: float


class ChatToken(LikelyToken, frozen=True):
    """Its bytes are exact where it is only a part of a character."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(Reply, frozen=True):
    content: list[ChatToken]
    refusal: None = None


class TextLogprobs(Reply, frozen=True):
    """Of each token its text, or its bytes where it is none; the likeliest with itself among them; where it begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptToken(Reply, frozen=True):
    logprob: float
    rank: int
    decoded_token: str


# For each token of a prompt those at its place, by id, its own last; null for the first, which nothing predicts.
PromptLogprobs = list[dict[str, PromptToken] | None] | UnsetType


def chat_token(token: TokenLogprob) -> ChatToken:
    """A token of a reply as chat completions word it."""
    likeliest = [LikelyToken(one.text, list(one.bytes), _known(one)) for one in token.top]
    return ChatToken(token.text, list(token.bytes), _known(token), likeliest)


def prompt_tokens(token: TokenLogprob) -> dict[str, PromptToken] | None:
    """A token of the prompt as vLLM words it: the likeliest at its place and itself."""
    if token.logprob is None:
        return None
    others = (other for other in token.top if other.id != token.id)
    return {str(one.id): PromptToken(_known(one), one.rank, one.text) for one in (*others, token)}


def _known(token: TokenLogprob) -> float:
    assert token.logprob is not None, "only a prompt's first token has no log-probability"
    return token.logprob


class TextOffset:
    """Where in a text the next token begins, in characters."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def advance(self, token: TokenLogprob) -> int:
        """Where `token` begins: with the character that it completes, if it does not begin one."""
        before = self._at
        self._at += len(self._utf8.decode(token.bytes))
        return before


def text_logprobs(tokens: Sequence[TokenLogprob], offset: TextOffset) -> TextLogprobs:
    """Tokens as text completions word them. The likeliest are in a dictionary, a token itself among them."""
    return TextLogprobs(
        tokens=[token_name(token) for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[
            None if token.logprob is None else {token_name(one): _known(one) for one in (*token.top, token)}
            for token in tokens
        ],
        text_offset=[offset.advance(token) for token in tokens],
    )


def token_name(token: TokenLogprob) -> str:
    """A token's text, or its bytes, written as OpenAI writes them, where they are no text."""
    if "\ufffd" in token.text:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)
    return token.text
