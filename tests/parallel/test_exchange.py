"""Tokens that differ by rank go to their experts over gloo and come back: as one rank computes them, however uneven."""

from collections.abc import Iterator

import pytest
import torch
from exchanged import EXPERTS, OPS, PLACEMENTS, case, exchanged

from engine.kernels.experts.reference import Routed
from engine.parallel.exchange import Exchange, places_of
from engine.parallel.groups import Groups
from engine.parallel.mesh import ALONE
from engine.parallel.placement import whole_table
from engine.testing.ranks import Ranks, open_ranks

COUNTS = {"uneven": (5, 9, 1), "an idle rank": (4, 0, 3), "one has all": (0, 6, 0), "nobody has any": (0, 0, 0)}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with open_ranks(tmp_path_factory.mktemp("three"), tp=3, ep=3) as opened:
        yield opened


def assert_as_one(ranks: Ranks, counts: tuple[int, ...], chosen: str, most: int | None) -> None:
    hidden, routed, weights = case(counts, chosen)
    wanted = OPS.experts(hidden, routed, weights).split(counts)
    parts = ranks.run(exchanged, counts, chosen, most, False)
    for rank, ((got, came, chose), expected) in enumerate(zip(parts, wanted, strict=True)):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        if most is not None:
            assert came == [most] * len(counts)
            continue
        assert sum(came) == chose, "no more travels than chooses an expert there"
        assert all(one <= there for one, there in zip(came, counts, strict=True))
        if chosen == "all to one rank":
            busy = next(place for place, line in enumerate(PLACEMENTS[len(counts)]) if 4 in line and 5 in line)
            assert came == (list(counts) if rank == busy else [0] * len(counts)), "each token once, for both experts"


@pytest.mark.parametrize("chosen", ["by chance", "all to one rank", "some are padding"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("most", [None, 9], ids=["counts", "fixed places"])
def test_results_are_those_of_one_rank(most: int | None, counts: tuple[int, ...], chosen: str, two: Ranks) -> None:
    assert_as_one(two, counts[:2], chosen, most)


@pytest.mark.matrix
@pytest.mark.parametrize("chosen", ["by chance", "all to one rank", "some are padding"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("most", [None, 9], ids=["counts", "fixed places"])
def test_results_of_three_ranks(most: int | None, counts: tuple[int, ...], chosen: str, three: Ranks) -> None:
    assert_as_one(three, counts, chosen, most)


@pytest.mark.parametrize("most", [None, 9], ids=["counts", "fixed places"])
def test_hidden_states_that_travel_as_fp8(most: int | None, two: Ranks) -> None:
    """Rounded by 1/16 at most, hence results by a few percent."""
    counts = COUNTS["uneven"][:2]
    wanted = OPS.experts(*case(counts, "by chance")).split(counts)
    for (got, _, _), expected in zip(two.run(exchanged, counts, "by chance", most, True), wanted, strict=True):
        error = (got - expected).norm() / expected.norm()
        assert 1e-3 < error < 0.05


def test_copies_of_an_expert_take_turns() -> None:
    table = torch.from_numpy(whole_table(PLACEMENTS[3], EXPERTS, 3))
    assert table[0].tolist() == [3, 0, 5, 8] and table[6].tolist()[:2] == [1, 2]
    experts = torch.tensor([[0, 6], [0, -1], [0, 5], [0, 0]])
    assert places_of(table, experts).tolist() == [[0, 2], [5, -1], [8, 7], [0, 0]]
    assert places_of(table, experts, first=1)[:, 0].tolist() == [5, 8, 0, 5]


def test_more_tokens_than_places_are_our_bug() -> None:
    exchange = Exchange(Groups.apart(ALONE).along("ep"), 2)
    with pytest.raises(AssertionError, match="places for 2 tokens are too few for 3"):
        exchange.dispatch(torch.zeros(3, 4), torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.int64), 2)


def test_one_rank_alone_sends_nothing() -> None:
    hidden, routed, weights = case((6,), "by chance")
    exchange = Exchange(Groups.apart(ALONE).along("ep"), EXPERTS)
    for most in (None, 8):
        arrived = exchange.dispatch(hidden, routed.weights, routed.experts, most)
        made = OPS.experts(arrived.hidden, Routed(arrived.weights, arrived.experts), weights)
        torch.testing.assert_close(exchange.combine(made, arrived.way, 6), OPS.experts(hidden, routed, weights))
