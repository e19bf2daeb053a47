"""Seeded traffic: what is asked, and when. Pure: the same options make the same requests on every machine.

All traffic is conversations, most of them of one turn. Prompts are made of common English words, each with the
space before it one token in practically every BPE vocabulary; so lengths are near to what was asked for without
knowing the server's tokenizer, and what the server counted is what is reported.
"""

import random
from collections.abc import Iterator

from msgspec import Struct

from engine.client.options import TrafficOptions

WORDS = tuple(
    """time year people way day man thing woman life child world school state family student group country problem
    hand part place case week company system program question work government number night point home water room
    mother area money story fact month lot right study book eye job word business issue side kind head house service
    friend father power hour game line end member law car city community name president team minute idea body
    information back parent face others level office door health person art war history party result change morning
    reason research girl guy moment air teacher force education good new first last long great little own other old
    big high different small large next early young important few public bad same able river mountain letter paper
    music color light sound voice table window garden winter summer spring bread field forest stone metal glass paint
    bridge street market doctor captain engine signal report measure""".split()  # noqa: SIM905
)


class Turn(Struct, frozen=True):
    """What a client adds to the conversation so far, and how many tokens it wants back."""

    text: str
    output_len: int


Conversation = tuple[Turn, ...]


def text(length: int, rng: random.Random) -> str:
    """A text of `length` words."""
    return "".join(f" {word}" for word in rng.choices(WORDS, k=length))


def conversations(options: TrafficOptions) -> list[Conversation]:
    """The conversations of `options`: `options.requests` turns in all."""
    rng = random.Random(options.seed)

    def turn(prefix: str = "") -> Turn:
        prompt = prefix + text(_spread(options.input_len, options.range_ratio, rng), rng)
        return Turn(prompt, _spread(options.output_len, options.range_ratio, rng))

    match options.traffic:
        case "random":
            return [(turn(),) for _ in range(options.requests)]
        case "shared-prefix":
            prefixes = [text(options.prefix_len, rng) for _ in range(options.groups)]
            return [(turn(rng.choice(prefixes)),) for _ in range(options.requests)]
        case "multi-turn":
            starts = range(0, options.requests, options.turns)
            return [tuple(turn() for _ in range(min(options.turns, options.requests - start))) for start in starts]


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds after the start at which requests of a Poisson process of `rate` a second arrive."""
    rng = random.Random(f"arrivals {seed}")
    at = 0.0
    while True:
        at += rng.expovariate(rate)
        yield at


def _spread(length: int, ratio: float, rng: random.Random) -> int:
    """A length from `length` * (1 - ratio) to `length` * (1 + ratio), each as likely; at least 1."""
    return max(1, rng.randint(round(length * (1 - ratio)), round(length * (1 + ratio))))
