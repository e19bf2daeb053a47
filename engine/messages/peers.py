"""What fronts ask each other: about requests and stored things that another front may have."""

from engine.messages.questions import Question


class AbortRequests(Question[int], frozen=True):
    """End what runs at this front as `rid` of `owner`, or with None everything of everybody. The value is how many
    replies were open."""

    rid: str | None
    owner: bytes = b""


class ClaimIds(Question[str | None], frozen=True):
    """Front `asker` wants to run requests as `rids`. The value is one of them that runs here, or is about to and comes
    first: of two fronts that claim one id at once, the lower number has it. None where there is no such."""

    asker: int
    rids: tuple[str, ...]


class ForgetOldest(Question[int], frozen=True):
    """The stores of responses hold too much together: forget those that ended before all others elsewhere. The value is
    how many were forgotten."""
