"""Recurrent models on a simulated device: who begins behind a cached prefix has the state of exactly that."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from test_batcher import POLICIES, AnythingHappens, Bench, request


class AnythingRecurs(AnythingHappens):
    """The device checks that each row begins where the state of its slot stands, and that states in pages are whole."""

    @initialize(
        pages=st.integers(2, 24),
        page_size=st.integers(1, 4),
        slots=st.integers(1, 5),
        max_step_tokens=st.sampled_from([1, 3, 7, 30]),
        policy=st.sampled_from(sorted(POLICIES)),
        prefix_cache=st.sampled_from([True, True, True, False]),
        depth=st.integers(1, 4),
        lanes=st.sampled_from([1, 1, 1, 2, 3]),
        attention=st.sampled_from([0.0, 0.5]),
        states=st.integers(1, 4),
    )
    def start(self, lanes, **options):
        self.bench = Bench(**options, lanes=lanes, max_model_len=24)
        self.capacity = options["pages"] * options["page_size"]
        self.next = 0


TestAnything = AnythingRecurs.TestCase
TestAnything.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)


def ended(bench: Bench, *admits) -> None:
    bench.admit(*admits)
    while bench.live:
        bench.step()


def states_in(bench: Bench) -> int:
    """States that the tree has."""
    states = bench.scheduler.places.states
    return sum(states.leaf(node) is not None for node in bench.scheduler.cache.tree.nodes())


def test_a_conversation_goes_on_from_its_last_state() -> None:
    bench = Bench(pages=200, states=3)
    text = [index % 4 for index in range(41)]
    for turn in range(4):
        ended(bench, request(f"r{turn}", text, max_new=15, seed=turn))
        text += [*bench.tokens[f"r{turn}"], 1, 2, 3]
    # Prompts of 41, 59, 77 and 95 tokens: states are kept at the end of their last whole page, and then of the first
    # page of the reply that ends 6 tokens behind the last one: of the first at 40 and 48, of the second at 56, 64, 72.
    assert list(bench.cached.values()) == [0, 48, 72, 84]
    assert (bench.device.restored, states_in(bench)) == (3, 8)  # 64 has made room for 72, and 100 for 108
    bench.drain()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("max_step_tokens", [8, 50, 1000])
def test_who_shares_a_prompt_in_the_queue_begins_with_its_state(policy: str, max_step_tokens: int) -> None:
    bench = Bench(pages=200, states=2, max_step_tokens=max_step_tokens, policy=policy)
    prompt = [index % 4 for index in range(101)]
    bench.admit(*[request(f"r{index}", prompt, max_new=3, seed=index) for index in range(6)])
    bench.drain()
    assert sorted(bench.cached.values()) == [0, 100, 100, 100, 100, 100]
    assert (bench.device.restored, states_in(bench)) == (5, 0)  # none is left after the flush


def test_of_a_short_prompt_the_state_is_kept_the_second_time_and_of_its_reply_at_once() -> None:
    """So a turn costs no step more, and samples of one prompt share it from the third on."""
    bench = Bench(pages=200, states=2, max_step_tokens=1000)
    bench.scheduler.places.states.cut = 1000
    prompt = [index % 4 for index in range(101)]
    bench.admit(*[request(f"r{index}", prompt, max_new=9, seed=index) for index in range(6)])
    bench.drain_steps()
    assert sorted(bench.cached.values()) == [0, 0, 100, 100, 100, 100]
    ended(bench, request("next", [*prompt, *bench.tokens["r0"], 1, 1], max_new=1))
    assert bench.cached["next"] == 104
    bench.drain()


def test_the_state_where_texts_part_is_kept_the_second_time() -> None:
    bench = Bench(pages=300, states=2)
    system = [0, 1, 2, 3, 3] * 8  # 40 tokens, 10 pages
    for index in range(4):
        ended(bench, request(f"r{index}", [*system, *[index] * 9], max_new=1))
    assert list(bench.cached.values()) == [0, 0, 40, 40]
    bench.drain()


def test_short_prompts_keep_no_state_and_cost_no_step() -> None:
    bench = Bench(pages=100, states=2, max_step_tokens=1000)
    bench.scheduler.places.states.least = bench.scheduler.places.states.cut = 64
    bench.admit(*[request(f"r{index}", [index % 4, *[1] * 60], max_new=1) for index in range(4)])
    assert (plan := bench.plan()) is not None and not plan.keeps and bench.plan() is None
    bench.commit()
    bench.drain()


def test_prompts_that_wait_for_their_marks_share_steps() -> None:
    bench = Bench(pages=400, states=2, max_step_tokens=200)
    bench.admit(*[request(f"r{index}", [index, *[1] * 40], max_new=1) for index in range(4)])
    assert (first := bench.plan()) is not None and len(first.slots) == 4 * 4 and not first.keeps
    assert (second := bench.plan()) is not None and len(second.slots) == 4 * 4 and len(second.keeps) == 4
    while bench.flying:
        bench.commit()
    bench.drain()


def test_a_prompt_for_which_there_is_no_room_beside_its_state_runs_without() -> None:
    bench = Bench(pages=12, states=4, page_size=2, slots=1)
    ended(bench, request("a", [0, 1, 2, 3] * 3, max_new=1))
    assert states_in(bench) == 1
    ended(bench, request("b", [*[0, 1, 2, 3] * 5, 0, 1, 2], max_new=1))
    assert bench.cached == {"a": 0, "b": 0}
    bench.drain()


def test_old_states_give_way_before_what_is_used() -> None:
    bench = Bench(pages=40, states=4, page_size=4, slots=2)
    for turn in range(12):
        ended(bench, request(f"r{turn}", [turn % 4, turn // 4, *[2] * 30], max_new=1))
        ended(bench, request(f"s{turn}", [3, 3, 3, 3] * 5, max_new=1))
    assert bench.cached["s11"] == 16 and bench.scheduler.counts()["retractions_total"] == 0
    bench.drain()


def test_a_session_pins_the_state_it_goes_on_from() -> None:
    bench = Bench(pages=40, states=4, page_size=4, slots=2)
    text = [0, 1, 2, 3] * 5
    ended(bench, request("first", text, max_new=2, session="s"))
    for turn in range(12):
        ended(bench, request(f"r{turn}", [turn % 4, turn // 4, *[2] * 30], max_new=1))
    ended(bench, request("second", [*text, *bench.tokens["first"], 3], max_new=1, session="s"))
    assert bench.cached["second"] == 16
    bench.drain()


def test_a_state_that_a_stop_id_made_untrue_is_not_kept() -> None:
    """Steps in flight go past the end of a reply: what they have kept is not of it."""
    bench = Bench(pages=2000, states=2, page_size=1, depth=5)
    bench.scheduler.places.states.interval = 1
    for seed in range(40):
        text = [seed % 4, 1, 2, 3, seed // 4 % 4]
        ended(bench, request(f"r{seed}", text, max_new=30, stop_ids=(0,), seed=seed))
        bench.scheduler.check_integrity()
        ended(bench, request(f"s{seed}", [*text, *bench.tokens[f"r{seed}"], 1, 1], max_new=1))
    bench.drain()


def test_a_state_of_which_a_page_gave_way_serves_nobody() -> None:
    bench = Bench(pages=64, states=4)
    text = [0, 1, 2, 3] * 5
    ended(bench, request("first", text, max_new=1))
    bench.scheduler.cache.evict(1)
    assert states_in(bench) == 0
    ended(bench, request("second", text, max_new=1), request("third", text, max_new=1))
    assert bench.cached == {"first": 0, "second": 0, "third": 16}
    bench.drain()


def test_two_replies_that_are_alike_keep_one_state() -> None:
    bench = Bench(pages=200, states=2)
    bench.admit(*[request(f"r{index}", [0, 1, 2, 3] * 2, max_new=30, seed=1) for index in range(3)])
    while bench.live:
        bench.step()
    assert states_in(bench) == 2  # of the prompt, and of the reply
    bench.drain()
