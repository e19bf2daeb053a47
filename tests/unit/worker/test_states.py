"""States of requests from the start to the last token: their memory, and a recurrent model on a scheduler and a runner,
with steps in flight, chunks, aborts, retractions and slots that change hands."""

import json
import logging
from array import array
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recurrent
import torch
from house import open_house, prompt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs
from recurrent import CONFIG, VOCABULARY, ToyRecurrent, weights
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from engine.config import CacheOptions, resolve
from engine.errors import ConfigError, PluginError
from engine.messages.control import Boot, WorkerReady
from engine.messages.request import Admit
from engine.messages.step import DRAFTS, SlotAdmit
from engine.params.sampling import Sampling
from engine.plugin.specs import KVGroup, KVSpec, StateGroup
from engine.plugin.testing import ModelHarness
from engine.runtime.group import least_of
from engine.sched import Scheduler
from engine.testing.steps import step_plan
from engine.worker.memory import States, allocate, count_pages, state_bytes
from engine.worker.runner import Runner
from engine.worker.start import start
from engine.worker.steps.results import Step
from engine_plugins.policies.order import FirstComeFirstServed

CPU = torch.device("cpu")
GREEDY = Sampling(0.0, 0, 1.0, 0.0, 0)


# ── memory ───────────────────────────────────────────────────────────────────────────────────

PAGED = KVGroup(2, (2, 16, 3, 64), "bfloat16")
KEPT = (StateGroup("window", 3, (2, 10), "bfloat16"), StateGroup("state", 3, (1 << 20,), "float32"))
SPEC = KVSpec(16, (PAGED,), KEPT)
MEMORY = 1 << 30


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of 1 GiB, all of it free."""
    monkeypatch.setattr("engine.worker.memory.available_memory", lambda device: MEMORY)


@pytest.mark.usefixtures("memory")
def test_states_of_all_slots_are_taken_before_pages_are_counted() -> None:
    assert SPEC.slot_bytes == 3 * 2 * 10 * 2 + 3 * (1 << 20) * 4
    assert state_bytes(SPEC, 15) == 16 * SPEC.slot_bytes, "the scratch slot has states as well"
    whole, room = CacheOptions(memory_fraction=0.5), MEMORY // 2
    count = count_pages(SPEC, whole, CPU, 0, most_tokens=16, slots=15)
    assert count == (room - 16 * SPEC.slot_bytes) // PAGED.page_bytes
    assert count_pages(KVSpec(16, (PAGED,)), whole, CPU, 0, most_tokens=16, slots=15) == room // PAGED.page_bytes
    asked = CacheOptions(kv_tokens=1600)
    assert count_pages(SPEC, asked, CPU, 0, most_tokens=16, slots=15) == 100
    assert count_pages(SPEC, CacheOptions(), CPU, 0, most_tokens=33, slots=15) == 3


@pytest.mark.usefixtures("memory")
def test_states_that_do_not_fit_are_refused_with_both_numbers() -> None:
    needed = r"the states of 99 requests take 1.172 GiB, and "
    for options, said in (
        (CacheOptions(memory_fraction=0.5), r"--memory-fraction 0.5 of 1 GiB on cpu leaves 512 MiB for them"),
        (CacheOptions(kv_tokens=16), r"cpu has 1 GiB for them"),
    ):
        with pytest.raises(ConfigError, match=needed + said + r"; say --max-running \d+ or less") as caught:
            count_pages(SPEC, options, CPU, 0, most_tokens=16, slots=99)
        fit = int(str(caught.value).split("--max-running ")[1].split()[0])
        assert count_pages(SPEC, options, CPU, 0, most_tokens=16, slots=fit) > 0
        with pytest.raises(ConfigError):
            count_pages(SPEC, options, CPU, 0, most_tokens=16, slots=fit + 1)
    with pytest.raises(ConfigError, match=needed + r"cpu has 1 GiB"):
        States(SPEC, 99, CPU)
    little = CacheOptions(memory_fraction=(state_bytes(SPEC, 41) + 100) / MEMORY)
    with pytest.raises(ConfigError, match=r"504 MiB of states, and one page of 16 tokens"):
        count_pages(SPEC, little, CPU, 0, most_tokens=16, slots=41)
    with pytest.raises(ConfigError, match="take a device with more memory"):
        count_pages(SPEC, CacheOptions(memory_fraction=0.001), CPU, 0, most_tokens=16, slots=1)


@pytest.mark.usefixtures("memory")
def test_pages_of_recurrent_layers_alone_are_numbers() -> None:
    """As many as the slots can use at once, since they cost nothing: the scheduler counts in pages."""
    spec = KVSpec(16, (), KEPT)
    assert count_pages(spec, CacheOptions(), CPU, 0, most_tokens=1000, slots=9) == 63
    assert count_pages(spec, CacheOptions(kv_tokens=160), CPU, 0, most_tokens=1000, slots=9) == 10
    with pytest.raises(ConfigError, match="the states of 99 requests"):
        count_pages(spec, CacheOptions(), CPU, 0, most_tokens=1000, slots=99)


def test_states_have_a_line_a_slot_and_are_cleared_by_slot() -> None:
    groups = (StateGroup("a", 2, (3, 4), "float32"), StateGroup("b", 1, (), "float8_e4m3fn"))
    states = States(KVSpec(16, (), groups), 3, CPU)
    assert states and not States(KVSpec(16, (PAGED,)), 3, CPU)
    assert {name: [layer.shape for layer in group] for name, group in states.layers.items()} == {
        "a": [(4, 3, 4)] * 2,
        "b": [(4,)],
    }
    for group in states.layers.values():
        for layer in group:
            assert not layer.float().any()
            layer.copy_(torch.ones_like(layer, dtype=torch.float32))
    states.clear(torch.tensor([2, 0]))
    for group in states.layers.values():
        for layer in group:
            assert layer.float().flatten(1).mean(1).tolist() == [0, 1, 0, 1] if layer.dim() > 1 else True
    assert states.layers["b"][0].float().tolist() == [0, 1, 0, 1]


def test_groups_that_cannot_be_are_refused() -> None:
    with pytest.raises(PluginError, match="states 'a' are of type 'int3'; known are float32, bfloat16"):
        StateGroup("a", 1, (3,), "int3")
    with pytest.raises(PluginError, match="two groups of states have one name, in a, a"):
        KVSpec(16, (), (StateGroup("a", 1, (3,), "float32"), StateGroup("a", 2, (4,), "float32")))


# ── the scheduler and the runner ─────────────────────────────────────────────────────────────


@cache
def alone(ids: tuple[int, ...], count: int) -> list[int]:
    return recurrent.greedy(list(ids), count)


class Drive:
    """A scheduler and a runner with `depth` steps between them: 3 slots, 12 pages of 4, steps of 7 tokens. States are
    kept each page."""

    def __init__(self, depth: int, prefix_cache: bool = True, states: bool = True) -> None:
        made = ModelHarness(ToyRecurrent, CONFIG, weights())
        self.runner: Runner = made.runner
        state_pages = self.runner.model.kv_spec().state_pages if states else 0
        self.scheduler = Scheduler(
            pages=12, page_size=4, slots=3, max_model_len=40, max_step_tokens=7, policy=FirstComeFirstServed(),
            prefix_cache=prefix_cache, max_waiting=99, state_pages=state_pages,
        )  # fmt: skip
        kept = self.scheduler.places.states
        kept.least = kept.cut = kept.interval = 4
        self.depth = depth
        self.flying: deque[Step] = deque()
        self.said: dict[str, list[int]] = {}

    def admit(self, rid: str, ids: list[int], count: int, stop_ids: tuple[int, ...] = ()) -> None:
        self.said[rid] = []
        self.scheduler.admit(Admit(rid, np.array(ids, "<i4").tobytes(), GREEDY, stop_ids, count))

    def step(self) -> bool:
        """Launches what may be in flight, and commits the oldest; False where there is nothing to do."""
        while len(self.flying) < self.depth and (plan := self.scheduler.plan()) is not None:
            self.flying.append(self.runner.launch(plan))
        if not self.flying:
            return False
        told = self.scheduler.commit(self.runner.finish(self.flying.popleft()))
        if told is not None:
            tokens = deque(array("i", told.tokens))
            for rid, count in zip(told.rids, array("i", told.counts), strict=True):
                self.said[rid] += [tokens.popleft() for _ in range(count)]
        return True

    def run(self) -> None:
        for _ in range(1000):
            if not self.step():
                self.scheduler.check_integrity()
                return
        raise AssertionError("the requests do not come to an end")


prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=18)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    depth=st.integers(1, 4),
    prefix_cache=st.booleans(),
    arrivals=st.lists(
        st.tuples(prompts, st.integers(1, 9), st.integers(0, 5), st.sampled_from(["stays", "stays", "leaves"])),
        min_size=2, max_size=7,
    ),
)  # fmt: skip
def test_a_request_gets_what_its_tokens_alone_give(
    depth: int, prefix_cache: bool, arrivals: list[tuple[list[int], int, int, str]]
) -> None:
    """Each arrival is a prompt, tokens to generate, the steps until the next one comes, and whether its client leaves
    by then."""
    drive, gone = Drive(depth, prefix_cache), set()
    for number, (ids, count, steps, end) in enumerate(arrivals):
        drive.admit(str(number), ids, count)
        for _ in range(steps):
            drive.step()
        if end == "leaves" and drive.scheduler.stop(str(number)):
            gone.add(number)
    drive.run()
    for number, (ids, count, _, _) in enumerate(arrivals):
        said, expected = drive.said[str(number)], alone(tuple(ids), count)
        assert said == (expected[: len(said)] if number in gone else expected), f"request {number}"


PROMPTS = [np.random.default_rng(seed).integers(0, VOCABULARY, 5 + seed).tolist() for seed in range(6)]


@pytest.mark.parametrize("depth", [1, 3])
def test_a_retracted_request_begins_from_zeros(depth: int) -> None:
    drive = Drive(depth)
    for number, ids in enumerate(PROMPTS):
        drive.admit(str(number), ids, 20)
    drive.run()
    assert drive.scheduler.counts()["retractions_total"] > 0
    for number, ids in enumerate(PROMPTS):
        assert drive.said[str(number)] == alone(tuple(ids), 20), f"request {number}"


@pytest.mark.parametrize("depth", [1, 3])
def test_what_a_stopped_request_left_in_its_slot_is_not_seen(depth: int) -> None:
    """Its rows that were in flight when a stop id ended it have changed its states, too."""
    drive, expected = Drive(depth), [alone(tuple(ids), 12) for ids in PROMPTS]
    for number, ids in enumerate(PROMPTS):
        drive.admit(str(number), ids, 12, stop_ids=(expected[number][3],))
    drive.run()
    for number, whole in enumerate(expected):
        assert drive.said[str(number)] == whole[: whole.index(whole[3]) + 1], f"request {number}"


def test_all_that_runs_can_be_sent_back_and_goes_on() -> None:
    drive = Drive(1)
    drive.admit("0", PROMPTS[0], 12)
    drive.admit("1", PROMPTS[5], 12)
    for _ in range(6):
        drive.step()
    drive.scheduler.retract_all()
    assert drive.scheduler.running == 0 and drive.said["0"]
    drive.run()
    assert [drive.said[rid] for rid in "01"] == [alone(tuple(PROMPTS[0]), 12), alone(tuple(PROMPTS[5]), 12)]


def test_a_cached_prefix_is_right_with_its_state_and_would_be_wrong_without() -> None:
    for states in (True, False):
        drive, ids = Drive(1, states=states), [*range(12), 5, 3]
        drive.admit("first", ids, 2)
        drive.run()
        drive.admit("second", ids, 8)
        drive.run()
        assert drive.scheduler.counts()["cached_tokens_total"] == 12
        assert (drive.said["second"] == alone(tuple(ids), 8)) == states


@pytest.mark.parametrize(("wide", "slot_bytes"), [(7, 141), (8, 144)], ids=["bytes", "words"])
def test_copies_of_states_are_exact_whatever_pages_they_take(wide: int, slot_bytes: int) -> None:
    """Bytes of several groups of states in pages of several KV groups, the last of them not full."""
    groups = (StateGroup("a", 2, (3, 5), "float32"), StateGroup("b", 3, (wide,), "float8_e4m3fn"))
    spec = KVSpec(2, (KVGroup(1, (2, 4), "bfloat16"), KVGroup(2, (4,), "uint8")), groups)
    assert (spec.slot_bytes, spec.page_bytes, spec.state_pages) == (slot_bytes, 24, 6)
    caches = allocate(spec, 20, CPU)
    states = States(spec, 2, CPU, caches)
    for group in states.layers.values():
        for layer in group:
            layer.copy_(torch.randn(layer.shape).to(layer.dtype))
    before = {name: [layer[1].float().clone() for layer in layers] for name, layers in states.layers.items()}
    pages = np.array([3, 19, 0, 7, 5, 4, 11, 12], np.int32)  # another rank needs two more
    states.keep(1, pages)
    states.clear(torch.tensor([1]))
    states.restore(0, pages)
    assert all(
        torch.equal(layer[0].float(), kept) and not layer[1].float().any()
        for name, layers in states.layers.items()
        for layer, kept in zip(layers, before[name], strict=True)
    )
    used = {
        page
        for group in caches
        for layer in group
        for page in layer.flatten(1).float().any(1).nonzero().flatten().tolist()
    }
    assert used <= set(pages[:6].tolist())


def test_rows_of_drafts_are_refused() -> None:
    runner = Drive(1).runner
    admit = SlotAdmit(0, np.array([1, 2, 3], "<i4").tobytes(), GREEDY, 3, limit=9)
    with pytest.raises(AssertionError, match="a state that a wrong draft has changed cannot be taken back"):
        runner.launch(step_plan(1, [(0, 2, 3, DRAFTS)], [admit], [(0, 0, 0), (0, 1, 1)]))


# ── the start, and what the scheduler makes of it ────────────────────────────────────────────


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), tmp_path / "model.safetensors")
    words = {chr(0x100 + number): number for number in range(VOCABULARY)}
    Tokenizer(models.WordLevel(words, unk_token=chr(0x100))).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def started(checkpoint: Path, **options: Any) -> tuple[Runner, WorkerReady]:
    shown = {"model": str(checkpoint), "plugins": [recurrent.__file__], "device": "cpu", "page_size": 4}
    return start(Boot(resolve({**shown, "max_running": 2, "kv_tokens": 64, **options}, {})), 0.0)


def test_a_worker_says_that_its_model_is_recurrent(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "engine.worker")
    runner, ready = started(checkpoint)
    assert ready.recurrent and (ready.pages, ready.slots) == (16, 2)
    lines = [record.getMessage() for record in caplog.records if "states" in record.getMessage()]
    assert lines == ["0 MiB of states of requests; a copy for a cached prefix takes 1 page"]
    assert {name: [layer.shape for layer in group] for name, group in runner.states.layers.items()} == {
        "window": [(3, 2, 12)] * 2,
        "state": [(3, 12)] * 2,
    }
    ids = PROMPTS[3]
    admit = SlotAdmit(1, np.array(ids, "<i4").tobytes(), GREEDY, len(ids))
    pages = [(1, index, 7 - index) for index in range(5)]
    steps = [step_plan(1, [(1, 0, len(ids), 1)], [admit], pages)]
    steps += [step_plan(2 + at, [(1, len(ids) + at, 1, 1)]) for at in range(5)]
    done = [runner.finish(runner.launch(plan)) for plan in steps]
    assert [np.frombuffer(each.tokens, "<i4")[0] for each in done] == alone(tuple(ids), 6)


def test_a_start_whose_states_do_not_fit_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.worker.memory.available_memory", lambda device: 1 << 20)
    said = r"the states of 4096 requests take 1.125 MiB, and cpu has 1 MiB for them; say --max-running 3639 or less"
    with pytest.raises(ConfigError, match=said):
        started(checkpoint, max_running=4096)


@pytest.mark.anyio
async def test_the_scheduler_reuses_no_prefix_of_a_recurrent_model_without_pages() -> None:
    for is_recurrent, cached in ((False, 8), (True, 0)):
        async with open_house(recurrent=is_recurrent) as house:
            for rid in ("a", "b"):
                await house.text(prompt("0123456789", rid, max_tokens=2))
            await house.settled()
            assert house.scheduler.scheduler is not None
            assert house.scheduler.scheduler.counts()["cached_tokens_total"] == cached


def test_one_recurrent_rank_makes_the_group_recurrent() -> None:
    plain = WorkerReady(10, 16, 4, 64, 160, 257, 8, "cpu", "torch", {})
    kept = WorkerReady(10, 16, 4, 64, 160, 257, 8, "cpu", "torch", {}, recurrent=True)
    assert least_of([plain, kept]).recurrent and not least_of([plain, plain]).recurrent


def test_a_copy_of_states_takes_what_the_rank_needs_that_needs_most() -> None:
    """A stage may have no recurrent layer, or nothing but these: then no page of it can hold a copy."""
    plain = WorkerReady(10, 16, 4, 64, 160, 257, 8, "cpu", "torch", {})
    kept = [structs.replace(plain, recurrent=True, state_pages=count) for count in (0, 3, 5)]
    assert least_of([plain, *kept[1:]]).state_pages == 5
    assert least_of(kept).state_pages == least_of([plain, plain]).state_pages == 0
