"""Whose turn is next, among conversations that nobody waits for."""

from random import Random

STRATA = 20


class Idle:
    """Those of `count` conversations that are idle, in the order in which they became so.

    Each is as likely to be drawn as the others. But of so many draws in a row one comes from each twentieth of that
    order: so runs hardly differ in how many come back that were away for long, which is what a cache is measured by."""

    def __init__(self, count: int, random: Random) -> None:
        self._order = list(range(count))
        self._random = random
        self._strata: list[int] = []

    def take(self, number: int) -> int:
        """Conversation `number`, or if that is less than 0 one that is drawn; it is idle no more."""
        if number >= 0:
            self._order.remove(number)
            return number
        if not self._strata:
            self._strata = self._random.sample(range(STRATA), STRATA)
        place = (self._strata.pop() + self._random.random()) / STRATA
        return self._order.pop(int(place * len(self._order)))

    def add(self, number: int) -> None:
        """It is idle again."""
        self._order.append(number)
