"""Log-probabilities in a server's reply, as programs read them: of a chat, of a text completion, of a prompt.

    chat        {"content": [{"token", "bytes", "logprob", "top_logprobs": [...]}]}        ids and ranks from ours alone
    completion  {"tokens": [...], "token_logprobs": [...], "top_logprobs": [{text: logprob}]}      `content` is better
    prompt      [null, {id: {"logprob", "rank", "decoded_token"}}]            itself last, and once; from ours alone

Left out: asking for them (server.py).
"""

from collections.abc import Iterator, Mapping, Sequence

import msgspec
from msgspec import Struct

from engine.lang.values import ScoredToken

BYTES = "bytes:"  # how the name of a token begins that is no text


class Likely(Struct, frozen=True):
    """A token of a chat's reply."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    id: int | None = None
    rank: int | None = None
    top_logprobs: "list[Likely]" = []

    def scored(self, rank: int | None = None) -> ScoredToken:
        """As programs see it; `rank` is what its place says."""
        top = tuple(each.scored(place) for place, each in enumerate(self.top_logprobs, 1))
        data = self.token.encode() if self.bytes is None else bytes(self.bytes)
        found = self.rank or rank or place_of(self.token, data, top)
        return ScoredToken(self.token, data, self.logprob, self.id, found, top)


class Logprobs(Struct, frozen=True):
    """Of a reply, in either format."""

    content: list[Likely] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class PromptToken(Struct, frozen=True):
    """A token of a prompt, or one that is likely in its place."""

    logprob: float
    rank: int
    decoded_token: str
    bytes: list[int]


AboutPrompt = list[dict[int, PromptToken] | None] | None


class Choice(Struct, frozen=True):
    logprobs: Logprobs | None = None
    prompt_logprobs: AboutPrompt = None


class Event(Struct, frozen=True):
    choices: list[Choice] = []
    prompt_logprobs: AboutPrompt = None


class Scored:
    """What the events of one reply have said so far; a whole reply is one event. `most` likeliest tokens were asked
    for, and as many `about` the prompt."""

    def __init__(self, most: int | None, about: int | None) -> None:
        self.tokens: list[ScoredToken] = []
        self.prompt: list[ScoredToken] = []
        self._most = most or 0
        self._about = about or 0

    def take(self, data: bytes) -> None:
        """The log-probabilities of an event."""
        event = msgspec.json.decode(data, type=Event)
        for choice in event.choices:
            if (found := choice.logprobs) is not None:
                self.tokens += self._read(found)
            for told in (event.prompt_logprobs, choice.prompt_logprobs):
                self.prompt += [prompt_token(each, self._about) for each in told or () if each is not None]

    def _read(self, found: Logprobs) -> Iterator[ScoredToken]:
        if found.content is not None:
            yield from (each.scored() for each in found.content)
            return
        tops: Sequence[Mapping[str, float] | None] = found.top_logprobs or [None] * len(found.tokens or ())
        for name, logprob, likely in zip(found.tokens or (), found.token_logprobs, tops, strict=True):
            if logprob is not None:
                yield text_token(name, logprob, likely or {}, self._most)


def text_token(name: str, logprob: float, likely: Mapping[str, float], most: int) -> ScoredToken:
    """A token of a text completion; `likely` may have itself beside the `most` likeliest."""
    best = sorted(likely.items(), key=lambda pair: -pair[1])[:most]
    top = tuple(ScoredToken(*named(text), score, None, rank) for rank, (text, score) in enumerate(best, 1))
    text, data = named(name)
    return ScoredToken(text, data, logprob, None, place_of(text, data, top), top)


def named(name: str) -> tuple[str, bytes]:
    """The text and the bytes of a token that a text completion calls `name`."""
    if not name.startswith(f"{BYTES}\\x"):
        return name, name.encode()
    data = bytes.fromhex(name.removeprefix(BYTES).replace("\\x", ""))
    return data.decode(errors="replace"), data


def place_of(text: str, data: bytes, top: Sequence[ScoredToken]) -> int | None:
    """The rank of a token, if it is among the likeliest."""
    return next((each.rank for each in top if (each.text, each.bytes) == (text, data)), None)


def prompt_token(likely: Mapping[int, PromptToken], most: int) -> ScoredToken:
    """A token of a prompt: the last of `likely`, which has it once. If it is one of the `most` likeliest, the
    others leave its place among them free."""
    *others, own = (
        ScoredToken(each.decoded_token, bytes(each.bytes), each.logprob, id, each.rank) for id, each in likely.items()
    )
    ranks = [each.rank for each in others]
    if len(others) < most:
        place = next(rank for rank in range(1, most + 1) if rank not in ranks)
        others.insert(place - 1, msgspec.structs.replace(own, rank=place))
    return msgspec.structs.replace(own, top=tuple(others))
