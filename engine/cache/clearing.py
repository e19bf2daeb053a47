"""Whether a store has forgotten what a flush was to clear. Pure: the caller says what time it is `now`.

    flush ──ask──> due ──sent──> under way ──answered──> done
                    ^                            │
                    └──────── after a pause ─────┴ refused

Until it is done, nothing is asked of the store or given to it, as it might give what a user has cleared. A device that
is lost takes no flush along: the next life goes on with it. Left out: an engine that ends before the store has done it.
"""

LEAST_PAUSE, MOST_PAUSE = 15.0, 300.0  # seconds
REFUSED = "it does not say why"


class Clearing:
    """Of one store; `before` is that of the life before this one."""

    def __init__(self, before: "Clearing | None" = None) -> None:
        self.now: float = 0.0 if before is None else before.now
        self.wanted: bool = before is not None and before.wanted
        self.cause = ""  # why the store refused it, for people
        self._number = 0  # of the move under way
        self._pause, self._until = LEAST_PAUSE, 0.0

    def ask(self) -> None:
        """All that the store has by now is to be forgotten."""
        self.wanted, self.cause, self._number = True, "", 0
        self._pause, self._until = LEAST_PAUSE, 0.0

    @property
    def due(self) -> bool:
        """Whether the store is to be told now."""
        return self.wanted and not self._number and self.now >= self._until

    @property
    def waits(self) -> bool:
        """Whether the store has not answered yet; it may have refused it before."""
        return self.wanted and not self.cause

    def sent(self, number: int) -> None:
        """It is told, by the move of this number."""
        self._number = number

    def answered(self, number: int, *, done: bool, cause: str) -> None:
        """It has answered that move."""
        if number != self._number:
            return  # one that was asked for before the last flush
        self._number, self.wanted = 0, not done
        self.cause = "" if done else cause or REFUSED
        self._until = self.now + self._pause
        self._pause = min(2 * self._pause, MOST_PAUSE)
