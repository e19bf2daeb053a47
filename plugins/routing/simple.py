"""Policies that look at the workers alone, not at what they hold."""

from collections.abc import Sequence

from engine.plugin.routing import Arrival, Choice, RoutingPolicy, View


class RoundRobin(RoutingPolicy):
    """Each worker in its turn."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, arrival: Arrival, workers: Sequence[View]) -> Choice:
        return Choice(worker=self._turn % len(workers), matched=0, reason="its turn")

    def sent(self, arrival: Arrival, worker: str) -> None:
        self._turn += 1
