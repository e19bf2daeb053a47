"""Routing policies on a small simulated fleet: ratios to round robin, on a seeded clock.

The traffics are those of bench/router, on four workers with an eighth of the cache, of the users and of the groups.
`python -m bench.router.simulate` has the fleets of real size."""

import random
from collections.abc import Iterator
from functools import cache

import pytest
from msgspec.structs import replace

from bench.router.check import MEASURED, simulated
from bench.router.simulate import Figures, Fleet, policy_of, simulate
from bench.router.traffic import TRAFFICS, Session, Turn, shared, words

WORKERS = 4
KV_TOKENS = 100_000


@cache
def figures(name: str, policy: str) -> Figures:
    traffic = TRAFFICS[name]
    sessions = {"agents": 20, "thrashing": 6, "first-message": 12, "shared-prefix": 200, "flapping": 250}.get(name, 60)
    users = {"shared-prefix": 24, "agents": 12}.get(name, max(4, traffic.users // 8))
    small = replace(traffic, users=users, sessions=sessions)
    if name in ("shared-prefix", "hot-group", "flapping"):
        small.session = groups
    if name == "agents":
        small.session = conversations
    return simulate(small, policy, WORKERS, kv_tokens=KV_TOKENS, ramp=0.5)[0]


def groups(rng: random.Random, number: int, workers: int) -> Session:
    """A fifth of a worker's cache for each group, were there one more of it to each worker."""
    yield Turn(shared(f"small {rng.randrange(30 * workers)}", 2048) + words(rng, 64), words(rng, 32))


def conversations(rng: random.Random, number: int, workers: int) -> Iterator[Turn]:
    text = shared("tools", 1000) + words(rng, rng.randint(1000, 4000))
    for _ in range(12):
        reply = words(rng, rng.randint(10, 40))
        yield Turn(text, reply, rng.expovariate(4.0), f"conversation {number}")
        text += reply + words(rng, rng.randint(50, 800))


@pytest.mark.parametrize("policy", ["cache_aware", "told"])
@pytest.mark.parametrize(
    ("name", "throughput", "hits"), [("shared-prefix", 1.9, 2.4), ("agents", 1.5, 1.5), ("thrashing", 1.4, 3.0)]
)
def test_traffic_that_shares_prefixes_gains(name: str, throughput: float, hits: float, policy: str) -> None:
    base, ours = figures(name, "round_robin"), figures(name, policy)
    assert ours.requests >= throughput * base.requests
    assert ours.hits >= hits * base.hits


@pytest.mark.parametrize(
    "name", ["uniform", "hot-group", "misses", "thrashing", "one-prefix", "first-message", "flapping", "flood"]
)
def test_no_traffic_loses(name: str) -> None:
    base, ours = figures(name, "round_robin"), figures(name, "cache_aware")
    assert ours.answered == base.answered
    assert ours.requests >= 0.98 * base.requests
    assert ours.percentile(0.99) <= 1.10 * base.percentile(0.99)


def test_a_fleet_that_grows_and_shrinks_loses_no_request() -> None:
    traffic = replace(TRAFFICS["shared-prefix"], session=groups)
    for policy in ("round_robin", "cache_aware"):
        fleet = Fleet(policy_of(policy), 2, KV_TOKENS)
        for when, change, *place in ((2.0, fleet.add), (2.0, fleet.add), (6.0, fleet.drain, 0), (6.5, fleet.drain, 3)):
            fleet.at(when, change, *place)
        made = (traffic.session(random.Random(number), number, 4) for number in range(800))
        ran = fleet.run(made, 24)
        assert ran.answered == sum(ran.by_worker) == 800
        assert all(count > 20 for count in ran.by_worker)
        assert [view.running for view in fleet.views] == [view.waiting_chars for view in fleet.views] == [0] * 4


def test_runs_are_the_same_each_time() -> None:
    again = simulate(replace(TRAFFICS["uniform"], users=4, sessions=20), "cache_aware", 2, kv_tokens=KV_TOKENS)[0]
    assert (
        again == simulate(replace(TRAFFICS["uniform"], users=4, sessions=20), "cache_aware", 2, kv_tokens=KV_TOKENS)[0]
    )


def test_the_cost_model_is_near_what_was_measured() -> None:
    """Within 15%, but for steps whose rows share prefixes, which the engine reads once and the model does not."""
    throughput, prefill, *shared_prefixes = (
        here / there for here, there in zip(simulated(), MEASURED.values(), strict=True)
    )
    assert 0.85 < throughput < 1.15
    assert 0.85 < prefill < 1.15
    assert all(1.0 < ratio < 2.0 for ratio in shared_prefixes)
