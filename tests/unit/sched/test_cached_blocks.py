"""What is told of the cache is what the tree holds, whatever happens to requests, and however seldom a reader asks."""

from array import array
from collections import deque
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulated_device import VOCABULARY, SimulatedDevice, sampling

from engine.cache.blocks import MOST_NAMES, HeldBlocks, Named
from engine.cache.log import CacheLog
from engine.cache.pages import CachePages
from engine.messages.cache import Blocks
from engine.messages.request import Admit
from engine.sched import Scheduler
from engine.sched.chunks import ChunkRule
from engine.sched.places import Places
from engine.sched.request import Request
from engine.testing.fake import FakeDevice
from engine_plugins.policies.order import LongestPrefixMatch

STEM = (0, 1, 2, 3, 0, 1, 1, 2, 3, 3, 2, 1, 0, 2)  # prompts share parts of it
BLOCK = 3  # tokens
Name = tuple[int, str, bytes]  # a block, and the salt and key of the pages that hold it


def blocks_of(ids: list[int], salt: str) -> Blocks:
    """A block for every three tokens. Some end a token late, as where text and tokens part in different places."""
    hashes, ends = array("Q"), array("i")
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        block = hash((len(salt), *ids[:end])) & (1 << 64) - 1  # of numbers alone: the same in each run
        hashes.append(block)
        ends.append(min(end + block % 3 // 2, len(ids)))
    return Blocks(salt.encode(), hashes.tobytes(), ends.tobytes())


class WatchedPlaces(Places):
    """Takes down who has shared how many pages."""

    taken_down: list[tuple[str, int, list[int]]]

    def share(self, request: Request, end: int) -> range:
        changed = super().share(request, end)
        self.taken_down.append((request.rid, request.shared, request.ids.tolist()))
        return changed

    def place(self, request: Request, running: int) -> bool:
        placed = super().place(request, running)
        self.taken_down.append((request.rid, request.shared, request.ids.tolist()))
        return placed


class Watched(Scheduler):
    """Takes down who has shared how many pages."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.shared: list[tuple[str, int, list[int]]] = []
        super().__init__(*args, **options)

    def _start_afresh(self, pages: CachePages) -> None:
        super()._start_afresh(pages)
        self.places = WatchedPlaces(pages, self.page_size, self.prefix_cache, self.encoder)
        self.places.taken_down = self.shared

    def keys(self) -> set[tuple[str, bytes]]:
        """The salt and the key of each prefix in whole pages that the tree has, from its nodes."""
        found = set()
        for node in self._tree.nodes():
            path = [node]
            while (parent := path[-1].parent) is not None:
                path.append(parent)
            *edges, root = path
            key = b"".join(edge.key for edge in reversed(edges))
            for end in range(4 * self.page_size, len(key) + 1, 4 * self.page_size):
                found.add((root.key.decode(), key[:end]))
        return found


class Reader:
    """Follows a log as a router does."""

    def __init__(self) -> None:
        self.number = 0
        self.spaces: dict[int, str] = {}  # of the blocks that are held
        self.resets = 0

    def read(self, log: CacheLog, held: HeldBlocks) -> None:
        told = log.since(self.number, held)
        assert told.after == self.number
        for change in told.changes:
            blocks = array("Q", change.hashes)
            match change.kind:
                case "stored":
                    assert not self.spaces.keys() & set(blocks), "a block is stored that is held"
                    self.spaces |= dict.fromkeys(blocks, change.space.decode())
                case "evicted":
                    assert len(set(blocks)) == len(blocks)
                    for block in blocks:
                        del self.spaces[block]
                case "reset":
                    self.spaces.clear()
                    self.resets += 1
        self.number = told.number


class AnythingHappens(RuleBasedStateMachine):
    @initialize(
        pages=st.integers(2, 16),
        page_size=st.integers(1, 4),
        slots=st.integers(1, 5),
        budget=st.sampled_from([1, 3, 7, 30]),
        burst=st.sampled_from([1, 1, 2, 4]),
        lanes=st.sampled_from([1, 1, 1, 2]),
        prefix_cache=st.sampled_from([True] * 7 + [False]),
        most=st.sampled_from([1, 6, 40, 10_000]),
    )
    def start(
        self, pages: int, page_size: int, slots: int, budget: int, burst: int, lanes: int, prefix_cache: bool, most: int
    ) -> None:
        self.log = CacheLog(begins=1000, most=most)
        self.held = HeldBlocks(self.log)
        self.most = most
        burst = min(burst, budget) if lanes == 1 else 1
        self.scheduler = Watched(
            pages, page_size, slots, max_model_len=24, max_step_tokens=budget,
            policy=LongestPrefixMatch(), prefix_cache=prefix_cache, max_waiting=1000, drafts=burst - 1,
            chunks=ChunkRule(budget, lanes, 0.0, least=2) if lanes > 1 else None, held=self.held,
        )  # fmt: skip
        self.device = SimulatedDevice(pages, page_size, slots, budget, burst)
        self.flying: deque[Any] = deque()
        self.capacity = pages * page_size
        self.admits: dict[str, Admit] = {}
        self.names: set[Name] = set()
        self.often, self.seldom = Reader(), Reader()

    @rule(
        stem=st.integers(0, len(STEM)),
        tail=st.lists(st.integers(0, VOCABULARY - 1), max_size=4),
        max_new=st.integers(1, 8),
        seed=st.integers(0, 3),
        salt=st.sampled_from(["", "", "a"]),
        scored=st.sampled_from([False] * 5 + [True]),
        named=st.sampled_from([True] * 5 + [False]),
    )
    def admit(self, stem: int, tail: list[int], max_new: int, seed: int, salt: str, scored: bool, named: bool) -> None:
        ids = [*STEM[:stem], *tail]
        if not ids or len(ids) + max_new > 24 or len(ids) + max_new - 1 > self.capacity:
            return
        rid = f"r{len(self.admits)}"
        asked = sampling(seed, salt, prompt_logprobs=1 if scored else -1)
        self.admits[rid] = Admit(
            rid, array("i", ids).tobytes(), asked, (), max_new, 0, salt, blocks=blocks_of(ids, salt) if named else None
        )
        self.scheduler.admit(self.admits[rid])

    @rule(steps=st.integers(1, 8))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            while len(self.flying) < 2 and (plan := self.scheduler.plan()) is not None:
                self.flying.append(self.device.run(plan))
                self.look()
            if self.flying:
                self.scheduler.commit(self.flying.popleft())
                self.look()

    @precondition(lambda self: self.scheduler.live.by_rid)
    @rule(data=st.data(), keep=st.none() | st.integers(0, 3))
    def stop(self, data: st.DataObject, keep: int | None) -> None:
        self.scheduler.stop(data.draw(st.sampled_from(list(self.scheduler.live.by_rid))), keep)

    @precondition(lambda self: not self.flying)
    @rule()
    def retract_all(self) -> None:
        self.scheduler.retract_all()

    @rule()
    def flush(self) -> None:
        self.scheduler.flush()

    @rule()
    def lose_the_device(self) -> None:
        self.scheduler.reset()
        self.flying.clear()
        self.device.store.clear()
        self.device.table.clear()

    @rule()
    def read(self) -> None:
        self.seldom.read(self.log, self.held)
        assert self.seldom.spaces == {block: salt for block, salt, _ in self.names}

    @invariant()
    def what_is_told_is_what_the_tree_holds(self) -> None:
        if hasattr(self, "scheduler"):
            self.look()

    def look(self) -> None:
        """Find out from the tree which of the blocks that were named are in it."""
        keys = self.scheduler.keys()
        self.names = {name for name in self.names if name[1:] in keys}
        size = self.scheduler.page_size
        for rid, shared, ids in self.scheduler.shared:
            admit = self.admits[rid]
            if admit.blocks is None:
                continue
            for block, end in zip(array("Q", admit.blocks.hashes), array("i", admit.blocks.ends), strict=True):
                key = array("i", ids[: -(-end // size) * size]).tobytes()
                if -(-end // size) <= shared and (admit.cache_salt, key) in keys:
                    self.names.add((block, admit.cache_salt, key))
        self.scheduler.shared.clear()
        self.often.read(self.log, self.held)
        assert self.often.spaces == {block: salt for block, salt, _ in self.names}
        assert len(self.held) == len(self.often.spaces)
        assert self.log.size <= self.most
        self.scheduler.check_integrity()


TestAnything = AnythingHappens.TestCase
TestAnything.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


# ── what is promised, one by one ─────────────────────────────────────────────────────────────


def test_the_next_turn_names_what_a_reply_has_left() -> None:
    log = CacheLog()
    held = HeldBlocks(log)
    scheduler, device = (
        Scheduler(
            16,
            4,
            2,
            max_model_len=100,
            max_step_tokens=100,
            policy=LongestPrefixMatch(),
            prefix_cache=True,
            max_waiting=10,
            held=held,
        ),
        FakeDevice(),
    )
    first = list(range(10))
    scheduler.admit(Admit("first", array("i", first).tobytes(), sampling(0), (), 7, blocks=blocks_of(first, "")))
    while (plan := scheduler.plan()) is not None:
        scheduler.commit(device.step(plan))
    spoken = list(range(17))  # of which the last was never computed: four pages are cached
    assert set(held_in(held)) < set(array("Q", blocks_of(spoken, "").hashes))
    assert len(held) == 3
    scheduler.admit(Admit("next", array("i", spoken).tobytes(), sampling(0), (), 7, blocks=blocks_of(spoken, "")))
    scheduler.plan()  # places it: what it computes is no whole page
    assert held_in(held) == list(array("Q", blocks_of(spoken, "").hashes)) and len(held) == 5


def held_in(held: HeldBlocks) -> list[int]:
    return [block for _, blocks in held.all() for block in blocks]


def test_texts_that_differ_over_the_same_tokens_are_bounded() -> None:
    log = CacheLog()
    held, reader = HeldBlocks(log), Reader()
    for text in range(10 * MOST_NAMES):
        held.name(Named(Blocks(b"", array("Q", [text]).tobytes(), array("i", [4]).tobytes()), 4), [7], 1)
    assert len(held) == MOST_NAMES
    held.forget([7])
    reader.read(log, held)
    assert len(held) == 0 == len(reader.spaces)


def test_a_log_that_nobody_reads_is_bounded_and_a_late_reader_is_told_all() -> None:
    log = CacheLog(begins=5, most=100)
    held, early, late = HeldBlocks(log), Reader(), Reader()
    early.read(log, held)
    for block in range(1000):
        held.name(Named(Blocks(b"", array("Q", [block]).tobytes(), array("i", [1]).tobytes()), 1), [block], 1)
        if block % 3 == 0:
            held.forget([block])
        assert log.size <= 100
    for reader in (early, late):
        reader.read(log, held)
        assert len(reader.spaces) == len(held) == 666 and reader.number == log.last
    assert (early.resets, late.resets) == (2, 1)
    held.forget([1])
    early.read(log, held)
    assert early.resets == 2 and len(early.spaces) == 665


def test_changes_of_one_kind_are_one_until_they_are_told() -> None:
    log = CacheLog()
    held = HeldBlocks(log)
    log.stored(b"", [1, 2])
    log.stored(b"", [3])
    log.stored(b"other", [4])
    assert [(change.kind, len(change.hashes) // 8) for change in log.since(0, held).changes] == [
        ("stored", 3),
        ("stored", 1),
    ]
    log.stored(b"other", [5])
    assert log.last == 3
    assert [change.space for change in log.since(2, held).changes] == [b"other"]


def test_what_two_copies_hold_is_held_until_both_have_lost_it() -> None:
    log = CacheLog()
    held = HeldBlocks(log)
    caches = [CachePages(4, 2, held, first) for first in (0, 4)]
    reader = Reader()
    key = array("i", [1, 2, 3, 4])
    blocks = Blocks(b"a", array("Q", [7, 8]).tobytes(), array("i", [2, 4]).tobytes())
    nodes = []
    for cache in caches:
        root, _ = cache.tree.match(key.tobytes())
        pages = cache.take(2)
        node, _ = cache.tree.extend(root, key.tobytes(), list(pages))
        named = cache.named(blocks)
        assert named is not None
        cache.name(named, pages, 2)
        nodes.append(node)
        reader.read(log, held)
        assert reader.spaces == {7: "a", 8: "a"}
    for cache, node, left in zip(caches, nodes, ({7, 8}, set()), strict=True):
        cache.check_integrity()
        cache.tree.unlock(node)
        assert cache.flush() == (2, 0)
        reader.read(log, held)
        assert reader.spaces.keys() == left
    assert caches[0].afresh().check_integrity() is None and len(held) == 0
