"""Whether pages are there sooner from a store, or computed. Pure.

    store    ▓▓▓▓ queued before ▓▓▓▓│░░ pages of a request ░░│
    device   ██ the same pages ██│

As long as a request waits for the device, what a store gives it meanwhile costs nothing. So the question comes up once
it could begin, and again whenever a step is planned until it does. Whoever computes pages delays all that run by as
long, which those who fetch them do not: so the time to compute counts once for the request, and once for each of them.
That is the least delay of all together. A device that has nothing else to do computes what a slow disk has, and one
that is busy leaves it to the disk, as far as the disk keeps up.

A pace is measured as it goes. One that is not known yet is no obstacle, so the first pages are fetched, which measures
it. Left out: the way up from the host, which takes a tenth of computing or less; whom a request delays that waits too.
"""

from math import inf

OLD = 0.8  # how much all measures before count beside a new one


class Pace:
    """Seconds that one of many takes: a moving mean, in which each of them counts alike. 0 before anything was."""

    def __init__(self) -> None:
        self._seconds = self._count = 0.0

    @property
    def each(self) -> float:
        return self._seconds / self._count if self._count else 0.0

    def measure(self, count: int, seconds: float) -> None:
        """So many took so long."""
        self._seconds = OLD * self._seconds + seconds
        self._count = OLD * self._count + count


def most_ahead(wanted: int, fetch: float, compute: float, running: int) -> float:
    """How many pages a store may give others before, for `wanted` pages of it to be worth to wait for, where `running`
    requests would be delayed; less than 0 if they never are. A page takes `fetch` seconds, and `compute` on the device;
    0 if that is not known."""
    if not compute or not fetch:
        return inf
    return wanted * compute * (1 + running) / fetch - wanted
