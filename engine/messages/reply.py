"""A reply on its way out."""

from typing import Literal

from engine.errors import RequestError
from engine.messages.base import Message, Part
from engine.messages.step import Logprobs


class Finish(Part, frozen=True):
    """Row `row` of a `Tokens` has ended; `matched` is the stop token id, where one ended it."""

    row: int
    reason: Literal["stop", "length", "abort"]
    matched: int | None = None


class Tokens(Message, frozen=True):
    """scheduler → detokenizer: the new tokens of a step; row i is `rids[i]` with `counts[i]` tokens.

    `cached` names, for rows whose first token this is, how many prompt tokens the cache held, and `prefills` the
    seconds since the request first had a place in a step. With the first token come the `prompt_logprobs`, where asked
    for: those of all prompt tokens but the first, which has none. `vectors` are float32, by row.
    """

    step: int
    rids: list[str]
    counts: bytes
    tokens: bytes
    finishes: tuple[Finish, ...] = ()
    cached: tuple[tuple[int, int], ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    prompt_logprobs: tuple[Logprobs, ...] = ()
    vectors: tuple[tuple[int, bytes], ...] = ()
    prefills: tuple[tuple[int, float], ...] = ()

    @classmethod
    def aborted(cls, rid: str, step: int = 0) -> "Tokens":
        """The last word to `rid`, which was aborted: no token."""
        return cls(step, [rid], counts=bytes(4), tokens=b"", finishes=(Finish(0, "abort"),))


class TokenLogprob(Part, frozen=True):
    """One token and its log-probability, None for the first of a prompt. `text` is its bytes as UTF-8, U+FFFD where
    they are not; `top` are the likeliest at its place, with ranks from 1."""

    id: int
    text: str
    bytes: bytes
    logprob: float | None
    rank: int = 0
    top: "tuple[TokenLogprob, ...]" = ()


class Chunk(Part, frozen=True):
    """New text and token ids of `rid`; the last chunk has a `finish` reason.

    `matched` is the stop string, the stop expression or the stop token id that ended the reply. Token counts are of
    the request so far. `ids` includes the stop token; `text` includes what stopped it only if that is asked for.
    `logprobs`, where asked for, go with `ids`; `prompt_logprobs` and `prompt_ids` (int32) come with the first token, as
    does `prefill_seconds`: from the request's first place in a step to that token.
    The one chunk of an Embed holds its `vector` (float32), unless it was aborted. `shown` is Open's.
    """

    rid: str
    text: str
    ids: list[int]
    finish: Literal["stop", "length", "abort"] | None = None
    matched: int | str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    vector: bytes = b""
    prompt_ids: bytes = b""
    prefill_seconds: float | None = None
    shown: tuple[int, int] = (0, 0)


class Failed(Message, frozen=True):
    """anyone → detokenizer: `rid` ends with an error of its own (fields as in RequestError: with `facts`,
    `message` is a template)."""

    rid: str
    status: int
    code: str
    message: str
    param: str | None = None
    facts: dict[str, str | int | float] | None = None

    @classmethod
    def of(cls, rid: str, error: RequestError) -> "Failed":
        """The message that `rid` ends with `error`."""
        facts = None if error.facts is None else dict(error.facts)
        return cls(rid, error.status, error.code, error.template, error.param, facts)

    @property
    def error(self) -> RequestError:
        """What it says, as the exception that it was."""
        return RequestError(self.message, param=self.param, code=self.code, status=self.status, facts=self.facts)
