"""What a program needs of a model: replies, token ids of a prompt, and log-probabilities of tokens.

    program ── Prompt ──> Backend ──┬── an engine in this process (local.py)
                                    └── a server over HTTP (server.py)

Left out: what is asked for; calls.py makes one gen or select of these.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence

from anyio.from_thread import BlockingPortal
from msgspec import Struct

from engine.lang.transcript import Prompt
from engine.lang.values import Meta
from engine.params.sampling import SamplingParams


class Piece(Struct, frozen=True):
    """What is new of a reply. The last one has its `meta`."""

    text: str
    reasoning: str = ""
    meta: Meta | None = None


class Scored(Struct, frozen=True):
    """Log-probabilities of the last tokens of a prompt; None is that of a prompt's first."""

    logprobs: list[float | None]
    meta: Meta


class Backend(ABC):
    """A model that programs call."""

    @property
    @abstractmethod
    def portal(self) -> BlockingPortal | None:
        """The event loop that it lives in, if that is in a thread of its own; None: the one that runs."""

    @abstractmethod
    def check(self, prompt: Prompt, params: SamplingParams | None, *, separate: bool = False) -> None:
        """Raises RequestError, which says what to do, if it cannot do this: a reply with `params`, its reasoning told
        apart if `separate`; without `params`, a select."""

    @abstractmethod
    def reply(self, prompt: Prompt, params: SamplingParams, *, separate: bool) -> AsyncGenerator[Piece, None]:
        """The reply, piece by piece; closing the generator ends the request. Raises RequestError, WorkerError."""

    @abstractmethod
    async def ids(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt."""

    @abstractmethod
    async def score(self, prompts: Sequence[list[int]], first: Sequence[int]) -> list[Scored]:
        """Of each of `prompts`, token ids, the log-probabilities from position `first` on, computed together."""
