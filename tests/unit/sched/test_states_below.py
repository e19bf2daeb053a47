"""States of recurrent models that move between tiers like the pages before them, on a simulated device."""

from typing import get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from test_batcher import POLICIES, request
from test_moves import AnythingMoves, TierBench

from engine.cache.tickets import WritePolicy


class AnythingMovesWithStates(AnythingMoves):
    @initialize(
        pages=st.integers(4, 20),
        page_size=st.integers(1, 3),
        slots=st.integers(1, 5),
        max_step_tokens=st.sampled_from([3, 7, 30]),
        policy=st.sampled_from(sorted(POLICIES)),
        depth=st.integers(1, 3),
        lanes=st.sampled_from([1, 1, 2]),
        host=st.sampled_from([2, 5, 12, 40, 200]),
        write=st.sampled_from(get_args(WritePolicy)),
        stores=st.sampled_from([True, True, False]),
        fetch=st.sampled_from([0.0, 1.0, 10.0]),
        cold=st.sampled_from([1, 2, 6]),
        part=st.sampled_from([1, 2, 16]),
        states=st.integers(1, 4),
    )
    def start(self, lanes, **options):
        self.bench = TierBench(**options, lanes=lanes, max_model_len=24)
        self.capacity = options["pages"] * options["page_size"]
        self.next = 0


TestAnythingMoves = AnythingMovesWithStates.TestCase
TestAnythingMoves.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def turns(bench: TierBench, texts: dict[str, list[int]], rounds: int) -> None:
    """Conversations in turn: each gets a reply, which the next turn goes on from."""
    for turn in range(rounds):
        for name, text in texts.items():
            rid = f"{name}{turn}"
            bench.admit(request(rid, text, max_new=9, seed=turn))
            while rid in bench.live:
                bench.step()
            text += [*bench.tokens[rid], 1]


@pytest.mark.parametrize("write", ["write-through", "write-back"])
def test_conversations_that_the_device_has_no_room_for_go_on_from_states_below(write: str) -> None:
    bench = TierBench(host=400, write=write, stores=False, pages=40, page_size=2, states=5, slots=2)
    texts = {name: [place % 4, *[2, 3, 1] * 5] for place, name in enumerate("abcd")}
    turns(bench, texts, 4)
    # Prompts of 36 and 46 tokens: the last state of the reply before each is at 30 and 40.
    assert [bench.cached[f"{name}{turn}"] for turn in (2, 3) for name in "abcd"] == [30] * 4 + [40] * 4
    assert bench.scheduler.tiers.counts.from_host > 100
    bench.drain()


def test_a_restarted_engine_finds_states_in_the_store() -> None:
    first = TierBench(host=400, pages=40, page_size=2, states=5, slots=2)
    texts = {name: [place % 4, *[2, 3, 1] * 5] for place, name in enumerate("abcd")}
    turns(first, texts, 3)
    while first.below.moving:
        first.finish()
    second = TierBench(host=60, pages=60, page_size=2, states=5, slots=2)
    second.below.store = first.below.store
    for name, text in texts.items():
        second.admit(request(name, text, max_new=1))
        while name in second.live:
            second.step()
    # Texts of 46 tokens; the last state is of the reply before, at 40. Of it 5 pages come beside 20 of tokens.
    assert second.cached == dict.fromkeys("abcd", 40)
    assert second.scheduler.tiers.counts.from_store == 4 * 25
    second.drain()


def test_a_state_of_which_the_store_lacks_a_page_is_not_begun_with() -> None:
    first = TierBench(host=400, pages=60, page_size=2, states=5, slots=2)
    text = [2, 3, 1] * 7
    turns(first, {"a": text}, 1)
    while first.below.moving:
        first.finish()
    names = list(first.below.store)
    for lost in names:
        bench = TierBench(host=60, pages=60, page_size=2, states=5, slots=2)
        bench.below.store = {name: page for name, page in first.below.store.items() if name != lost}
        bench.admit(request("b", text, max_new=2))
        while bench.live:
            bench.step()
        bench.scheduler.check_integrity()
        assert bench.cached["b"] in (0, 20, 26)
    assert len(names) > 20
