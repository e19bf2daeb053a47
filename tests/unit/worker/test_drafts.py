"""Rows that yield several tokens, on the worker's tables: the replies are those of one token at a time."""

from array import array
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_slot_histories import SIZE, harness, packed
from torch import Tensor

from engine.layers.batch import Batch
from engine.messages.reply import Tokens
from engine.messages.request import Admit
from engine.messages.step import DRAFTS, NOTHING, TOKEN, Logprobs, StepPlan
from engine.params.sampling import Sampling
from engine.plugin.testing import ModelHarness
from engine.sched import Scheduler
from engine.testing.steps import rows_of, step_plan
from engine.worker.steps.batch import build_batch
from engine.worker.steps.drafts import Draws, held, real_starts
from engine.worker.steps.results import Head, Step
from engine.worker.steps.rows import Rows
from engine_plugins.policies.order import FirstComeFirstServed

DRAFTED = 3
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [2, 7, 1, 8, 2]]
ASKED = [
    Sampling(0.0, 0, 1.0, 0.0, 0, logprobs=1),
    Sampling(0.9, 12, 0.9, 0.01, 5, logprobs=2, frequency_penalty=1.0, bad_words=(packed([1, 2]), packed([5]))),
    Sampling(0.7, 0, 1.0, 0.0, 11, repetition_penalty=1.3, prompt_logprobs=1),
]
LENGTHS = (17, 9, 26)


@dataclass
class Told:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""
    steps: int = 0


class Drive:
    """A scheduler and a runner with `depth` steps between them. Before a step, drafts are written behind what each slot
    holds: those of `known` replies, but the wrong ones where `right` says no."""

    def __init__(self, drafts: int, depth: int, known: dict[str, Told] | None = None, right: str = "") -> None:
        self.made: ModelHarness = harness("torch")
        self.scheduler = Scheduler(
            pages=48, page_size=4, slots=3, max_model_len=64, max_step_tokens=16, policy=FirstComeFirstServed(),
            prefix_cache=True, max_waiting=9, drafts=drafts,
        )  # fmt: skip
        self.depth, self.known, self.right = depth, known or {}, deque(right)
        self.flying: deque[Step] = deque()
        self.told: dict[str, Told] = {}
        self.prompts: dict[int, tuple[str, int]] = {}

    def replies(self, stop_ids: tuple[int, ...] = ()) -> dict[str, Told]:
        for number, (ids, sampling, most) in enumerate(zip(PROMPTS, ASKED, LENGTHS, strict=True)):
            self.told[str(number)] = Told()
            self.scheduler.admit(Admit(str(number), packed(ids), sampling, stop_ids, most))
        while any(not told.finish for told in self.told.values()):
            while len(self.flying) < self.depth and (plan := self.scheduler.plan()) is not None:
                self.flying.append(self.launch(plan))
            self.take(self.scheduler.commit(self.made.runner.finish(self.flying.popleft())))
        return self.told

    def launch(self, plan: StepPlan) -> Step:
        runner = self.made.runner
        for admit in plan.admits:  # one prompt is told from another by its seed
            number = [asked.seed for asked in ASKED].index(admit.sampling.seed)
            self.prompts[admit.slot] = str(number), len(PROMPTS[number])
        for slot, _, length, yields in rows_of(plan):
            if yields == DRAFTS and slot not in [admit.slot for admit in plan.admits]:
                rid, prompt_len = self.prompts[slot]
                first = int(runner.lengths[slot])
                reply = self.known[rid].tokens[first - prompt_len :]
                for index in range(min(length - 1, len(reply))):
                    self.right.rotate(-1)
                    runner.tokens[slot, first + index] = (reply[index] + (self.right[0] == "n")) % SIZE
        return runner.launch(plan)

    def take(self, tokens: Tokens | None) -> None:
        if tokens is None:
            return
        flat = deque(array("i", tokens.tokens))
        scores: dict[int, Logprobs] = {scores.row: scores for scores in tokens.logprobs}
        for row, (rid, count) in enumerate(zip(tokens.rids, array("i", tokens.counts), strict=True)):
            told = self.told[rid]
            told.tokens += [flat.popleft() for _ in range(count)]
            told.steps += 1
            if row in scores:
                told.logprobs += array("f", scores[row].logprobs)
        for finish in tokens.finishes:
            self.told[tokens.rids[finish.row]].finish = finish.reason


@pytest.fixture(scope="module")
def alone() -> dict[str, Told]:
    """The replies, one token at a time."""
    return Drive(drafts=0, depth=1).replies()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("right", ["y", "n", "yyn", "ynnyyyy"])
def test_drafts_change_nothing_but_the_number_of_steps(alone: dict[str, Told], depth: int, right: str) -> None:
    drive = Drive(DRAFTED, depth, alone, right)
    for rid, told in drive.replies().items():
        assert (told.tokens, told.finish) == (alone[rid].tokens, alone[rid].finish)
        assert told.logprobs == pytest.approx(alone[rid].logprobs, abs=1e-5)
    steps = [told.steps for told in drive.told.values()]
    if right == "y":
        assert steps == [-(-(length - 1) // (1 + DRAFTED)) + 1 for length in LENGTHS], "no step is wasted"
    if right == "n":
        assert steps == list(LENGTHS)
    drive.scheduler.check_integrity()


@pytest.mark.parametrize("depth", [1, 3])
def test_a_stop_id_among_drafts_ends_the_reply(alone: dict[str, Told], depth: int) -> None:
    stop = alone["2"].tokens[6]
    for rid, told in Drive(DRAFTED, depth, alone, "yyyn").replies((stop,)).items():
        whole = alone[rid].tokens
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert told.tokens == whole[:end]


def test_what_a_slot_has_stays_though_it_is_drawn_again() -> None:
    """A row near its limit begins earlier: what it then draws of known tokens may differ in the last bit of a logit."""
    runner = harness("torch").runner
    runner.tokens[1, :9] = torch.tensor([10, 11, 12, 13, 14, 15, 16, 17, 18], dtype=torch.int32)
    runner.lengths[1] = 6
    draws = Draws.of(Rows.of(np.array([(1, 3, 4, DRAFTS)])))
    slots, lasts = torch.full((4,), 1), torch.arange(3, 7)
    head = Head(draws, (slots, lasts), None, None, None, torch.full((4,), 6), torch.tensor([14, 15, 16, 17]))
    kept = runner.publish(head, torch.tensor([90, 91, 16, 40]))
    assert kept is not None and (kept.skipped.tolist(), kept.counts.tolist()) == ([2], [2])
    assert runner.tokens[1, :8].tolist() == [10, 11, 12, 13, 14, 15, 16, 40] and runner.lengths[1] == 8


def test_rows_begin_where_their_slots_stand() -> None:
    plan = step_plan(1, [(0, 4, 3, NOTHING), (1, 5, 4, DRAFTS), (2, 7, 1, TOKEN), (3, 5, 4, DRAFTS), (4, 5, 4, DRAFTS)])
    lengths = torch.tensor([20, 9, 8, 29, 30])
    limits = np.full(5, 30)
    assert real_starts(Rows.planned(plan), lengths, limits).tolist() == [4, 8, 7, 25, 25]


def test_a_batch_begins_where_the_device_says() -> None:
    tokens, table = torch.arange(120, dtype=torch.int32).view(3, 40), torch.arange(30, dtype=torch.int32).view(3, 10)
    sure = Rows.of(np.array([(2, 5, 4, DRAFTS), (0, 3, 6, NOTHING), (1, 7, 2, DRAFTS)]))
    real = Rows.of(np.array([(2, 9, 4, DRAFTS), (0, 3, 6, NOTHING), (1, 8, 2, DRAFTS)]))
    got = build_batch(sure, tokens, table, 4, (), torch.tensor([9, 3, 8]))
    wanted = build_batch(real, tokens, table, 4, ())

    def on_device(batch: Batch) -> list[list[int]]:
        columns: list[Tensor] = [batch.ids, batch.positions, batch.places, batch.slots, batch.row_starts]
        return [column.tolist() for column in columns]

    assert on_device(got) == on_device(wanted)
    assert got.starts.tolist() == [5, 3, 7]


@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([NOTHING, TOKEN, DRAFTS]), st.integers(1, 6), st.integers(0, 6), st.data()),
        min_size=1, max_size=5,
    )
)  # fmt: skip
def test_what_holds_is_what_a_loop_says(rows: list[tuple[int, int, int, st.DataObject]]) -> None:
    """Rows of any kind, some of which have tokens already that they draw again."""
    table = Rows.of(np.array([(slot, 10, length, yields) for slot, (yields, length, *_) in enumerate(rows)]))
    draws = Draws.of(table)
    assert draws.slots.tolist() == [
        slot
        for slot, (yields, length, *_) in enumerate(rows)
        for _ in range({NOTHING: 0, TOKEN: 1}.get(yields, length))
    ]
    drawn: list[int] = []
    drafted: list[int] = []
    positions: list[int] = []
    known: list[int] = []
    expected: list[tuple[int, int]] = []
    for yields, length, had, data in rows:
        if yields == NOTHING:
            continue
        count = length if yields == DRAFTS else 1
        had = min(had, count) if yields == DRAFTS else 0
        bits = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
        drawn += [7] * count
        drafted += [7 if bit else 8 for bit in bits]
        positions += range(11, 11 + count)
        known += [11 + had] * count
        holds = had
        while holds < count:
            holds += 1
            if not bits[holds - 1]:
                break
        expected.append((had, holds - had))
    if not drawn:
        return
    got = held(draws, *(torch.tensor(column) for column in (drawn, drafted, positions, known)))
    assert list(zip(got.skipped.tolist(), got.counts.tolist(), strict=True)) == expected
    chosen = draws.chosen(got.skipped.numpy(), got.counts.numpy())
    ends = np.cumsum(draws.counts)
    assert chosen.tolist() == [
        int(end - count + skipped + index)
        for end, count, (skipped, kept) in zip(ends, draws.counts, expected, strict=True)
        for index in range(kept)
    ]
