"""A circuit breaker: a worker that fails request after request gets none for a while, and then one to try.

    closed ──failures in a row──> open for a while ──> one request on trial ──succeeds──> closed
                                   ^                          └──fails──┐
                                   └──────── twice as long ─────────────┘

Heartbeats are another thing (`health`): a worker may answer these and fail every request. Pure; times are given.
"""

from typing import Final

LONGEST: Final = 60.0  # seconds


class Breaker:
    """`most` failures in a row open it, for `seconds` at first."""

    def __init__(self, most: int, seconds: float) -> None:
        self._most = most
        self._first = self._seconds = seconds
        self._failures = 0
        self._until: float | None = None  # None: closed
        self._trial = False

    @property
    def state(self) -> str:
        return "closed" if self._until is None else "trial" if self._trial else "open"

    def allows(self, now: float) -> bool:
        """Whether a request may be sent."""
        return self._until is None or (now >= self._until and not self._trial)

    def left(self, now: float) -> float:
        """Seconds until one may be, at the earliest."""
        return 0.0 if self._until is None else max(0.0, self._until - now)

    def sent(self) -> bool:
        """A request is sent; whether it is on trial, as the first since the breaker has opened."""
        self._trial = self._until is not None
        return self._trial

    def succeeded(self) -> None:
        """A request was answered."""
        self._failures, self._until, self._trial, self._seconds = 0, None, False, self._first

    def failed(self, now: float, *, trial: bool = False) -> bool:
        """A request was not, which may have been on trial; whether the breaker opens."""
        self._failures += 1
        if not trial and (self._until is not None or self._failures < self._most):
            return False  # one that was sent before it opened says nothing new
        self._until = now + self._seconds
        self._seconds = min(2 * self._seconds, LONGEST)
        self._trial = False
        return True

    def undecided(self, *, trial: bool = False) -> None:
        """A request ended without saying anything of the worker: its client has left."""
        if trial:
            self._trial = False
