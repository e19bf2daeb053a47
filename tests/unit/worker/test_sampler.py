"""The sampler: its noise, its filters against naive ones, and that rows do not see each other."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from drawing import filtered, sample
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedConfig

from engine.kernels.logits.reference import gumbel
from engine.params.sampling import Sampling
from engine.worker.sampling.sampler import Columns


def columns(*rows):
    """Columns of these rows, each a dict of the fields of Sampling that matter."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    built = Columns.empty(len(rows))
    for slot, row in enumerate(rows):
        built.set(slot, Sampling(**{**off, **row}))
    return built


def drawn(logits, count, **sampling):
    """`count` draws from one row of logits, at as many positions."""
    rows = columns(*({"seed": 7, **sampling} for _ in range(count)))
    return sample(torch.tensor(logits).expand(count, -1), rows, np.arange(count))


def test_draws_follow_the_distribution():
    probabilities = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    count = 20000
    found = np.bincount(drawn(np.log(probabilities).astype(np.float32), count).numpy(), minlength=5)
    chi_square = ((found - count * probabilities) ** 2 / (count * probabilities)).sum()
    assert chi_square < 18.5  # 0.1 % of fair samples of 4 degrees of freedom are above


def test_temperature_sharpens_and_flattens():
    for temperature in (0.5, 2.0):
        found = np.bincount(drawn([math.log(3.0), 0.0], 20000, temperature=temperature).numpy())
        assert found[0] / found[1] == pytest.approx(3 ** (1 / temperature), rel=0.08)


def test_noise_is_standard_gumbel_to_the_tails():
    noise = gumbel(torch.arange(64), torch.zeros(64, dtype=torch.int64), 1 << 15).flatten().double()
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.005)
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.01)
    # P(noise > x) is about exp(-x): 2 ** 21 draws leave 95 beyond 10; and no two of the largest are equal.
    assert 60 < (noise > 10).sum() < 135
    largest = noise.topk(1000).values
    assert len(largest.unique()) > 990


def test_noise_is_a_function_of_seed_position_and_id():
    seeds, positions = torch.tensor([5, 5, 6, -3]), torch.tensor([0, 1, 0, 0])
    noise = gumbel(seeds, positions, 100)
    assert torch.equal(noise[:, :40], gumbel(seeds, positions, 40))
    assert torch.equal(noise[2:3], gumbel(seeds[2:3], positions[2:3], 100))
    correlation = np.corrcoef(gumbel(seeds, positions, 20000).numpy())
    assert np.abs(correlation - np.eye(4)).max() < 0.03


def test_splitmix64_is_the_published_one():
    from engine.kernels.logits.reference import GAMMA, _mix

    outputs = _mix(torch.arange(1, 4) * GAMMA)  # state 0
    assert [value % 2**64 for value in outputs.tolist()] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_greedy_takes_the_lowest_of_equals_and_no_noise():
    logits = torch.tensor([[0.0, 3.0, 3.0], [9.0, 1.0, 1.0]])
    assert sample(logits, columns({"temperature": 0.0}, {"temperature": 0.0}), np.zeros(2, int)).tolist() == [1, 0]
    mixed = columns({"temperature": 0.0, "top_p": 0.1}, {"temperature": 1.0})
    assert sample(logits, mixed, np.zeros(2, int))[0] == 1


def kept_naively(logits, temperature, top_k, top_p, min_p):
    """Which ids may be drawn, by the definitions, one row at a time."""
    probabilities = np.exp((logits - logits.max()) / temperature, dtype=np.float64)
    probabilities /= probabilities.sum()
    kept = np.ones(len(logits), bool)
    if top_k:
        kept &= probabilities >= np.sort(probabilities)[::-1][min(top_k, len(logits)) - 1]
    if top_p < 1:
        rest = np.where(kept, probabilities, 0)
        mass, total = 0.0, rest.sum()
        for index in np.argsort(-rest, kind="stable"):
            kept[index] &= mass < top_p * total or mass == 0
            mass += rest[index]
    kept &= probabilities >= min_p * probabilities.max()
    return set(np.flatnonzero(kept).tolist())


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 3, 1.0, 0.0),
        (1.0, 0, 0.6, 0.0),
        (1.0, 0, 1.0, 0.2),
        (0.7, 5, 0.8, 0.05),
        (2.0, 4, 0.5, 0.3),
        (1.0, 1, 1.0, 0.0),
        (1.0, 0, 1e-6, 0.0),
        (1.0, 1000, 1.0, 1.0),
    ],
)
def test_filters_keep_what_naive_ones_keep(temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(3).normal(scale=1.2, size=12).astype(np.float32)
    logits[4] = logits[9]  # equals, to be treated alike by top-k
    kept = kept_naively(logits, temperature, top_k, top_p, min_p)
    found = drawn(logits, 6000, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert set(found.tolist()) == kept


def test_top_k_keeps_ties_and_top_p_takes_the_first_of_them():
    logits = [0.0, 1.0, 1.0, -1.0, 1.0]
    assert set(drawn(logits, 300, top_k=2).tolist()) == {1, 2, 4}
    assert set(drawn(logits, 300, top_p=0.3).tolist()) == {1, 2}


def kept_ids(logits, **asked):
    """What `filtered` leaves of one row."""
    row = torch.tensor(np.asarray(logits, np.float32))[None]
    return (filtered(row, columns(asked))[0] > -torch.inf).nonzero()[:, 0].tolist()


class Warps(GenerationMixin):
    """As much of a model as transformers makes its list of warpers from."""

    config = PreTrainedConfig()


def kept_by_transformers(logits, **asked):
    """What transformers' generation leaves: its warpers, in its order, on float64."""
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **asked})
    warpers = Warps()._get_logits_processor(config, logits_processor=LogitsProcessorList())
    scores = warpers(torch.zeros(1, 0, dtype=torch.int64), torch.tensor(np.asarray(logits, np.float64))[None])
    return scores[0].isfinite().nonzero()[:, 0].tolist()


OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
CHOICES = {"temperature": (0.5, 1.0, 1.7), "top_k": (0, 1, 7, 40), "top_p": (1.0, 0.31, 0.77, 0.953),
           "min_p": (0.0, 0.03, 0.29, 0.83)}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["random", "tied"])
def test_filters_keep_what_transformers_keeps(tied):
    """Of equals at top-p's bound transformers keeps as many, though not always the first."""
    generator = np.random.default_rng(11)
    for asked in ({**OFF, **dict(zip(CHOICES, chosen, strict=True))} for chosen in product(*CHOICES.values())):
        logits = generator.normal(scale=2, size=40).astype(np.float32)
        logits = logits.round() if tied else logits
        kept, expected = kept_ids(logits, **asked), kept_by_transformers(logits, **asked)
        assert np.array_equal(np.sort(logits[kept]), np.sort(logits[expected])), asked
        assert tied or kept == expected, asked
        for value in set(logits[kept]):
            equals = np.flatnonzero(logits == value).tolist()
            assert [token for token in kept if logits[token] == value] == equals[: sum(logits[kept] == value)], asked


def test_a_sum_that_is_top_p_to_the_bit_is_enough():
    for count in range(1, 17):
        kept = kept_ids(np.zeros(16), top_p=count / 16)
        assert kept == [*range(count)] and len(kept_by_transformers(np.zeros(16), top_p=count / 16)) == count


def test_min_p_comes_after_top_p_and_may_come_before_top_k():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert kept_ids(logits, min_p=0.5) == [0, 1, 2]
    assert kept_ids(logits, top_p=0.75) == [0, 1, 2]
    assert kept_ids(logits, min_p=0.5, top_p=0.75) == [0, 1, 2]  # with min-p first 0.7 would be enough of 0.9
    assert kept_ids(logits, top_k=3, top_p=0.75) == [0, 1]  # 0.7 is enough of 0.9
    generator = np.random.default_rng(2)
    for top_k, min_p in product((1, 3, 20), (0.1, 0.6)):
        logits = generator.normal(size=30).round(1)
        both = set(kept_ids(logits, top_k=top_k)) & set(kept_ids(logits, min_p=min_p))
        assert set(kept_ids(logits, top_k=top_k, min_p=min_p)) == both


def test_a_row_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 1000, generator=generator) * 3
    rows = [
        {"seed": 1},
        {"seed": 2, "top_p": 0.9},
        {"seed": 3, "top_k": 40},
        {"seed": 4, "temperature": 0.0},
        {"seed": 5, "min_p": 0.1, "temperature": 1.7},
        {"seed": 2**63 + 11, "top_k": 7, "top_p": 0.5},
    ]
    for position in range(25):
        positions = np.full(6, position)
        together = sample(logits, columns(*rows), positions)
        for row in range(6):
            alone = sample(logits[row : row + 1], columns(rows[row]), positions[:1])
            assert together[row] == alone[0], f"row {row} at position {position}"


def test_a_tiny_temperature_is_nearly_greedy_and_not_a_nan():
    logits = [40.0, 39.0, -1e4, 12.0]
    assert set(drawn(logits, 50, temperature=1e-30, top_p=0.9).tolist()) == {0}


def test_seeds_of_any_size_are_told_apart():
    built = columns({"seed": 3}, {"seed": 2**64 - 1}, {"seed": 2**64 + 3}, {"seed": -1})
    assert built.seed.tolist() == [3, -1, 3, -1]
