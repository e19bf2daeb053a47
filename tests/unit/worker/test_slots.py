"""What is drawn in a slot depends on the request that has it, and on nobody who had it before.

The tables by slot of Adjustments and Sampler, with the kernels' definitions in torch or, where there is a GPU, with the
kernels. Interpreted ones are held to the same in tests/lib/triton_logits.py, a whole runner in
test_slot_histories.py."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import choose
from engine.messages.step import SlotAdmit
from engine.params.sampling import Sampling
from engine.worker.sampling.adjustments import Adjustments
from engine.worker.sampling.logprobs import Scores, score
from engine.worker.sampling.sampler import Columns, Sampler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS, VOCABULARY, POSITIONS = 3, 40, 32
KERNELS = choose(DEVICE, torch.float32).logits
FEW = 4  # the ids that texts and bad words are made of, so that these match

Row = tuple[torch.Tensor, int, tuple[bytes, ...], Columns]  # logits as adjusted, the token drawn, scores, parameters


def packed(*ids: int) -> bytes:
    return np.array(ids, "<i4").tobytes()


def several(least: int, most: int, size: int = FEW) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size - 1), min_size=least, max_size=most)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, what has been said in reply, and all that the client asks for."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    asked: Sampling

    def admit(self, slot: int) -> SlotAdmit:
        return SlotAdmit(slot, packed(*self.prompt, *self.reply), self.asked, len(self.prompt))

    @property
    def end(self) -> int:
        return len(self.prompt) + len(self.reply)

    def logits(self) -> torch.Tensor:
        """[V], what a model might say; some are equal."""
        generator = torch.Generator().manual_seed(hash((self.prompt, self.reply)) % 2**63)
        return (torch.randn(VOCABULARY, generator=generator) * 6).round() / 2


@st.composite
def requests(draw: st.DrawFn) -> Request:
    def maybe(strategy: st.SearchStrategy[Any], otherwise: Any) -> Any:
        return draw(strategy) if draw(st.booleans()) else otherwise

    words = st.lists(several(1, 7).map(lambda ids: packed(*ids)), min_size=1, max_size=20, unique=True)
    biases = maybe(st.dictionaries(st.integers(0, VOCABULARY), st.sampled_from([-100.0, -1.5, 2.0, 50.0])), {})
    asked = Sampling(
        temperature=maybe(st.sampled_from([0.5, 1.0, 2.0]), 0.0),
        top_k=maybe(st.integers(1, VOCABULARY + 1), 0),
        top_p=maybe(st.sampled_from([0.3, 0.9]), 1.0),
        min_p=maybe(st.sampled_from([0.05, 0.5]), 0.0),
        seed=draw(st.integers(0, 5)),
        presence_penalty=maybe(st.sampled_from([-2.0, 0.5]), 0.0),
        frequency_penalty=maybe(st.sampled_from([-0.5, 2.0]), 0.0),
        repetition_penalty=maybe(st.sampled_from([0.5, 1.5]), 1.0),
        bias_ids=packed(*biases),
        biases=np.array([*biases.values()], "<f4").tobytes(),
        min_tokens=maybe(st.integers(1, 8), 0),
        stop_ids=packed(*maybe(several(1, 40, VOCABULARY), [])),
        bad_words=tuple(maybe(words, ())),
        allowed_ids=packed(*maybe(several(1, 9, VOCABULARY), [])),
        logprobs=maybe(st.integers(0, 3), -1),
        prompt_logprobs=maybe(st.integers(0, 3), -1),
    )
    return Request(tuple(draw(several(1, 12))), tuple(draw(several(0, 12))), asked)


class Device:
    """The tables by slot of a device that has no model."""

    def __init__(self) -> None:
        self.tokens = torch.zeros(SLOTS, POSITIONS, dtype=torch.int32, device=DEVICE)
        self.sampler = Sampler(self.tokens, torch.zeros(SLOTS, dtype=torch.int64, device=DEVICE), KERNELS)
        self.adjustments = Adjustments(SLOTS, VOCABULARY, DEVICE, KERNELS)
        self.requests: dict[int, Request] = {}

    def admit(self, requests: dict[int, Request]) -> None:
        admits = [request.admit(slot) for slot, request in requests.items()]
        self.sampler.admit(admits)
        self.adjustments.admit(admits)
        for admit in admits:
            ids = np.frombuffer(admit.ids, "<i4")
            self.tokens[admit.slot, : len(ids)] = torch.from_numpy(ids.copy()).to(DEVICE)
        self.requests |= requests

    def step(self, slots: list[int]) -> list[Row]:
        """One token for each of `slots`."""
        which, ends = np.array(slots), np.array([self.requests[slot].end for slot in slots])
        logits = torch.stack([self.requests[slot].logits() for slot in slots]).to(DEVICE)
        adjusted = logits.clone()
        self.adjustments.apply(adjusted, which, ends, self.tokens)
        on_device = torch.from_numpy(np.stack((which, ends - 1))).to(DEVICE)
        drawn = self.sampler.draw(adjusted, which, on_device)
        assert self.tokens[which, ends].tolist() == drawn.tolist()
        columns, scores = self.sampler.columns.rows(which), score(KERNELS, logits, drawn).moved(torch.Tensor.cpu)
        return [
            (adjusted[row], int(drawn[row]), told(scores, row, int(columns.logprobs[row])), one(columns, row))
            for row in range(len(slots))
        ]


def told(scores: Scores, row: int, wide: int) -> tuple[bytes, ...]:
    if wide < 0:
        return ()
    said = scores.message(0, row, row + 1, wide)
    return said.logprobs, said.ranks, said.top_ids, said.top_logprobs


def one(columns: Columns, row: int) -> Columns:
    return columns.rows(np.array([row]))


def assert_same(got: Row, alone: Row) -> None:
    assert torch.equal(got[0], alone[0])
    assert got[1:3] == alone[1:3]
    assert all(np.array_equal(getattr(got[3], f.name), getattr(alone[3], f.name)) for f in dataclasses.fields(Columns))


def alone(slot: int, request: Request) -> Row:
    """What `request` gets from a device that never saw another."""
    fresh = Device()
    fresh.admit({slot: request})
    return fresh.step([slot])[0]


@settings(deadline=None, max_examples=60)
@given(history=st.lists(st.dictionaries(st.integers(0, SLOTS - 1), requests(), min_size=1), min_size=1, max_size=5))
def test_a_reply_does_not_depend_on_who_had_its_slot(history: list[dict[int, Request]]) -> None:
    device = Device()
    for admitted in history:
        device.admit(admitted)
        slots = sorted(device.requests)
        for slot, row in zip(slots, device.step(slots), strict=True):
            assert_same(row, alone(slot, device.requests[slot]))


LONG = tuple(packed(*(number % FEW for number in range(first, first + 9))) for first in range(20))
ASKED = {
    "nothing": {},
    "a bias": {"bias_ids": packed(5), "biases": np.array([1], "<f4").tobytes()},
    "bad words": {"bad_words": (packed(2, 3), packed(1, 2, 3))},
    "long bad words": {"bad_words": LONG},
    "penalties": {"frequency_penalty": 1.0},
    "the shortest reply": {"min_tokens": 9, "stop_ids": packed(*range(30))},
    "ids": {"allowed_ids": packed(*range(20, 30))},
}


@pytest.mark.parametrize("before", ASKED)
def test_a_request_after_another_beside_a_third(before: str) -> None:
    """Bad words, then a bias, beside other bad words: the bias's row was read as far as the others' are long."""

    def request(name: str) -> Request:
        return Request((1, 2), (3, 0, 1, 2), Sampling(1.0, 0, 1.0, 0.0, 0, **ASKED[name]))

    for after, beside in itertools.product(ASKED, ASKED):
        device = Device()
        device.admit({0: request(before), 1: request(before)})
        device.admit({0: request(after)})
        device.admit({1: request(beside)})
        for row, (slot, name) in zip(device.step([0, 1]), enumerate((after, beside)), strict=True):
            assert_same(row, alone(slot, request(name)))


def spoil(holder: Adjustments | Sampler) -> None:
    """Writes over every array by slot that `holder` has, as requests might that ask for what nobody asks for yet."""
    for name, array in vars(holder).items():
        if isinstance(array, np.ndarray) and SLOTS in array.shape:
            array[...] = 1
        elif isinstance(array, torch.Tensor) and SLOTS in array.shape and name != "_tokens":
            array.fill_(1)


@settings(deadline=None, max_examples=30)
@given(request=requests())
def test_an_admitted_slot_keeps_nothing_of_any_table(request: Request) -> None:
    """A table by slot that is added one day, and not written whole by whoever is admitted, fails here."""
    device = Device()
    wide = Request((1,), (), Sampling(1.0, 0, 1.0, 0.0, 0, bad_words=LONG, allowed_ids=packed(1)))
    device.admit(dict.fromkeys(range(SLOTS), wide))  # so that all tables are there
    spoil(device.sampler)
    spoil(device.adjustments)
    for field in dataclasses.fields(Columns):
        getattr(device.sampler.columns, field.name)[...] = 1
    tables = device.adjustments._tables
    tables.edits[:, 1].random_(0, FEW)
    tables.columns.random_(0, FEW)
    device.admit(dict.fromkeys(range(SLOTS), request))
    for slot, row in enumerate(device.step([*range(SLOTS)])):
        assert_same(row, alone(slot, request))
