"""The index of prefixes against a plain model: for each worker, sets of the prefixes that it holds."""

import random
from array import array

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.conversation.canonical import BLOCK, chained
from engine.router.compiled_table import table
from engine.router.index import COMING, LEAST, TOLD, PrefixIndex
from engine.router.table import MARKS, Table

Path = tuple[int, ...]


def blocks_of(path: Path) -> list[int]:
    """A name for each beginning of `path`."""
    return [hash((7, *path[:end])) & (1 << 64) - 1 for end in range(1, len(path) + 1)]


def beginnings(path: Path) -> list[Path]:
    return [path[:end] for end in range(1, len(path) + 1)]


class Plain:
    """What one worker holds: `told` and `coming` if it tells, else two generations."""

    def __init__(self) -> None:
        self.tells = False
        self.young, self.old, self.told, self.coming = (set[Path]() for _ in range(4))
        self.limit = LEAST

    @property
    def held(self) -> set[Path]:
        return self.told | self.coming if self.tells else self.young | self.old

    def leading(self, path: Path, where: set[Path]) -> int:
        return next((n for n, each in enumerate(beginnings(path)) if each not in where), len(path))


paths = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)
workers = st.sampled_from(["a", "b", "c"])


class IndexMachine(RuleBasedStateMachine):
    table = Table

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(LEAST, self.table())
        self.plain: dict[str, Plain] = {}

    def of(self, worker: str) -> Plain:
        return self.plain.setdefault(worker, Plain())

    def ages(self, worker: str) -> bool:
        """Begin a new generation if its mark is free; only the index knows how far its walk has come."""
        holder = self.index._holder(worker)
        free = not self.index._table.retired(holder.bit((holder.young + 1) % MARKS))
        if free:
            plain = self.of(worker)
            plain.young, plain.old = set(), plain.young
        return free

    @rule(path=paths, worker=workers)
    def sent(self, path: Path, worker: str) -> None:
        plain = self.of(worker)
        if plain.tells:
            self.put(plain, path, plain.leading(path, plain.told), plain.coming, plain.limit)
        else:
            half = plain.limit // 2
            start = plain.leading(path, plain.young)
            fits = start == len(path) or len(plain.young) < half
            if fits or self.ages(worker):
                self.put(plain, path, start if fits else 0, plain.young, half)
        self.index.sent(blocks_of(path), worker)

    @staticmethod
    def put(plain: Plain, path: Path, start: int, into: set[Path], most: int) -> None:
        for each in beginnings(path)[start:]:
            if len(into) >= most:
                return
            into.add(each)

    @rule(seed=st.integers(0, 99), worker=workers)
    def much(self, seed: int, worker: str) -> None:
        """As much as makes a generation old."""
        rng = random.Random(seed)
        for _ in range(12):
            self.sent(tuple(rng.choices(range(3), k=rng.randint(1, 9))), worker)

    @rule(path=paths, worker=workers)
    def computed(self, path: Path, worker: str) -> None:
        plain = self.of(worker)
        for each in reversed(beginnings(path) if plain.tells else []):
            if each not in plain.coming:
                break
            plain.coming.remove(each)
        self.index.computed(blocks_of(path), worker)

    @rule(path=paths, worker=workers)
    def stored(self, path: Path, worker: str) -> None:
        plain = self.of(worker)
        if not plain.tells:
            plain.__init__()  # type: ignore[misc]
            plain.tells = True
        self.put(plain, path, 0, plain.told, plain.limit)
        self.index.stored(blocks_of(path), worker)

    @rule(worker=workers, count=st.integers(1, 5), seed=st.integers(0, 99))
    def evicted(self, worker: str, count: int, seed: int) -> None:
        """The ends of what is held, as caches drop them, and something that is not there."""
        plain, rng, gone = self.of(worker), random.Random(seed), []
        for _ in range(count if plain.tells else 0):
            ends = sorted(each for each in plain.told if not any(other[:-1] == each for other in plain.told))
            if ends:
                gone.append(rng.choice(ends))
                plain.told.remove(gone[-1])
        self.index.evicted([*(blocks_of(each)[-1] for each in gone), 12345], worker)

    @rule(worker=workers)
    def shrunk(self, worker: str) -> None:
        """A limit of LEAST stays, but a generation goes."""
        if worker in self.index._holders and not self.of(worker).tells:
            self.ages(worker)
        self.index.shrink(worker)

    @rule(worker=workers)
    def grown(self, worker: str) -> None:
        self.of(worker)
        self.index.grow(worker)

    @rule(worker=workers)
    def reset(self, worker: str) -> None:
        self.plain[worker] = Plain()
        self.index.reset(worker)

    @rule(worker=workers)
    def removed(self, worker: str) -> None:
        self.plain.pop(worker, None)
        self.index.removed(worker)

    @rule(most=st.integers(1, 40))
    def tidied(self, most: int) -> None:
        self.index.tidy(most)

    @rule(path=paths)
    def asked(self, path: Path) -> None:
        said = self.index.lengths(blocks_of(path))
        for worker, plain in self.plain.items():
            there = [each in plain.held for each in beginnings(path)]
            leading = there.index(False) if False in there else len(there)
            if sum(there) == leading:
                assert said.get(worker, 0) == leading
            else:  # what is on its way goes on from what was evicted meanwhile
                assert said.get(worker, 0) <= len(path) and plain.tells
        assert said.keys() <= self.plain.keys()

    @invariant()
    def whole(self) -> None:
        self.index.check_integrity()
        for worker, plain in self.plain.items():
            parts = (plain.told, plain.coming) if plain.tells else (plain.young, plain.old)
            assert self.index.held(worker) == sum(map(len, parts))


class CompiledMachine(IndexMachine):
    table = staticmethod(table)


TestIndex, TestCompiledIndex = IndexMachine.TestCase, CompiledMachine.TestCase
TestIndex.settings = TestCompiledIndex.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_match_is_of_whole_blocks_of_one_space() -> None:
    index = PrefixIndex(1000)
    text = "".join(map(str, range(1000)))
    index.sent(chained(text), "a")
    assert index.lengths(chained(text[: 3 * BLOCK + 5] + "else" * 100)) == {"a": 3}
    assert index.lengths(chained("x" + text)) == {}
    assert index.lengths(chained(text, b"another model")) == {}


def test_workers_that_hold_more_and_less_of_a_prefix() -> None:
    index = PrefixIndex(1 << 12)
    blocks = [random.Random(0).getrandbits(64) for _ in range(1)] + list(range(1000))
    for number in range(100):
        index.sent(blocks[: 1 + 7 * number], f"w{number}")
    assert index.lengths(blocks) == {f"w{number}": 1 + 7 * number for number in range(100)}
    assert index.lengths(blocks[:50]) == {f"w{number}": min(50, 1 + 7 * number) for number in range(100)}


def test_a_bound_holds_whether_it_is_tidied_or_not() -> None:
    """The third of the marks of a worker that is full is not free before a walk, so it is learnt no more of."""
    rng = random.Random(0)
    for tidied in (False, True):
        index = PrefixIndex(200)
        for _ in range(500):
            index.sent([rng.getrandbits(64) for _ in range(10)], "a")
            while tidied and index.tidy(50):
                pass
        assert index.held("a") <= 200
        assert len(index) <= 300
    last = [rng.getrandbits(64) for _ in range(10)]
    index.sent(last, "a")
    assert index.lengths(last) == {"a": 10}


def test_what_was_used_lately_outlives_what_was_not() -> None:
    rng = random.Random(0)
    index = PrefixIndex(400)
    used, unused = ([rng.getrandbits(64) for _ in range(10)] for _ in range(2))
    index.sent(unused, "a")
    for _ in range(100):
        index.sent(used, "a")
        index.sent([rng.getrandbits(64) for _ in range(10)], "a")
        while index.tidy(100):
            pass
    assert (index.lengths(used), index.lengths(unused)) == ({"a": 10}, {})


def test_a_walk_gives_back_the_memory_of_a_worker_that_left_and_its_place() -> None:
    index = PrefixIndex(1000)
    for number in range(50):
        index.sent(array("Q", range(number * 100, number * 100 + 100)), f"w{number}")
        index.removed(f"w{number}")
        assert index.lengths(range(number * 100, number * 100 + 100)) == {}
        while index.tidy(7):
            pass
    assert len(index) == 0
    assert len(index._names) == 1
    for _ in range(5):
        index.removed("never there")
        index.reset("b")
    assert len(index._names) == 1


def test_the_marks_of_a_worker_that_tells() -> None:
    index = PrefixIndex(1000)
    index.stored([1, 2], "a")
    index.sent([1, 2, 3, 4], "a")
    assert index.lengths([1, 2, 3, 4]) == {"a": 4}, "what is on its way counts"
    assert index._holders["a"].counts[: COMING + 1] == [2, 2]
    index.computed([1, 2, 3, 4], "a")
    assert index.lengths([1, 2, 3, 4]) == {"a": 2}, "it told nothing of it, so it is not there"
    index.evicted([2], "a")
    assert index.lengths([1, 2]) == {"a": 1}
    assert index._holders["a"].counts[TOLD] == 1


@pytest.mark.parametrize("wrong", [True, False])
def test_a_worker_that_held_less_is_known_less_of(wrong: bool) -> None:
    rng, index = random.Random(0), PrefixIndex(1000)
    for _ in range(200):
        index.sent([rng.getrandbits(64) for _ in range(10)], "a")
        if wrong:
            index.shrink("a")
        else:
            index.grow("a")
        while index.tidy(1000):
            pass
    assert (index._holders["a"].limit == LEAST) is wrong
    assert index._holders["a"].limit <= 1000
