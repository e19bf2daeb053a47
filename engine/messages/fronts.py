"""Between the supervisor, which holds the core, and front processes: how a front starts and ends, and what fronts ask
each other. What goes to and from the scheduler travels beside these as it is."""

from typing import Literal

from engine.config import Config
from engine.messages.base import Message, Part


class PeerAsk(Message, frozen=True):
    """front → hub → each other front: `asker` asks question `number` of the type `kind` (a Question, packed)."""

    asker: int
    number: int
    kind: str
    question: bytes


class PeerAnswer(Message, frozen=True):
    """front → hub: what it answers to such a PeerAsk, packed; None where it knows no questions of that type."""

    asker: int
    number: int
    value: bytes | None


class PeerValue(Part, frozen=True):
    """What front `number` has answered."""

    number: int
    value: bytes


class PeerAnswers(Message, frozen=True):
    """hub → front that asked `number`: all that was answered, in the order of the fronts."""

    number: int
    values: tuple[PeerValue, ...]


class FrontBoot(Message, frozen=True):
    """supervisor → front: the first frame. It is front `number` of `count`, the `life`th process of that number.

    It inherits the descriptors `board` (runtime/board.py) and `sockets`, which listen. In `folder` the fronts have the
    sockets over which they pass on requests; `created` is when the engine was started, in seconds since 1970."""

    config: Config
    number: int
    count: int
    life: int
    board: int
    sockets: tuple[int, ...]
    folder: str
    created: int


class Listening(Message, frozen=True):
    """front → supervisor: it answers what comes to its sockets; `chats`, the model has a chat template."""

    chats: bool = False


class Refused(Message, frozen=True):
    """front → supervisor: an option cannot work; `kind` is the class of the error."""

    kind: Literal["ConfigError", "PluginError"]
    message: str


class Drain(Message, frozen=True):
    """supervisor → front: let in nothing more, and say Drained once nothing is open, or after so many seconds."""

    seconds: float


class Drained(Message, frozen=True):
    """front → supervisor: the answer to Drain."""


class FrontLost(Message, frozen=True):
    """hub → scheduler: front `number` is gone; end all requests that it has sent."""

    number: int
