"""What the worker answers: one table of questions by their type.

A question reaches the worker between two steps, so an answer sees all that was launched before. It must be quick: no
step is launched meanwhile. What is asked, and what is answered, stands in engine/messages/questions.py.
"""

from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from typing import Any

import msgspec

from engine.errors import RequestError
from engine.messages.control import Answer, Ask
from engine.messages.questions import CountExperts, Echo, LookAtExperts, Profile, Question, RebalanceExperts
from engine.worker.experts import ExpertWatch
from engine.worker.profiling import StepProfiler


class Questions:
    """Answers each Ask from its table; `in_flight` says how many steps are launched and not finished."""

    def __init__(self, experts: ExpertWatch, profiler: StepProfiler, in_flight: Callable[[], int]) -> None:
        self._table: Mapping[type[Question[Any]], Callable[[Any], Any]] = {
            Profile: lambda asked: profiler.answer(asked, in_flight()),
            CountExperts: lambda asked: experts.count(asked.action),
            LookAtExperts: lambda asked: experts.look(now=asked.now),
            RebalanceExperts: lambda asked: experts.rebalance(),
            Echo: lambda asked: asked.value,
        }
        self._decoder = msgspec.msgpack.Decoder(reduce(or_, self._table))

    def answer(self, ask: Ask) -> Answer:
        """The answer to `ask`, or the cause of a RequestError that says why there is none."""
        try:
            asked = self._decoder.decode(ask.question)
            return Answer(ask.number, msgspec.msgpack.encode(self._table[type(asked)](asked)))
        except RequestError as error:
            return Answer(ask.number, cause=error.message)
