"""The three ways to choose, by figures that can be checked by hand."""

import pytest

from engine.lang.choices import (
    METHODS,
    ChoicesMethod,
    Scores,
    greedy_token_selection,
    token_length_normalized,
    unconditional_likelihood_normalized,
)

# Means: -1.0, -1.5, -1.2. Token by token: the second and third begin best, then the third goes on better.
SCORES = [
    Scores([1, 2], [-1.5, -0.5], [0.0, -1.0]),  # gains -1.5 and 0.5: -0.5 on average
    Scores([3, 4], [-0.5, -2.5], [0.0, -4.0]),  # gains -0.5 and 1.5: 0.5
    Scores([3, 5, 6], [-0.5, -1.0, -2.1], [0.0, -1.0, -2.1]),  # gains -0.5, 0, 0: -0.17
]


@pytest.mark.parametrize(
    ("method", "best"),
    [(token_length_normalized, 0), (greedy_token_selection, 2), (unconditional_likelihood_normalized, 1)],
)
def test_each_method_has_its_own_best(method: ChoicesMethod, best: int) -> None:
    assert method.best(SCORES) == best
    assert method.best([SCORES[best]]) == 0
    assert method.best([SCORES[best]] * 2) == 0, "the first of equals"


def test_a_choice_at_its_end_goes_on_with_its_mean() -> None:
    short, long = Scores([1], [-1.0]), Scores([1, 2], [-1.0, -1.1])
    assert greedy_token_selection.best([short, long]) == 0
    assert greedy_token_selection.best([short, Scores([1, 2], [-1.0, -0.9])]) == 1


def test_which_methods_look_at_a_choice_without_its_prompt() -> None:
    assert [method.needs_alone for method in METHODS] == [False, False, True]
