"""Log-probabilities on the wire, as chat completions, text completions and vLLM's prompt_logprobs word them."""

import codecs
from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from engine.http.wire import Reply
from engine.messages.reply import TokenLogprob


class Place(Reply, frozen=True, kw_only=True):
    """Which token it is, and its rank among all of the vocabulary: with return_token_ids; an extension."""

    id: int | UnsetType = UNSET
    rank: int | UnsetType = UNSET


class LikelyToken(Place, frozen=True):
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
    """Of each token its text, or its bytes where it is none; the likeliest with itself among them; where it begins.

    With return_token_ids `content` has those of the reply as chats have them: two tokens may have one text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    content: list[ChatToken] | UnsetType = UNSET


class PromptToken(Reply, frozen=True):
    """Its bytes are told with return_token_ids."""

    logprob: float
    rank: int
    decoded_token: str
    bytes: list[int] | UnsetType = UNSET


# For each token of a prompt those at its place, by id, its own last; null for the first, which nothing predicts.
PromptLogprobs = list[dict[str, PromptToken] | None] | UnsetType


def chat_token(token: TokenLogprob, *, ids: bool = False) -> ChatToken:
    """A token of a reply as chat completions word it, with `ids` its id and rank too."""

    def place(one: TokenLogprob) -> dict[str, int]:
        return {"id": one.id, "rank": one.rank} if ids else {}

    likeliest = [LikelyToken(one.text, list(one.bytes), _known(one), **place(one)) for one in token.top]
    return ChatToken(token.text, list(token.bytes), _known(token), likeliest, **place(token))


def prompt_tokens(token: TokenLogprob, *, ids: bool = False) -> dict[str, PromptToken] | None:
    """A token of the prompt as vLLM words it: the likeliest at its place and itself; with `ids` their bytes too."""
    if token.logprob is None:
        return None
    others = (other for other in token.top if other.id != token.id)
    return {
        str(one.id): PromptToken(_known(one), one.rank, one.text, list(one.bytes) if ids else UNSET)
        for one in (*others, token)
    }


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
