"""What a program needs of a model: replies, and log-probabilities of choices.

    program ── Prompt ──> Backend ──┬── an engine in this process (local.py)
                                    └── a server over HTTP (server.py)

Left out: what is asked for; calls.py makes one gen or select of these.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from anyio.from_thread import BlockingPortal
from msgspec import Struct

from engine.lang.tools import Tool, ToolCall
from engine.lang.transcript import Prompt
from engine.lang.values import Meta
from engine.params.sampling import SamplingParams
from engine.runtime.choices import Scores
from engine.runtime.decisions import Question


class Piece(Struct, frozen=True):
    """What is new of a reply. The last one has its `meta`."""

    text: str
    reasoning: str = ""
    meta: Meta | None = None


class Offer(Struct, frozen=True):
    """Tools that a model is told of; `choice` is auto, required or none."""

    tools: Sequence[Tool]
    choice: str


class Spoken(Struct, frozen=True):
    """A whole reply of a model that has tools: what it says, what it thinks, and what it calls."""

    text: str
    reasoning: str
    calls: tuple[ToolCall, ...]
    meta: Meta


class Backend(ABC):
    """A model that programs call."""

    @property
    @abstractmethod
    def portal(self) -> BlockingPortal | None:
        """The event loop that it lives in, if that is in a thread of its own; None: the one that runs."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that it lives in; None: any."""
        return None

    @abstractmethod
    def check(self, prompt: Prompt, params: SamplingParams | None, *, separate: bool = False) -> None:
        """Raises RequestError, which says what to do, if it cannot do this: a reply with `params`, its reasoning told
        apart if `separate`; without `params`, a select."""

    @abstractmethod
    def reply(
        self, prompt: Prompt, params: SamplingParams, *, separate: bool, stream: bool, program: str
    ) -> AsyncGenerator[Piece, None]:
        """The reply, piece by piece, or with `stream` false in one if that costs less; closing the generator ends the
        request, which is a call of `program`. Raises RequestError, WorkerError."""

    @abstractmethod
    async def answer(
        self, prompt: Prompt, params: SamplingParams, offer: Offer, *, separate: bool, program: str
    ) -> Spoken:
        """The reply to messages of a model that is told of the tools of `offer`. Raises as `reply`."""

    @abstractmethod
    async def scores(
        self, prompt: Prompt, choices: Sequence[str], *, alone: bool, program: str
    ) -> tuple[list[Scores], Meta]:
        """What each of `choices` gets behind `prompt`, all computed together; if `alone`, also what it gets without.
        Raises as `reply`."""

    @abstractmethod
    async def decide(
        self, messages: Sequence[dict[str, Any]], question: Question, *, program: str
    ) -> tuple[list[float], Meta]:
        """The probability of each option of `question` about `messages`. Raises as `reply`."""

    async def end(self, program: str) -> None:  # noqa: B027 - not every server knows programs
        """No more calls of `program` will come. Does not wait for the server."""
