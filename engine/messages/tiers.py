"""Pages of the KV cache on their way between the device and the tiers below it.

    device ──down──> pool ──keep──> store         pages are numbers on the device and in the pool, and names in a store
           <──up────      <──fetch──

Every rank moves its own part of each page. A move counts for the pages that all ranks have moved.
"""

from typing import Literal

from engine.messages.base import Message

PAGES = "pages"  # the kind of a need that is met when a store has given its pages, or is waited for no more
NAME_BYTES = 32

Way = Literal["down", "up", "keep", "fetch", "find", "clear"]


class Move(Message, frozen=True):
    """scheduler → worker: move pages; the answer is the Moved of this `number`.

    `pages` are those of the device and `slots` those of the pool (int32), `names` what a store knows them by, 32 bytes
    each. "find" asks which of `names` a store has, "clear" empties it. Of copies of attention the ranks of one `copy`
    move, and the others answer. A move sees what all steps sent before it have written. If it `holds` the steps sent
    after it, these may write over `pages`, and begin once those are copied."""

    number: int
    way: Way
    pages: bytes = b""
    slots: bytes = b""
    names: bytes = b""
    copy: int = 0
    holds: bool = False

    @property
    def count(self) -> int:
        """How many pages it is about; of "clear" 1, for all that a store has."""
        if self.way == "clear":
            return 1
        return len(self.slots) // 4 or len(self.names) // NAME_BYTES


class Moved(Message, frozen=True):
    """worker → scheduler: what came of a Move: `done` has a byte for each page, which is 1 for one that is there now.

    Steps that are sent once it has come find the pages there. It took `seconds`, or takes about as many.
    `held` are the pages that the rank's store holds, and `held_bytes` what they take; -1: nothing new is known.
    `counts` are its own figures, by name. `cause` says, for people, what went wrong."""

    number: int
    done: bytes
    seconds: float = 0.0
    held: int = -1
    held_bytes: int = -1
    cause: str = ""
    counts: dict[str, int] = {}  # noqa: RUF012 - msgspec copies it


def summed(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    """Figures of two, each under its name."""
    return {name: first.get(name, 0) + second.get(name, 0) for name in {**first, **second}}


def both(first: Moved, second: Moved) -> Moved:
    """What two ranks have moved. Of what stores hold, those count that tell."""
    telling = [each for each in (first, second) if each.held >= 0]
    return Moved(
        first.number,
        bytes(map(min, first.done, second.done)),
        max(first.seconds, second.seconds),
        min((each.held for each in telling), default=-1),
        sum(each.held_bytes for each in telling) if telling else -1,
        first.cause or second.cause,
        summed(first.counts, second.counts),
    )
