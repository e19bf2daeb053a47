"""Between the supervisor, which holds the core, and front processes: how a front starts and ends, and what fronts ask
each other. What goes to and from the scheduler travels beside these as it is."""

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
