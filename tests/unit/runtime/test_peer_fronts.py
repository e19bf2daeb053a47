"""Peers: a question reaches the others' handlers, and its answers come back in order."""

import anyio
import pytest

from engine.messages.fronts import PeerAnswers, PeerAsk, PeerValue
from engine.messages.questions import Question
from engine.runtime.peers import Peers

pytestmark = pytest.mark.anyio


class Add(Question[int], frozen=True):
    number: int


class Never(Question[int], frozen=True):
    pass


class Wire:
    """A hub of one question at a time, which a test answers."""

    def __init__(self) -> None:
        self.asked: list[PeerAsk] = []
        self.came = anyio.Event()

    async def send(self, item: PeerAsk) -> None:
        self.asked.append(item)
        self.came.set()


async def test_a_front_that_is_alone_asks_nobody() -> None:
    assert await Peers().ask(Add(1)) == []


async def test_the_answers_of_the_others_come_as_the_types_that_questions_say() -> None:
    wire = Wire()
    peers = Peers(1, 3, wire)
    others = {number: Peers(number, 3, Wire()) for number in (0, 2)}

    def answers_with(number: int) -> None:
        async def add(question: Add) -> int:
            return question.number + number

        others[number].answers(Add, add)

    for number in others:
        answers_with(number)
    got: list[list[int]] = []

    async def ask() -> None:
        got.append(await peers.ask(Add(40)))

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await wire.came.wait()
        (asked,) = wire.asked
        assert asked.asker == 1
        values = []
        for number, other in others.items():
            answer = await other.answer(asked)
            assert (answer.asker, answer.number) == (1, asked.number) and answer.value is not None
            values.append(PeerValue(number, answer.value))
        peers.answered(PeerAnswers(asked.number, tuple(values)))
    assert got == [[40, 42]]
    assert (await others[0].answer(PeerAsk(1, 5, "Never", Never().packed()))).value is None


async def test_an_answer_to_who_has_left_is_dropped() -> None:
    wire = Wire()
    peers = Peers(0, 2, wire)
    with anyio.move_on_after(0.01) as scope:
        await peers.ask(Add(1))
    assert scope.cancelled_caught
    peers.answered(PeerAnswers(wire.asked[0].number, ()))
