"""Policies that look at the workers alone, not at what they hold."""

import random
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


class Random(RoutingPolicy):
    """Any worker, each as likely."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()

    def choose(self, arrival: Arrival, workers: Sequence[View]) -> Choice:
        return Choice(worker=self._rng.randrange(len(workers)), matched=0, reason="drawn")


class PowerOfTwo(Random):
    """The less loaded of two that are drawn: nearly as even as the least of all, and no herd runs to one worker when
    several routers see the same loads a little late (Mitzenmacher 2001, IEEE TPDS 12(10))."""

    def choose(self, arrival: Arrival, workers: Sequence[View]) -> Choice:
        drawn = self._rng.sample(range(len(workers)), min(2, len(workers)))
        best = min(drawn, key=loads(workers).__getitem__)
        return Choice(worker=best, matched=0, reason=f"the less loaded of {len(drawn)} drawn")


class LeastLoad(RoutingPolicy):
    """The worker with the fewest requests and the least of prompts to compute; equals take turns."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, arrival: Arrival, workers: Sequence[View]) -> Choice:
        count = len(workers)
        load = loads(workers)
        best = min(range(count), key=lambda index: (load[index], (index - self._turn) % count))
        return Choice(worker=best, matched=0, reason=f"the least load, {workers[best].running} requests")

    def sent(self, arrival: Arrival, worker: str) -> None:
        self._turn += 1


def loads(workers: Sequence[View]) -> list[float]:
    """How loaded each worker is, to compare: its share of all requests, and of all prompts that wait."""
    running = max(1, sum(worker.running for worker in workers))
    waiting = max(1, sum(worker.waiting_chars for worker in workers))
    return [worker.running / running + worker.waiting_chars / waiting for worker in workers]
