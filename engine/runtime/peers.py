"""What a front knows of the other fronts of its engine: how many there are, and what they answer when it asks.

    peers.answers(CountStored, count_stored)        # each front says once how it answers a kind of question
    counts = await peers.ask(CountStored())         # the answers of all the others, in the order of their numbers

Questions are of the form of those to the worker (messages/questions.py), and travel over the hub (hub.py). A front that
is alone has nobody to ask. Left out: who answers for a client that may be at any front, which each route says.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from engine.messages.fronts import PeerAnswer, PeerAnswers, PeerAsk
from engine.messages.questions import Question, Value
from engine.runtime.channel import Outbox

log = logging.getLogger("engine.runtime.peers")

Kind = TypeVar("Kind", bound=Question[Any])


class Peers:
    """Front `number` of `count`; without a `hub` it is alone. The fronts meet in `folder`, where each has a socket for
    what others pass on to it (http/passing.py)."""

    def __init__(
        self, number: int = 0, count: int = 1, hub: Outbox[PeerAsk] | None = None, *, folder: str = ""
    ) -> None:
        assert (hub is None) == (count == 1), "several fronts have a hub, and one has none"
        self.number = number
        self.count = count
        self.folder = folder
        self._hub = hub
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[PeerAnswers]] = {}
        self._handlers: dict[str, tuple[type, Callable[[Any], Awaitable[Any]]]] = {}

    async def ask(self, question: Question[Value]) -> list[Value]:
        """The answers of every other front, in the order of their numbers; one that dies meanwhile, is still starting
        or does not answer for seconds is left out."""
        if self._hub is None:
            return []
        number = next(self._numbers)
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            await self._hub.send(PeerAsk(self.number, number, type(question).__name__, question.packed()))
            answers = await future
        finally:
            del self._asked[number]
        return [question.read(each.value) for each in answers.values]

    def answers(self, kind: type[Kind], handler: Callable[[Kind], Awaitable[Any]]) -> None:
        """`handler` answers what other fronts ask of this `kind` from now on. It raises nothing."""
        self._handlers[kind.__name__] = kind, handler

    async def answer(self, asked: PeerAsk) -> PeerAnswer:
        """This front's answer to another one."""
        if asked.kind not in self._handlers:
            return PeerAnswer(asked.asker, asked.number, None)
        kind, handler = self._handlers[asked.kind]
        value = await handler(msgspec.msgpack.decode(asked.question, type=kind))
        return PeerAnswer(asked.asker, asked.number, msgspec.msgpack.encode(value))

    def answered(self, answers: PeerAnswers) -> None:
        """The hub has all answers to a question of this front, which may have left."""
        future = self._asked.get(answers.number)
        if future is not None and not future.done():
            future.set_result(answers)
