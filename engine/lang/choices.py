"""How a choice is made: log-probabilities of the tokens of each text that it may be, and the index of the best.

`select` of SGLang has the same three methods. Pure logic. Left out: how the log-probabilities are had
(engine/runtime/choices.py).
"""

from collections.abc import Callable, Sequence
from statistics import fmean

from msgspec import Struct

from engine.runtime.choices import Scores


class ChoicesMethod(Struct, frozen=True):
    """A way to choose. `best` is the index of the best of some scores; the first of equals wins. `needs_alone` says
    that it looks at the log-probabilities without the prompt."""

    name: str
    best: Callable[[Sequence[Scores]], int]
    needs_alone: bool = False


def _likeliest_mean(scores: Sequence[Scores]) -> int:
    return _first_best([each.mean for each in scores])


def _greedy(scores: Sequence[Scores]) -> int:
    """Token by token those with the likeliest token stay; one that is at its end goes on with its mean."""
    left = list(range(len(scores)))
    for place in range(max(len(each.logprobs) for each in scores)):
        here = {index: _at(scores[index], place) for index in left}
        best = max(here.values())
        left = [index for index in left if here[index] == best]
    return left[0]


def _at(scores: Scores, place: int) -> float:
    return scores.logprobs[place] if place < len(scores.logprobs) else scores.mean


def _gains_most(scores: Sequence[Scores]) -> int:
    """The one that the prompt makes likelier by most, as a mean over its tokens."""
    gains = []
    for each in scores:
        assert each.alone is not None, "the method asks for them"
        gains.append(fmean(with_ - without for with_, without in zip(each.logprobs, each.alone, strict=True)))
    return _first_best(gains)


def _first_best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


token_length_normalized = ChoicesMethod("token_length_normalized", _likeliest_mean)
greedy_token_selection = ChoicesMethod("greedy_token_selection", _greedy)
unconditional_likelihood_normalized = ChoicesMethod("unconditional_likelihood_normalized", _gains_most, True)
METHODS = (token_length_normalized, greedy_token_selection, unconditional_likelihood_normalized)
