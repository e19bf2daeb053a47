"""Embeddings of media: made before they are needed, within the budget of a step and the room for them, in any order."""

from array import array
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_copies import SimulatedCopies
from simulated_device import SimulatedDevice, naive, sampling

from engine.cache.keys import keys_with, media_keys
from engine.errors import RequestError
from engine.messages.assets import Bound
from engine.messages.media import MEDIA, MediaUse, Slice, media_need
from engine.messages.request import Admit
from engine.messages.step import StepDone, StepPlan
from engine.sched import Scheduler
from engine.sched.chunks import ChunkRule
from engine.sched.copies import Copies
from engine.sched.encoder import Encoder
from engine.sched.request import shown_by
from engine.testing.steps import rows_of
from engine_plugins.policies.order import FirstComeFirstServed

SIZES = (1, 3, 4, 6)  # embeddings of each picture that there is
CLIP = (1, 2, 1)  # pictures that are its slices


class SeeingDevice(SimulatedDevice):
    """One that holds embeddings as it is told, and looks whether its rows find what they show."""

    def __init__(self, encoder: Encoder, **options: Any) -> None:
        super().__init__(**options)
        self.encoder = encoder
        self.held: dict[int, int] = {}
        self.encoded: list[int] = []

    def run(self, plan: StepPlan) -> StepDone:
        for number in array("i", plan.forgets)[1::2]:
            del self.held[number]
        made = array("i", plan.encodes)[1::2].tolist()
        assert not self.held.keys() & set(made), "what is held is made again"
        self.held |= {number: SIZES[number - 1] for number in made}
        self.encoded += made
        assert len(set(made)) == len(made) and sum(SIZES[number - 1] for number in made) <= self.encoder.budget
        assert sum(self.held.values()) <= self.encoder.room
        done = super().run(plan)
        for slot, start, length, _ in rows_of(plan):
            for shown in shown_by(self.admits[slot].bound):
                past, end = shown.begin + shown.count, start + length
                if shown.begin < end and start < past:
                    assert shown.number in self.held, f"a row shows {shown.number}, which is not there"
                    assert not shown.whole or end >= past, "a step ends within a picture whose tokens see each other"
        return done


def admitted(
    rid: str, pieces: list[int], whole: bool, seed: int = 0, max_new: int = 3
) -> tuple[Admit, tuple[Bound, ...]]:
    """A request: a piece below 4 is a token, others are pictures, 4 the first of SIZES, and 8 is CLIP."""
    ids, runs, spans = array("i"), [], dict[int, list[tuple[int, int]]]()
    for piece in pieces:
        if piece < 4:
            ids.append(piece)
            continue
        for number in CLIP if piece == 8 else (piece - 3,):
            size = SIZES[number - 1]
            runs.append((len(ids), media_keys(bytes([number]), size)))
            spans.setdefault(number, []).append((len(ids), size))
            ids += array("i", [0] * size)
    bound = []
    for number, own in spans.items():
        need = media_need(Slice(b"", own[0][1], bytes([number])), MediaUse(tuple(own), own[0][1], whole))
        bound.append(Bound(MEDIA, number, need.use))
    keys = keys_with(ids, runs).tobytes()
    admit = Admit(rid, ids.tobytes(), sampling(seed, keys=keys), (), max_new, keys=keys)
    return admit, tuple(bound)


class Run:
    """A scheduler and its device, or several `copies` of attention, with `depth` steps in flight."""

    def __init__(self, encoder: Encoder, lanes: int = 1, depth: int = 2, copies: int = 1, **options: Any) -> None:
        sizes = {"pages": 24, "page_size": 2, "slots": 3 * copies, "max_step_tokens": 8, **options}
        options = {
            **sizes, "max_model_len": 40, "policy": FirstComeFirstServed(), "prefix_cache": True, "max_waiting": 99,
            "chunks": ChunkRule(sizes["max_step_tokens"], lanes, 0.0, least=2) if lanes > 1 else None,
            "encoder": encoder,
        }  # fmt: skip
        self.scheduler: Any = Scheduler(**options) if copies == 1 else Copies(copies, **options, held_steps=0)
        parts = [self.scheduler] if copies == 1 else self.scheduler.copies
        self.devices = [SeeingDevice(part.encoder, **{**sizes, "slots": 3}) for part in parts]
        self.device = self.devices[0] if copies == 1 else SimulatedCopies(copies, **sizes, devices=self.devices)
        self.depth, self.flying = depth, deque[StepPlan]()
        self.said: dict[str, list[int]] = {}

    def step(self) -> None:
        while len(self.flying) < self.depth and (plan := self.scheduler.plan()) is not None:
            self.flying.append(plan)
        assert self.flying, "requests wait, and nothing runs"
        for tokens in self.scheduler.commit_each(self.device.run(self.flying.popleft())):
            said, at = array("i", tokens.tokens), 0
            for rid, count in zip(tokens.rids, array("i", tokens.counts), strict=True):
                self.said.setdefault(rid, []).extend(said[at : at + count])
                at += count

    def drain(self) -> dict[str, list[int]]:
        steps = 0
        while self.scheduler.live.by_rid:
            self.step()
            steps += 1
            assert steps < 500, "no progress"
        self.scheduler.check_integrity()
        return self.said


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=7), min_size=1, max_size=6),
    budget=st.sampled_from([6, 7, 12]),
    more=st.sampled_from([0, 2, 3, 20]),
    tokens=st.sampled_from([6, 8, 30]),
    whole=st.booleans(),
    lanes=st.sampled_from([1, 1, 2, 3]),
    depth=st.integers(1, 3),
    pages=st.sampled_from([22, 40]),
    copies=st.sampled_from([1, 1, 2, 3]),
)
def test_rows_find_what_they_show(
    prompts: list[list[int]],
    budget: int,
    more: int,
    tokens: int,
    whole: bool,
    lanes: int,
    depth: int,
    pages: int,
    copies: int,
) -> None:
    run = Run(Encoder(budget, budget + more), lanes, depth, copies, pages=pages, max_step_tokens=tokens)
    requests = [admitted(str(index), pieces, whole, seed=index) for index, pieces in enumerate(prompts)]
    requests = [(admit, bound) for admit, bound in requests if len(admit.ids) // 4 <= 36]
    for admit, bound in requests:
        run.scheduler.admit(admit, bound)
    said = run.drain()
    assert said == {admit.rid: naive(admit)[0] for admit, _ in requests}


def test_a_medium_is_made_once_and_not_at_all_behind_cached_pages() -> None:
    run = Run(Encoder(8, 20))
    run.scheduler.admit(*admitted("a", [1, 7, 2, 6, 3], whole=False))
    run.scheduler.admit(*admitted("b", [2, 7, 6, 1], whole=False))
    run.drain()
    assert sorted(run.device.encoded) == [3, 4]
    run.scheduler.encoder.clear()
    run.device.held.clear()
    run.scheduler.admit(*admitted("c", [1, 7, 2, 6, 3], whole=False))
    run.drain()
    assert len(run.device.encoded) == 2


def test_a_request_goes_to_the_copy_of_attention_that_has_what_it_shows() -> None:
    run = Run(Encoder(8, 20), copies=2)
    for rid, pieces in (("a", [1, 7]), ("b", [2, 6]), ("c", [3, 6, 1]), ("d", [0, 7, 2]), ("e", [0, 6, 7])):
        run.scheduler.admit(*admitted(rid, pieces, whole=False))
        if rid == "b":
            assert run.drain().keys() == {"a", "b"}
    run.drain()
    assert [device.encoded for device in run.devices] == [[4, 3], [3]]


def test_slices_are_made_once_whatever_they_are_a_part_of() -> None:
    run = Run(Encoder(8, 20))
    encoder = run.scheduler.encoder
    for rid, pieces, made in (
        ("the clip, whose first slice is its last", [1, 8], [1, 2]),
        ("a picture that is one of its slices", [2, 5, 1], []),
        ("another picture, between both", [3, 8, 6, 8], [3]),
    ):
        run.device.encoded.clear()
        run.scheduler.admit(*admitted(rid, pieces, whole=False))
        run.drain()
        assert run.device.encoded == made, rid
    assert encoder.counts == {"slices_shown_total": 3 + 1 + 7, "slices_made_total": 3}
    encoder.forget(2)  # one slice alone has to be made again
    del run.device.held[2]
    run.scheduler.admit(*admitted("again", [0, 8], whole=False))
    run.drain()
    assert run.device.encoded == [3, 2]


@pytest.mark.parametrize("tokens", [1, 2, 3, 30])
def test_a_clip_of_more_than_a_step_makes_and_there_is_room_for_is_made_over_several(tokens: int) -> None:
    """Wherever a step of so many tokens ends, within a slice or between two."""
    run = Run(Encoder(3, 3), max_step_tokens=tokens)
    run.scheduler.admit(*admitted("a", [2, 8, 1], whole=False))
    assert run.drain() == {"a": naive(admitted("a", [2, 8, 1], whole=False)[0])[0]}
    assert run.device.encoded == [1, 2, 1]  # for the second, of 3, the first makes room


def test_the_one_used_least_recently_makes_room_and_is_made_again() -> None:
    run = Run(Encoder(6, 10))
    for rid, piece in (("a", 6), ("b", 7), ("c", 6), ("d", 5), ("e", 7), ("f", 6)):
        run.scheduler.admit(*admitted(rid, [ord(rid) % 4, len(run.said) % 4, piece, 1], whole=False))
        run.drain()
    assert run.device.encoded == [3, 4, 2, 4, 3]  # for d, of 3, b's makes room, and for e's of 6 a's and c's


def test_who_asks_for_more_than_a_step_makes_is_refused_with_both_numbers() -> None:
    scheduler = Run(Encoder(2, 5), max_step_tokens=8).scheduler
    with pytest.raises(
        RequestError, match="an image, or a frame of a video, takes 4 tokens, and at most 2 are made in"
    ):
        scheduler.admit(*admitted("a", [6], whole=False))
    scheduler = Run(Encoder(3, 4), max_step_tokens=8).scheduler
    with pytest.raises(RequestError, match="takes 4 tokens, and at most 3 are made in a step"):
        scheduler.admit(*admitted("a", [8, 6], whole=False))
    scheduler = Run(Encoder(9, 9), max_step_tokens=5).scheduler
    with pytest.raises(RequestError, match="6 tokens that see each other, and a step computes at most 5"):
        scheduler.admit(*admitted("a", [7], whole=True))
    scheduler.admit(*admitted("a", [7], whole=False))


def test_a_model_that_sees_nothing_names_no_option_that_would_not_help() -> None:
    with pytest.raises(
        RequestError, match="reads text alone: its plugin does not say that it sees; send text"
    ) as caught:
        Run(Encoder()).scheduler.admit(*admitted("a", [5, 1], whole=False))
    assert caught.value.code == "unsupported_parameter"


def test_another_device_holds_nothing() -> None:
    run = Run(Encoder(6, 20), depth=1)
    run.scheduler.admit(*admitted("a", [1, 7, 2], whole=False, max_new=9))
    run.step()
    assert run.scheduler.reset() == ["a"] and run.device.encoded == [4]
    run.flying.clear()
    run.device.held.clear()
    run.scheduler.admit(*admitted("a", [1, 7, 2], whole=False))
    run.drain()
    assert run.device.encoded == [4, 4]
