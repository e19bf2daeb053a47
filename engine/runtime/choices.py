"""Choices behind one prompt: the log-probabilities of each one's tokens, all scored together behind a cached prefix.

A token may lie across the prompt and a choice (" Par" + "is"): then the prompt's last token is not the one that the
model saw in texts, so the tokens of `prompt + choice` are compared with the prompt's, and all from the first that
differs are scored (token healing). The requests of one plan begin alike, so the device computes the prompt once. Left
out: which choice is best (engine/lang/choices.py), and what a route makes of it.
"""

from array import array
from collections.abc import Sequence
from itertools import takewhile
from statistics import fmean
from typing import Any

from msgspec import Struct

from engine.errors import RequestError
from engine.messages.media import Prepared
from engine.messages.reply import Chunk
from engine.messages.request import Generate
from engine.messages.text import Tokenized
from engine.params.sampling import SamplingParams

SCORES = SamplingParams(max_tokens=0, prompt_logprobs=0)
MOST_CHOICES = 256  # of one prompt


class Scores(Struct, frozen=True):
    """What one choice got: the ids and the log-probabilities of its tokens behind the prompt, and, where they are asked
    for, what these are without the prompt; the first of those has none, which counts as 0."""

    ids: list[int]
    logprobs: list[float]
    alone: list[float] | None = None

    @property
    def mean(self) -> float:
        """The mean log-probability of a token."""
        return fmean(self.logprobs)


class Plan(Struct, frozen=True):
    """The requests that score some choices: one for each, then, if asked for, one for each without the prompt.
    `behind` are the ids of each that are scored, and `places` the paths of what the requests score."""

    behind: list["array[int]"]
    jobs: list[Generate]
    places: Sequence[str]

    def read(self, replies: Sequence[Chunk]) -> list[Scores]:
        """The scores, from the replies to `jobs`, each joined into one chunk. Raises RequestError for one aborted."""
        if any(reply.finish == "abort" for reply in replies):
            raise RequestError("the request was aborted; send it again", code="aborted", status=409)
        told = [[token.logprob or 0.0 for token in reply.prompt_logprobs] for reply in replies]
        count = len(self.behind)
        alone = [None] * count if len(told) == count else told[count:]
        return [
            Scores(ids.tolist(), logprobs[-len(ids) :], without)
            for ids, logprobs, without in zip(self.behind, told[:count], alone, strict=True)
        ]


def planned(
    found: Tokenized,
    choices: Sequence[str],
    rid: str,
    *,
    places: Sequence[str] = (),
    alone: bool = False,
    media: tuple[Prepared, ...] = (),
    **fields: Any,
) -> Plan:
    """How to score `choices`, whose prompt and texts behind it are `found`, with one place for each of `media`;
    `fields` go with each Generate. `places` are the paths of the choices in a request, by default those in `choices`.

    Raises RequestError for a choice that adds no token."""
    places = places or [f"choices[{number}]" for number in range(len(choices))]
    before = array("i", found.ids)
    behind, jobs = [], []
    for number, (choice, packed) in enumerate(zip(choices, found.ended, strict=True)):
        ids = array("i", packed)
        start = common(before, ids)
        if start == len(ids):
            raise RequestError(
                f"the choice {choice!r} adds no token to the prompt; offer another", param=places[number]
            )
        behind.append(ids[start:])
        after = start - 1 - len(ids)  # from the end: what stands for media will have more tokens than places
        jobs.append(Generate(f"{rid}-{number}", SCORES, ids=packed, scored_after=after, media=media, **fields))
    if alone:
        jobs += [
            Generate(f"{rid}-{number}", SCORES, ids=ids.tobytes(), **fields)
            for number, ids in enumerate(behind, len(behind))
        ]
    return Plan(behind, jobs, [*places, *places] if alone else places)


def common(one: "Sequence[int]", other: "Sequence[int]") -> int:
    """How many ids both begin with."""
    if one == other[: len(one)]:  # as nearly always, and without a loop of Python's
        return len(one)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def check_choices(choices: Sequence[str], name: str = "choices") -> None:
    """Raise RequestError for none, for too many, and for an empty one."""
    if not 1 <= len(choices) <= MOST_CHOICES:
        raise RequestError(f"{name} has {len(choices)}; send from 1 to {MOST_CHOICES}", param=name)
    if (empty := next((index for index, choice in enumerate(choices) if not choice), None)) is not None:
        raise RequestError(f"{name}[{empty}] is empty; each must be a text", param=f"{name}[{empty}]")
