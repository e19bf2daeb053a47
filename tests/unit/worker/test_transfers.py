"""Moves of pages on a CPU: bytes arrive where they should, in order with the steps, and what a store does is told."""

import ctypes
import threading
import time
from array import array
from collections.abc import Sequence
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from odd_store import OddStore

from engine.config import resolve
from engine.errors import ConfigError
from engine.messages.tiers import NAME_BYTES, Move, Moved, both
from engine.parallel.mesh import Mesh
from engine.plugin.registry import Plugins
from engine.plugin.specs import KVGroup, KVSpec, StateGroup
from engine.plugin.tiers import Manifest, Store
from engine.runtime import tiers
from engine.worker.manifest import fingerprint, manifest_of
from engine.worker.memory import allocate
from engine.worker.tiers import begin_transfers
from engine.worker.transfers import Threads, Transfers, runs
from engine_plugins.tiers.host import HostMemory

CPU = torch.device("cpu")
HEADS = KVGroup(3, (2, 4, 2, 8), "bfloat16")
LATENTS = KVGroup(2, (4, 24), "float8_e4m3fn")
PAGES, PLACES = 6, 5


class Mover:
    """Transfers of caches whose bytes are all different, and what they tell."""

    def __init__(self, *groups: KVGroup, argument: str = "plain", copy: int = 0, device: torch.device = CPU) -> None:
        spec = KVSpec(4, groups)
        self.caches = allocate(spec, PAGES, CPU)
        generator = np.random.default_rng(0)
        for layers in self.caches:
            for layer in layers:
                numbers = generator.integers(0, 120, layer.view(torch.uint8).shape, np.uint8)
                layer.view(torch.uint8).copy_(torch.from_numpy(numbers))
        size: dict[str, Any] = {"page_bytes": spec.page_bytes, "manifest": {"rank": [0, 0]}}
        pool = HostMemory(capacity_bytes=PLACES * spec.page_bytes, argument="", **size)
        self.store: Store = OddStore(capacity_bytes=1 << 20, argument=argument, **size)
        self.transfers = Transfers(self.caches, device, pool, self.store, size["manifest"], copy)
        self.told: SimpleQueue[Moved] = SimpleQueue()
        self.number = 0

    def move(self, way: Any, *, pages: Any = (), slots: Any = (), names: Any = (), **more: Any) -> Moved:
        self.number += 1
        packed = array("i", pages).tobytes(), array("i", slots).tobytes(), b"".join(names)
        self.transfers.begin(Move(self.number, way, *packed, **more), self.told.put)
        moved = self.told.get(timeout=20)
        assert moved.number == self.number
        return moved

    def page(self, number: int) -> list[bytes]:
        return [bytes(layer[number].view(torch.uint8).numpy().tobytes()) for each in self.caches for layer in each]


def names(*letters: str) -> list[bytes]:
    return [letter.encode() * NAME_BYTES for letter in letters]


def moved_in_one_call(to: np.ndarray, source: np.ndarray, sizes: np.ndarray, stream: int) -> None:
    """As CUDA does it: all addresses at once."""
    assert stream == 7 and {each.dtype for each in (to, source, sizes)} == {np.dtype(np.uint64)}
    for each in zip(to.tolist(), source.tolist(), sizes.tolist(), strict=True):
        ctypes.memmove(*each)


@pytest.mark.parametrize("batch", [None, moved_in_one_call])
@pytest.mark.parametrize("groups", [(HEADS,), (LATENTS,), (HEADS, LATENTS)])
def test_pages_of_every_kind_come_back_as_they_were_in_other_places(
    groups: tuple[KVGroup, ...], batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mover = Mover(*groups)
    mover.transfers._batch = batch
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    before = [mover.page(page) for page in range(PAGES)]
    assert mover.move("down", pages=[0, 1, 2, 5], slots=[1, 2, 3, 0]).done == b"\1\1\1\1"
    assert mover.move("keep", slots=[1, 2, 3, 0], names=names("a", "b", "c", "d")).done == b"\1\1\1\1"
    for each in mover.caches:
        for layer in each:
            layer.view(torch.uint8).fill_(7)
    assert mover.move("up", pages=[3, 4], slots=[2, 3]).done == b"\1\1"
    assert [mover.page(3), mover.page(4)] == [before[1], before[2]]
    mover.transfers._host.fill_(0)
    assert mover.move("fetch", slots=[4, 0], names=names("a", "d")).done == b"\1\1"
    mover.move("up", pages=[1, 2], slots=[0, 4])
    assert [mover.page(1), mover.page(2)] == [before[5], before[0]]
    others = mover.page(0) + mover.page(5)
    assert {number for layer in others for number in layer} == {7}, "another page was written"


def test_what_a_store_has_not_is_told_page_by_page() -> None:
    mover = Mover(HEADS, argument="odd")
    keys = names(*"abcdefgh")
    kept = [mover.move("keep", slots=[0], names=[key]).done == b"\1" for key in keys]
    assert 0 < sum(kept) < len(keys)
    assert [bool(each) for each in mover.move("find", names=keys).done] == kept
    assert [bool(each) for each in mover.move("fetch", slots=[0] * 8, names=keys).done] == kept
    last = mover.move("keep", slots=[0], names=[keys[kept.index(True)]])
    assert (last.done, last.held) == (b"\1", sum(kept)) and last.held_bytes == sum(kept) * HEADS.page_bytes
    assert (mover.move("clear").done, mover.told.empty()) == (b"\1", True)
    assert mover.move("find").held == 0
    assert not any(mover.move("find", names=keys).done)


def test_names_of_another_manifest_are_other_names() -> None:
    mover = Mover(HEADS)
    mover.move("keep", slots=[0], names=names("a"))
    assert mover.move("find", names=names("a")).done == b"\1"
    mover.transfers._scope = bytes(64)
    assert mover.move("find", names=names("a")).done == b"\0"


def test_a_store_that_raises_is_told_of_and_kills_no_thread() -> None:
    mover = Mover(HEADS, argument="broken")
    for _ in range(2):
        moved = mover.move("keep", slots=[0, 1], names=names("a", "b"))
        assert moved.done == b"\0\0" and "the disk is on fire" in moved.cause


@pytest.mark.parametrize(("argument", "cause"), [("short", "1 answers for 2 pages"), ("lost", "the index is gone")])
def test_a_store_that_answers_what_it_was_not_asked_has_not_done_it(argument: str, cause: str) -> None:
    mover = Mover(HEADS, argument=argument)
    for _ in range(5):  # more often than there are threads
        moved = mover.move("find", names=names("a", "b"))
        assert moved.done == b"\0\0" and cause in moved.cause


def test_what_is_true_to_a_store_is_true() -> None:
    mover = Mover(HEADS, argument="vague")
    assert mover.move("keep", slots=[0], names=names("a")).done == b"\1"
    assert mover.move("find", names=names("a", "b")).done == b"\1\0"


@pytest.mark.parametrize("way", ["keep", "find", "fetch"])
def test_each_answer_of_a_store_says_what_it_holds(way: str) -> None:
    mover = Mover(HEADS)
    mover.move("keep", slots=[0, 1], names=names("a", "b"))
    moved = mover.move(way, slots=[0] if way != "find" else (), names=names("a"))
    assert (moved.held, moved.held_bytes) == (2, 2 * HEADS.page_bytes)
    assert moved.counts == {"pages_written": 2}
    moved = mover.move("find")
    assert (moved.done, moved.held) == (b"", 2)


def test_what_a_store_does_not_clear_is_not_done_and_says_why() -> None:
    mover = Mover(HEADS)
    for refuses, done, cause in (
        (lambda: "the disk is read-only", b"\0", "the disk is read-only"),
        (lambda: 1 // 0, b"\0", "the store of KV pages fails: ZeroDivisionError"),
        (lambda: "", b"\1", ""),
    ):
        mover.store.clear = refuses  # type: ignore[method-assign, assignment]
        moved = mover.move("clear")
        assert moved.done == done and moved.cause.startswith(cause)
    assert both(Moved(1, b"\0", cause="why"), Moved(1, b"\1")) == Moved(1, b"\0", cause="why")
    assert Mover(HEADS, copy=1).move("clear").done == b"\1"  # of another copy


def test_to_clear_a_store_that_stalls_waits_for_what_it_is_keeping_and_drops_what_is_queued() -> None:
    mover, begun, goes_on = Mover(HEADS), threading.Event(), threading.Event()
    asked: list[str] = []
    put, clear = mover.store.put, mover.store.clear

    def stalling(keys: Sequence[bytes], pages: Sequence[memoryview]) -> list[bool]:
        asked.append("put")
        begun.set()
        assert goes_on.wait(20)
        return put(keys, pages)

    def clearing() -> str | None:
        asked.append("clear")
        return clear()

    mover.store.put, mover.store.clear = stalling, clearing  # type: ignore[method-assign, assignment]
    ways = ("keep", "keep", "keep", "clear", "keep")
    for number, way in enumerate(ways):
        slots, own = (array("i", [0]).tobytes(), names("abcde"[number])) if way == "keep" else (b"", ())
        mover.transfers.begin(Move(number, way, b"", slots, b"".join(own)), mover.told.put)  # type: ignore[arg-type]
        assert begun.wait(20)  # the first is under way
    goes_on.set()
    told = [mover.told.get(timeout=20) for _ in ways]
    assert [(moved.number, moved.done, moved.cause) for moved in told] == [
        *((0, b"\1", ""), (1, b"\0", ""), (2, b"\0", ""), (3, b"\1", ""), (4, b"\1", ""))
    ]
    assert asked == ["put", "clear", "put"]
    assert mover.move("find", names=names(*"abcde")).done == b"\0\0\0\0\1"


def test_the_store_is_closed_at_the_end() -> None:
    mover = Mover(HEADS)
    mover.move("keep", slots=[0], names=names("a"))
    assert mover.store.held().pages == 1
    mover.transfers.close()
    assert mover.store.held().pages == 0  # this one forgets all then


def test_ranks_of_another_copy_move_nothing() -> None:
    mover = Mover(HEADS, copy=1)
    before = mover.page(2)
    assert mover.move("down", pages=[0], slots=[0], copy=1).done == b"\1"
    assert mover.move("up", pages=[2], slots=[0], copy=0).done == b"\1"
    assert mover.page(2) == before
    assert mover.move("find", names=names("a", "b"), copy=0).done == b"\1\1"


@pytest.mark.parametrize(("way", "holds"), [("down", False), ("down", True), ("up", False)])
def test_a_copy_that_fails_is_told_of_and_kills_no_thread(
    way: str, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mover = Mover(HEADS)
    with monkeypatch.context() as broken:
        broken.setattr(mover.transfers, "_copy_all", lambda way, copies: 1 / 0)
        moved = mover.move(way, pages=[0, 1], slots=[2, 3], holds=holds)
    assert moved.done == b"\0\0" and moved.cause == (
        f"a copy of KV pages ({way}) fails: ZeroDivisionError: division by zero"
    )
    assert mover.move(way, pages=[0, 1], slots=[2, 3], holds=holds).done == b"\1\1"


def test_a_move_that_holds_is_over_before_the_next_step() -> None:
    mover = Mover(HEADS)
    mover.transfers._copiers["down"].submit(lambda: time.sleep(0.05))
    wanted = mover.page(0)
    mover.transfers.begin(
        Move(1, "down", array("i", [0]).tobytes(), array("i", [4]).tobytes(), holds=True), mover.told.put
    )
    for layer in mover.caches[0]:
        layer.fill_(0)  # as a step that takes the page does
    mover.number = 1
    assert mover.told.get(timeout=20).done == b"\1"
    mover.move("up", pages=[0], slots=[4])
    assert mover.page(0) == wanted


def test_neighbours_are_copied_at_once_where_there_is_one_group() -> None:
    pages, slots = np.array([7, 3, 2, 4, 9, 8]), np.array([1, 11, 10, 12, 3, 2])
    assert list(runs(pages, slots, 4)) == [(2, 10, 3), (7, 1, 3)]
    assert list(runs(pages, slots, 2)) == [(2, 10, 2), (4, 12, 1), (7, 1, 2), (9, 3, 1)]
    assert list(runs(pages, slots, 1)) == [(2, 10, 1), (3, 11, 1), (4, 12, 1), (7, 1, 1), (8, 2, 1), (9, 3, 1)]
    assert list(runs(pages[:0], slots[:0], 4)) == []


def test_what_counts_is_what_all_ranks_have_moved() -> None:
    one, two = Moved(4, b"\1\0\1", 0.5, 3, 30), Moved(4, b"\1\1\0", 0.2, 2, 20, "too slow")
    assert both(one, two) == Moved(4, b"\1\0\0", 0.5, 2, 50, "too slow")
    counting = [Moved(4, b"\1", counts=counts) for counts in ({"read": 1, "stalls": 0}, {"read": 2, "corrupt": 3})]
    assert both(*counting).counts == {"read": 3, "stalls": 0, "corrupt": 3}
    other = Moved(4, b"\1\1\1")  # of another copy, whose store was asked for nothing
    for first, second in ((one, other), (other, one)):
        assert both(first, second) == Moved(4, b"\1\0\1", 0.5, 3, 30)
    assert both(other, other) == other


def test_threads_tell_of_errors_once_all_are_over() -> None:
    done: list[int] = []

    def work(part: int) -> int:
        if part == 1:
            raise ValueError("one")
        done.append(part)
        return part

    threads = Threads(2, "test")
    with pytest.raises(ValueError, match="one"):
        threads.map(work, [0, 1, 2, 3])
    assert sorted(done) == [0, 2, 3]
    assert threads.map(work, [5, 4]) == [5, 4]
    assert threads.map(work, []) == []


def test_sizes_that_do_not_go_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "free_memory", lambda: 8 << 30)
    assert tiers.tier_sizes(resolve({}).cache) is None
    sizes = tiers.tier_sizes(resolve({"kv_host": "1.5GiB", "kv_disk": "/a:b/c:2TB"}).cache)
    assert sizes == tiers.TierSizes(3 << 29, 2 * 10**12, "/a:b/c")
    beside = tiers.tier_sizes(resolve({"kv_disk": "/kv:1GiB"}).cache)
    assert beside is not None and beside.host == 1 << 30
    tiers.check_tiers(resolve({"kv_host": "8GiB"}))
    for options, said in (
        ({"kv_host": "8.1GiB"}, r"--kv-host 8.1 GiB is more than the 8 GiB"),
        ({"kv_host": "much"}, r"--kv-host is 'much', but takes a size"),
        ({"kv_disk": "/path"}, r"--kv-disk is '/path', but takes a path and a size"),
        ({"kv_disk": "/path:1XB"}, r"the size in --kv-disk is '1XB'"),
        ({"kv_host": "1GiB", "prefix_cache": False}, r"--no-prefix-cache"),
    ):
        with pytest.raises(ConfigError, match=said):
            tiers.check_tiers(resolve(options))


def test_a_model_without_pages_and_a_host_of_no_page_are_refused() -> None:
    states = KVSpec(4, (), (StateGroup("state", 1, (4,), "float32"),))
    for spec, options, said in (
        (
            states,
            {"kv_host": "1GiB"},
            "keeps states of requests and no pages; leave --kv-host and --kv-disk out",
        ),
        (KVSpec(4, ()), {"kv_host": "1GiB"}, "keeps no pages"),
        (KVSpec(4, (HEADS,)), {"kv_host": "15"}, "--kv-host 15 B, divided by 1 rank, is less than one page"),
    ):
        runner: Any = SimpleNamespace(model=SimpleNamespace(kv_spec=lambda spec=spec: spec))
        with pytest.raises(ConfigError, match=said):
            begin_transfers(resolve(options), Plugins.load(), runner, 1)
    assert begin_transfers(resolve({}), Plugins.load(), runner, 2) is None


def test_weights_are_told_apart_by_what_they_are() -> None:
    weights = {"b": torch.arange(12.0).view(3, 4), "a": torch.ones(5, dtype=torch.bfloat16)}

    def model(**changes: torch.Tensor) -> Any:
        named = {**weights, **changes}
        return SimpleNamespace(named_parameters=lambda: list(named.items()), named_buffers=lambda: [])

    swapped = weights["b"].clone()
    swapped[0, 1], swapped[1, 0] = weights["b"][1, 0], weights["b"][0, 1]
    others = [swapped, weights["b"].view(4, 3), weights["b"].to(torch.bfloat16), weights["b"] + 1e-6]
    known = {fingerprint(model())} | {fingerprint(model(b=other)) for other in others}
    assert len(known) == 5
    assert fingerprint(model(b=weights["b"].clone(), a=torch.ones(5, dtype=torch.bfloat16))) in known


def test_a_model_of_another_configuration_has_other_pages() -> None:
    """Angles of positions are no weights, and follow from it."""
    model: Any = SimpleNamespace(
        kv_spec=lambda: KVSpec(4, (HEADS,)), named_parameters=lambda: [("w", torch.ones(3))], named_buffers=lambda: []
    )

    def manifest(**terms: Any) -> Manifest:
        return manifest_of(model, Mesh(), terms=terms, attention="cpu", dtype=torch.float32, max_model_len=64)

    plain = manifest(rope_theta=1e4, rope_scaling={"type": "yarn", "factor": 2.0})
    assert manifest(rope_scaling={"factor": 2.0, "type": "yarn"}, rope_theta=1e4) == plain
    assert manifest(rope_theta=1e4, rope_scaling={"type": "yarn", "factor": 4.0}) != plain
    assert manifest(rope_theta=1e6, rope_scaling={"type": "yarn", "factor": 2.0}) != plain
