"""bench/http/gaps.py: which times between tokens are long, and what went on meanwhile."""

from dataclasses import dataclass, field

import pytest

from bench.http.gaps import PAGE, figures_of, gaps_of, median_of


@dataclass
class Streamed:
    sent: float
    pieces: list[float] = field(default_factory=list)
    ended: float = 0.0


def every(step: float, first: float, tokens: int, *, sent: float = 0.0, late: float = 0.0) -> Streamed:
    """A token every `step` seconds from `first` on; its end comes `late`."""
    pieces = [first + step * index for index in range(tokens)]
    return Streamed(sent, pieces, pieces[-1] + late)


def test_a_gap_is_of_the_part_of_the_load_in_which_it_lies() -> None:
    early, late = every(1.0, 1.0, 8, late=0.2), every(1.0, 3.5, 6, late=0.2)
    parts = {(gap.start, gap.part) for gap in gaps_of([early, late]) if gap.start == int(gap.start)}
    # While the late one waits, until 3.5; the last gap before the end at 8.2 is over by then.
    assert parts == {(1, "prompts"), (2, "prompts"), (3, "prompts"), (4, "steady"), (5, "steady"), (6, "steady"),
                     (7, "steady")}  # fmt: skip
    assert {gap.start: gap.part for gap in gaps_of([late, early])}[7.5] == "ends"


def test_streams_one_after_another_wait_for_nobody() -> None:
    gaps = gaps_of([every(1.0, 2.0, 4, late=0.1), every(1.0, 7.0, 4, sent=5.1, late=0.1)])
    assert [gap.part for gap in gaps] == ["steady"] * 6
    assert [gap.token for gap in gaps] == [1, 2, 3] * 2


def test_waits_that_overlap_count_as_one() -> None:
    """The one that began first may end last."""
    runs, long, short = every(1.0, 1.0, 10), every(1.0, 6.2, 2), every(1.0, 2.5, 2, sent=2.0)
    prompts = [gap.start for gap in gaps_of([runs, long, short]) if gap.part == "prompts"]
    assert prompts == [1, 2, 2.5, 3, 4, 5, 6]


def test_long_gaps_are_counted_by_part_and_by_index() -> None:
    """Of two streams that began together, each 16th token is late by a half."""
    pieces, now = [], 1.0
    for index in range(64):
        now += 1.5e-3 if index and not index % PAGE else 1e-3
        pieces.append(now)
    streams = [Streamed(0.0, pieces, 2.0), Streamed(0.0, pieces, 2.0)]
    gaps = gaps_of(streams)
    found = figures_of(gaps, 1.2 * median_of(gaps))
    assert (found.p50, found.p99, found.p999) == pytest.approx((1.0, 1.5, 1.5))
    assert found.long == 6 / 126
    assert found.by_index == [1.0] + [0.0] * 15
    assert list(found.parts) == ["steady"] and found.parts["steady"].long == 6 / 126
    assert found.steady == pytest.approx(1.5)
    assert [(moment.gaps, moment.token, round(moment.ms, 6)) for moment in found.moments] == [
        (2, 16, 1.5), (2, 32, 1.5), (2, 48, 1.5)
    ]  # fmt: skip
    assert found.moments[1].at == pytest.approx(31.5)


def test_replies_of_one_token_have_no_gaps() -> None:
    found = figures_of(gaps_of([every(1.0, 1.0, 1)]), 1.0)
    assert (found.p50, found.p999, found.long, found.parts, found.moments) == (0.0, 0.0, 0.0, {}, [])
    assert found.steady == 0.0
