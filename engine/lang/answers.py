"""What programs read of a server's answers: calls of tools, choices and decisions. The text of replies is read as any
client reads it (engine/client/events.py)."""

from msgspec import Struct

from engine.errors import RequestError
from engine.lang.tools import ToolCall
from engine.runtime.choices import Scores


class CalledFunction(Struct, frozen=True):
    name: str
    arguments: str = ""


class MadeCall(Struct, frozen=True):
    function: CalledFunction
    id: str | None = None


class CallingMessage(Struct, frozen=True):
    tool_calls: list[MadeCall] | None = None


class CallingChoice(Struct, frozen=True):
    message: CallingMessage


class Whole(Struct, frozen=True):
    """A whole reply to a chat, of which the calls of tools are read."""

    choices: list[CallingChoice]

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls of the first choice."""
        made = self.choices[0].message.tool_calls or ()
        return tuple(ToolCall(call.function.name, call.function.arguments, call.id) for call in made)


class Tokens(Struct, frozen=True):
    """Of a usage, what is read."""

    prompt_tokens: int
    cached_tokens: int


class Chosen(Struct, frozen=True):
    """What /v1/choices answers."""

    choices: list[Scores]
    usage: Tokens


class Share(Struct, frozen=True):
    """Of an option's probability, what is read."""

    probability: float


class Answered(Struct, frozen=True):
    """An answer of /v1/decisions: to a statement its `probability`, else those of all options."""

    type: str
    probability: float | None = None
    probabilities: list[Share] = []

    @property
    def shares(self) -> list[float]:
        """The probabilities. Raises RequestError where the model has declined to answer."""
        if not self.probabilities:
            raise RequestError(f"the answer to the question is a {self.type}, which has no probabilities")
        return [share.probability for share in self.probabilities]


class CachedTokens(Struct, frozen=True):
    cached_tokens: int


class DecidedUsage(Struct, frozen=True):
    input_tokens: int
    input_tokens_details: CachedTokens


class Decided(Struct, frozen=True):
    """What /v1/decisions answers."""

    answers: list[Answered]
    usage: DecidedUsage
