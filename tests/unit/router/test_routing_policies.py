"""The built-in routing policies, decision by decision; each complaint of users of other routers has its test.

Ratios to round robin are in test_route_simulation.py."""

import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.conversation.canonical import BLOCK, chained
from engine.plugin.registry import Plugins, resolve
from engine.plugin.routing import Arrival, Choice, RoutingPolicy, View

NAMES = ("cache_aware", "least_load", "power_of_two", "random", "round_robin")


def made(name: str) -> RoutingPolicy:
    policy: RoutingPolicy = resolve(Plugins.load().entries("routing")[name].target)()
    return policy


def views(*running: int) -> list[View]:
    return [View(f"w{number}", count, 0, 256) for number, count in enumerate(running)]


def text(name: str, blocks: int) -> str:
    """So many blocks that nothing of another name has."""
    return random.Random(name).randbytes(blocks * BLOCK // 2).hex()


def ask(name: str = "", blocks: int = 0, own: str = "", program: str = "") -> Arrival:
    """A prompt that begins with `blocks` blocks of `name` and ends with 8 of `own`."""
    return Arrival("m", text(name, blocks) + (text(own, 8) if own else ""), program=program)


def send(policy: RoutingPolicy, arrival: Arrival, workers: Sequence[View]) -> Choice:
    """Choose, and follow the choice."""
    choice = policy.choose(arrival, workers)
    policy.sent(arrival, workers[choice.worker].name)
    return choice


# ── plugins ──────────────────────────────────────────────────────────────────────────────────


def test_the_built_in_policies_are_plugins() -> None:
    assert set(NAMES) <= set(Plugins.load().entries("routing"))
    rows = {row.name: row for row in Plugins.load().listing() if row.kind == "routing"}
    assert rows["cache_aware"].hooks == ("register_routing",) and rows["cache_aware"].description


def test_a_third_party_adds_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "last_worker", raising=False)
    source = """
    from engine.plugin import hookimpl
    from engine.plugin.routing import Choice, RoutingPolicy

    @hookimpl
    def register_routing(register):
        register("last_worker", "last_worker:Last")

    class Last(RoutingPolicy):
        def choose(self, arrival, workers):
            return Choice(len(workers) - 1, 0, "the last one")
    """
    path = tmp_path / "last_worker.py"
    path.write_text("\n".join(line[4:] for line in source.splitlines()))
    plugins = Plugins.load([str(path)])
    assert ("routing", "last_worker") in plugins.named
    policy = resolve(plugins.entries("routing")["last_worker"].target)()
    assert policy.choose(ask("a", 1), views(0, 0, 0)).worker == 2
    policy.stored("w0", b"", [1])  # what it does not write does nothing
    assert not policy.tidy(1.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_is_one_of_the_workers_and_changes_nothing(name: str) -> None:
    policy, workers = made(name), views(3, 1, 2)
    for number in range(20):
        arrival = ask(f"{number % 3}", 4)
        for _ in range(3):
            choice = policy.choose(arrival, workers)
            assert 0 <= choice.worker < 3 and choice.reason
        if name not in ("random", "power_of_two"):
            assert policy.choose(arrival, workers) == choice
        policy.sent(arrival, workers[choice.worker].name)
        policy.answered(arrival, workers[choice.worker].name, None)
        assert policy.choose(arrival, workers[:1]).worker == 0


def test_policies_that_look_at_workers_alone() -> None:
    turns, least = made("round_robin"), made("least_load")
    assert [send(turns, ask("a", 1), views(9, 0, 0)).worker for _ in range(4)] == [0, 1, 2, 0]
    assert least.choose(ask("a", 1), views(2, 1, 3)).worker == 1
    assert sorted(send(least, ask("a", 1), views(1, 1, 1)).worker for _ in range(3)) == [0, 1, 2]
    busy = [View("a", 1, 900, 256), View("b", 1, 100, 256)]
    assert least.choose(ask("a", 1), busy).worker == 1
    waits = [View("a", 2, 9000, 256), View("b", 3, 0, 256)]
    assert least.choose(ask("a", 1), waits).worker == made("power_of_two").choose(ask("a", 1), waits).worker == 1
    assert least.choose(ask("a", 1), [View("a", 9, 100, 256), View("b", 1, 120, 256)]).worker == 1
    anywhere, less = made("random"), made("power_of_two")
    chosen = Counter(anywhere.choose(ask("a", 1), views(0, 0, 0, 0)).worker for _ in range(400))
    assert set(chosen) == {0, 1, 2, 3}
    chosen = Counter(less.choose(ask("a", 1), views(0, 5, 5, 9)).worker for _ in range(400))
    assert chosen[3] == 0 and chosen[0] > 120, "the most loaded of all is never the less loaded of two"


# ── where it is cached ───────────────────────────────────────────────────────────────────────


def test_the_longest_match_wins_near_the_least_load() -> None:
    policy = made("cache_aware")
    policy.sent(ask("a", 40), "w1")
    policy.sent(ask("a", 20), "w2")
    choice = policy.choose(ask("a", 40), views(0, 1, 0))
    assert (choice.worker, choice.matched) == (1, 40 * BLOCK)
    assert policy.choose(Arrival("m", text("a", 40), space=b"other"), views(5, 5, 0)).matched == 0
    policy.sent(ask("b", 2), "w1")
    assert policy.choose(ask("b", 2, own="x"), views(50, 52, 50)).worker == 1, "two of ten blocks"


def test_affinity_survives_a_short_imbalance() -> None:
    """48 blocks of 56 are worth most of a mean load more; not several times as much."""
    policy = made("cache_aware")
    policy.sent(ask("a", 48), "w1")
    assert policy.choose(ask("a", 48, own="x"), views(10, 17, 10)).worker == 1
    assert policy.choose(ask("a", 48, own="x"), views(10, 60, 10)).worker != 1
    policy.sent(ask("b", 2), "w1")
    assert policy.choose(ask("b", 2, own="x"), views(10, 17, 10)).worker != 1, "two blocks of ten are not"


def test_prompts_that_wait_count_until_their_first_token() -> None:
    """In lengths of the prompt at hand: in full on a miss, and a quarter against a match."""
    policy = made("cache_aware")
    workers = views(20, 30, 20)
    workers[0].waiting_chars = workers[2].waiting_chars = 8 * BLOCK
    assert policy.choose(ask("new", 8), workers).worker == 1, "half more requests are less than a prompt to wait for"
    workers[0].waiting_chars = workers[2].waiting_chars = 0
    assert policy.choose(ask("new", 8), workers).worker != 1
    policy.sent(ask("a", 40), "w0")
    for lengths, worker in ((0.0, 0), (3.0, 0), (5.0, 1)):
        workers = views(20, 20, 90)
        workers[0].waiting_chars = int(lengths * 40 * BLOCK)
        assert policy.choose(ask("a", 40), workers).worker == worker


def test_a_program_stays_while_its_worker_is_about_as_loaded_as_others() -> None:
    policy = made("cache_aware")
    policy.sent(ask("start", 4, program="p"), "w2")
    assert policy.choose(ask("all new", 30, program="p"), views(10, 10, 11)).worker == 2
    assert policy.choose(ask("all new", 30, program="p"), views(10, 9, 20)).worker == 1
    assert policy.choose(ask("all new", 30, program="other"), views(10, 9, 11)).worker == 1
    policy.removed("w2")
    assert policy.choose(ask("all new", 30, program="p"), views(10, 9)).worker == 1


def test_what_workers_tell_is_exact_to_a_block() -> None:
    policy = made("cache_aware")
    arrival = ask("a", 40)
    policy.stored("w1", b"", chained(arrival.text)[:30])
    assert policy.choose(arrival, views(0, 0)) == Choice(
        1, 30 * BLOCK, "score 0.75, 75% of the prompt is there, 75% at most"
    )
    policy.evicted("w1", chained(arrival.text)[17:30])
    assert policy.choose(arrival, views(0, 0)).matched == 17 * BLOCK
    policy.reset("w1")
    assert policy.choose(arrival, views(0, 0)).matched == 0


def test_a_request_that_is_never_answered_leaves_nothing_behind() -> None:
    """It fails, or another router has sent it."""
    policy = made("cache_aware")
    policy.stored("w1", b"", [1])
    policy.sent(ask("a", 40), "w1")  # nobody keeps it
    assert policy.choose(ask("a", 40), views(0, 0)).matched == 0
    kept = ask("a", 40)
    policy.sent(kept, "w1")
    assert policy.choose(ask("a", 40), views(0, 0)).matched == 40 * BLOCK
    policy.answered(kept, "w1", None)
    for _ in range(2):  # it may tell a little later what it holds
        assert policy.choose(ask("a", 40), views(0, 0)).matched == 40 * BLOCK
        policy.tidy(0.0)
    policy.tidy(0.0)
    assert policy.choose(ask("a", 40), views(0, 0)).matched == 0
    policy.removed("w1")
    policy.answered(kept, "w1", 0.5)
    policy.sent(kept, "w0")
    policy.sent(kept, "w0")
    del kept
    assert not policy._open


def test_the_share_that_was_cached_corrects_what_was_thought() -> None:
    """Of a worker that did not have what it was thought to have, what is as old is forgotten, and less is kept."""
    for cached, kept in ((0.0, False), (1.0, True)):
        policy = made("cache_aware")
        old, arrival = ask("old", 40), ask("a", 40)
        policy.sent(old, "w0")
        for number in range(4):
            policy.sent(arrival, "w0")
            policy.answered(arrival, "w0", cached if number else 0.0)  # of the first one nothing was expected
            while policy.tidy(1.0):
                pass
        assert (policy.choose(old, views(0, 0)).matched > 0) is kept
        assert policy.choose(arrival, views(0, 0)).matched == 40 * BLOCK, "it was sent there last"


def test_each_worker_has_its_turn_where_little_else_tells_them_apart() -> None:
    policy, arrival = made("cache_aware"), ask("a", 40)
    for name in ("w1", "w2", "w0"):
        policy.sent(arrival, name)
    assert policy.choose(arrival, views(19, 20, 20)).worker == 1, "it got the last request longest ago"
    assert policy.choose(arrival, views(14, 20, 20)).worker == 0, "a load that differs counts for more"
    policy.sent(ask("b", 40), "w0")
    assert policy.choose(ask("b", 40), views(20, 20, 20)).worker == 0, "and so does a match"


# ── the seven complaints ─────────────────────────────────────────────────────────────────────


def test_i_an_overloaded_worker_takes_affinity_from_nobody_else() -> None:
    policy = made("cache_aware")
    for number in range(4):
        policy.sent(ask(f"group {number}", 40), f"w{number}")
    workers = views(90, 10, 10, 10)
    for number in (1, 2, 3):
        assert policy.choose(ask(f"group {number}", 40, own="x"), workers).worker == number
    assert policy.choose(ask("group 0", 40, own="x"), workers).worker != 0


def test_ii_a_miss_goes_by_load_and_not_to_the_worker_that_holds_the_least() -> None:
    policy = made("cache_aware")
    for number in range(50):
        policy.sent(ask(f"{number}", 20), "w0")
    chosen = Counter(send(policy, ask(f"new {number}", 20), views(5, 5, 5)).worker for number in range(30))
    assert chosen == {0: 10, 1: 10, 2: 10}
    assert policy.choose(ask("one more", 20), views(4, 5, 5)).worker == 0


@pytest.mark.parametrize("tells", [True, False])
def test_iii_a_session_leaves_a_worker_that_thrashes(tells: bool) -> None:
    """Whether it tells what it dropped, or only that nothing was cached."""
    policy = resolve(Plugins.load().entries("routing")["cache_aware"].target)()
    policy.bound(4000 * BLOCK)
    turns = [ask("session", 100 + number, program="s") for number in range(8)]
    chosen = []
    for turn in turns:
        chosen.append(policy.choose(turn, views(12, 8)).worker)
        policy.sent(turn, "w0")
        if tells:
            policy.stored("w0", b"", chained(turn.text))
        policy.answered(turn, "w0", 0.0)
        for number in range(15):  # what others send there meanwhile
            policy.sent(ask(f"{len(turn.text)} {number}", 100), "w0")
            while policy.tidy(1.0):
                pass
        if tells and len(chosen) > 3:
            policy.evicted("w0", chained(turn.text))
    assert chosen[:4] == [1, 0, 0, 0], "it stays while it is thought to have its cache there"
    assert chosen[-1] == 1


def test_iv_a_prefix_that_everybody_asks_for_spreads() -> None:
    policy, workers = made("cache_aware"), views(0, 0, 0, 0)
    for number in range(200):
        workers[send(policy, ask("for all", 100, own=f"{number}"), workers).worker].running += 1
    assert max(worker.running for worker in workers) <= 1.1 * 200 / 4


def test_v_conversations_that_begin_alike_go_where_their_later_messages_are() -> None:
    policy = made("cache_aware")
    for number in range(4):
        policy.sent(Arrival("m", text("system prompt", 50) + text(f"user {number}", 10)), f"w{number}")
    for number in range(4):
        longer = Arrival("m", text("system prompt", 50) + text(f"user {number}", 10) + text("more", 3))
        assert policy.choose(longer, views(3, 3, 3, 3)).worker == number


def test_vi_a_worker_that_was_out_for_a_moment_is_known_as_before() -> None:
    """What a policy knows does not follow from who may take a request now; loads are the proxy's."""
    policy = made("cache_aware")
    policy.sent(ask("a", 40), "w1")
    for _ in range(3):
        assert policy.choose(ask("a", 40, own="x"), [views(0, 0, 0)[0], views(0, 0, 0)[2]]).matched == 0
    assert policy.choose(ask("a", 40, own="x"), views(0, 0, 0)).worker == 1


def test_vii_what_is_never_read_again_is_forgotten() -> None:
    policy = resolve(Plugins.load().entries("routing")["cache_aware"].target)()
    policy.bound(500 * BLOCK)
    sizes = []
    for number in range(1500):
        policy.sent(ask(f"{number}", 20), f"w{number % 2}")
        policy.tidy(0.0)
        sizes.append(len(policy.index))
    assert 500 < max(sizes) <= 1500
    assert max(sizes[1000:]) <= max(sizes[:500]), "it does not grow"
