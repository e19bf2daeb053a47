"""Sessions in the scheduler: whose pages stay, for how long, and who never has to wait for them."""

import random
from array import array

import pytest
from msgspec.structs import replace
from test_batcher import Bench, request
from test_copies import CopiesBench

from engine.cache.pins import Pins
from engine.cache.radix import RadixTree
from engine.messages.sessions import SessionUse
from engine.sched.sessions import Sessions


def prompt(number: int, tokens: int = 40) -> list[int]:
    return [number * 1000 + each for each in range(tokens)]


class Clocked(Bench):
    """A bench with a clock, on which a second passes between two requests."""

    def drain(self, steps: int = 20_000) -> None:
        """Run until every request has ended. The cache stays."""
        while self.live:
            assert self.flying or self.plan(), "requests wait, but nothing runs"
            self.step()
        while self.flying:
            self.commit()
        self.scheduler.check_integrity()

    @property
    def sessions(self) -> Sessions:
        return self.scheduler.live.sessions

    @property
    def released(self) -> int:
        return self.scheduler.counts()["pins_released_total"]

    def run(
        self, rid: str, ids: list[int], session: str | None = None, *, seconds: float = 600.0, **more: object
    ) -> int:
        """Run a request alone; how many of its tokens were cached."""
        self.begin(rid, ids, session, seconds=seconds, **more)
        self.drain()
        self.pass_time()
        return self.cached[rid]

    def begin(
        self,
        rid: str,
        ids: list[int],
        session: str | None,
        *,
        owner: bytes = b"",
        seconds: float = 600.0,
        **more: object,
    ) -> None:
        use = None if session is None else SessionUse(owner, session, seconds)
        self.admit(replace(request(rid, ids, **more), session=use))

    def pass_time(self, seconds: float = 1.0) -> None:
        self.now += seconds
        self.sessions.count(self.now)

    def kept(self, owner: bytes = b"", salt: bytes = b"") -> dict[str, int]:
        """The pages of each session."""
        return {each.id: each.pages for each in self.sessions.of(owner, salt, self.now)}


@pytest.fixture
def bench() -> Clocked:
    return Clocked(pages=64, page_size=4)


def test_a_session_outlives_what_was_used_later(bench: Clocked) -> None:
    bench.run("a", prompt(1), "mine")
    bench.run("b", prompt(2))
    for number in range(10, 30):
        bench.run(f"other-{number}", prompt(number))
    assert bench.kept() == {"mine": 10}
    assert bench.run("b again", prompt(2)) == 0
    assert bench.run("a again", prompt(1)) == 36
    assert bench.released == 0


def test_a_conversation_grows(bench: Clocked) -> None:
    ids = prompt(1)
    for turn in range(3):
        cached = bench.run(f"turn-{turn}", ids, "mine")
        assert cached == ((len(ids) - 5) // 4 * 4 if turn else 0)
        ids = ids + bench.tokens[f"turn-{turn}"] + prompt(2 + turn, 4)
    assert bench.kept() == {"mine": 14} and bench.sessions.pages == 14


def test_where_pages_run_short_the_session_used_longest_ago_loses_its_own(bench: Clocked) -> None:
    for name in ("first", "second", "third"):
        bench.run(name, prompt(ord(name[0]), 60), name)
    bench.run("first again", prompt(ord("f"), 60), "first")
    assert bench.run("large", prompt(99, 132)) == 0
    assert bench.ends["large"] == "length"
    bench.pass_time()
    kept = bench.kept()
    assert kept["second"] == 0 and kept["third"] == kept["first"] == 15
    assert bench.released == 1 and bench.sessions.pages == 30


def test_sessions_never_stand_in_the_way(bench: Clocked) -> None:
    """All pages are of sessions, and requests run as if they were not there."""
    for number in range(6):
        bench.run(f"s{number}", prompt(number, 40), f"s{number}")
    for number in range(3):
        bench.begin(f"r{number}", prompt(50 + number, 60), None, max_new=20)
    bench.drain()
    assert bench.scheduler.counts()["retractions_total"] == 0
    assert all(len(bench.tokens[f"r{number}"]) == 20 for number in range(3))
    bench.pass_time()
    assert bench.released >= 4


def test_a_session_ends_with_its_time(bench: Clocked) -> None:
    bench.run("a", prompt(1), "mine", seconds=10.0)
    bench.pass_time(8.0)
    assert bench.kept() == {"mine": 10}
    bench.run("b", prompt(1), "mine", seconds=10.0)  # its time begins anew
    bench.pass_time(8.0)
    assert bench.kept() == {"mine": 10}
    bench.pass_time(2.0)
    assert bench.kept() == {} and bench.sessions.pages == 0 and len(bench.sessions) == 0
    assert bench.released == 0


def test_a_session_lives_while_its_request_runs(bench: Clocked) -> None:
    bench.begin("a", prompt(1), "mine", seconds=2.0)
    bench.plan()
    (told,) = bench.sessions.of(b"", b"", bench.now)
    assert (told.id, told.running, told.pages) == ("mine", 1, 0)
    bench.pass_time(100.0)
    assert bench.kept() == {"mine": 0}
    bench.plan()
    bench.drain()
    (told,) = bench.sessions.of(b"", b"", bench.now)
    assert (told.running, told.pages, told.idle, told.left) == (0, 10, 0.0, 2.0)


def test_a_session_that_is_ended_keeps_nothing_even_of_a_request_that_runs(bench: Clocked) -> None:
    bench.run("a", prompt(1), "mine")
    bench.begin("b", prompt(2), "mine")
    bench.plan()
    assert bench.sessions.end(b"", b"", "mine", bench.now)
    assert not bench.sessions.end(b"", b"", "mine", bench.now)
    bench.drain()
    assert bench.kept() == {}
    for number in range(10, 20):
        bench.run(f"other-{number}", prompt(number))
    assert bench.run("a again", prompt(1)) == 0


def test_owner_and_salt_are_parts_of_the_name(bench: Clocked) -> None:
    bench.begin("a", prompt(1), "x", owner=b"alice")
    bench.begin("b", prompt(2), "x", owner=b"bob")
    bench.begin("c", prompt(3), "x", owner=b"bob", salt="s")
    bench.drain()
    assert bench.kept(b"alice") == bench.kept(b"bob") == bench.kept(b"bob", b"s") == {"x": 10}
    assert bench.kept() == bench.kept(b"alice", b"s") == {}
    assert not bench.sessions.end(b"alice", b"s", "x", bench.now)
    assert bench.sessions.end(b"bob", b"", "x", bench.now)
    assert (bench.kept(b"alice"), bench.kept(b"bob"), bench.kept(b"bob", b"s")) == ({"x": 10}, {}, {"x": 10})


def test_only_so_many_sessions_live() -> None:
    sessions, tree = Sessions(most=2), RadixTree(1)
    pins = Pins(tree)
    for number in range(4):
        root, _ = tree.match(b"")
        node, _ = tree.extend(root, array("i", [number]).tobytes(), [number])
        tree.unlock(node)
        sessions.leave(sessions.begin(SessionUse(b"", str(number), 9.0), b"", number), pins, node, number)
    assert [each.id for each in sessions.of(b"", b"", 4.0)] == ["3", "2"]
    assert pins.released == 2 and len(pins.nodes()) == 2


def test_a_session_has_pages_in_the_copy_where_its_last_request_ended() -> None:
    bench = CopiesBench(pages=64)
    bench.admit(*(request(f"r{number}", prompt(number), session="mine") for number in range(2)))
    bench.drain_steps()
    (told,) = bench.scheduler.live.sessions.of(b"", b"", bench.now)
    assert told.pages == 10
    assert sum(len(copy._pages.pins.nodes()) for copy in bench.scheduler.copies) == 1
    assert bench.scheduler.counts()["pins_released_total"] == 0


def test_a_device_that_lost_everything_has_no_sessions(bench: Clocked) -> None:
    bench.run("a", prompt(1), "mine")
    bench.begin("b", prompt(2), "other")
    bench.plan()
    bench.scheduler.reset()
    bench.pass_time()
    assert bench.kept() == {} and bench.sessions.pages == 0


def test_flushing_takes_the_pages_of_sessions_too(bench: Clocked) -> None:
    bench.run("a", prompt(1), "mine")
    assert bench.scheduler.flush() == (10, 0)
    assert bench.kept() == {"mine": 0}


def test_retracted_requests_are_of_their_session_once(bench: Clocked) -> None:
    for number in range(4):
        bench.begin(f"r{number}", prompt(number, 40), "mine", max_new=60)
    bench.drain()
    assert bench.scheduler.counts()["retractions_total"] > 0
    (told,) = bench.sessions.of(b"", b"", bench.now)
    assert told.running == 0


@pytest.mark.parametrize("seed", range(5))
def test_random_sessions_change_no_reply(seed: int) -> None:
    """The bench checks each token, and its last `drain` that nothing leaked."""
    choose, bench = random.Random(seed), Clocked(pages=48, page_size=2, slots=4)
    for number in range(60):
        stem = prompt(choose.randrange(3), choose.randrange(1, 30))
        session = choose.choice([None, "a", "b", "c", "d"])
        bench.begin(
            f"r{number}", stem + prompt(number, choose.randrange(1, 8)), session, seconds=choose.choice([1, 50])
        )
        for _ in range(choose.randrange(4)):
            bench.step()
        if choose.random() < 0.3:
            bench.pass_time()
        if choose.random() < 0.1:
            bench.sessions.end(b"", b"", choose.choice("abcd"), bench.now)
    bench.drain()
    bench.pass_time()
    assert all(each.running == 0 for each in bench.sessions.of(b"", b"", bench.now))
    Bench.drain(bench)
