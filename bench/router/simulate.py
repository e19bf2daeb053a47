"""Routing policies compared on a simulated fleet of H200s, each with the engine's own scheduler, tree and page pool.

    nice python -m bench.router.simulate [--workers 8 64] [--traffics NAME ...] [--policies NAME ...]

Traffics are closed loops: as many sessions run as there are users, and one that ends makes room for the next.
`requests/s` counts what was answered until the last session began; TTFT is of all. Ratios are to round robin. "told"
is cache_aware whose workers publish what enters and leaves their caches, 10 ms late; else it knows what it sent, and
what share of each prompt was cached. Everything is seeded. Left out: the network, and the router's own time.
"""

import argparse
import heapq
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from bench.router.traffic import TRAFFICS, Session, Traffic, Turn, sessions
from bench.router.worker import KV_TOKENS, ROWS, Call, Step, Worker
from engine.conversation.canonical import chained
from engine.plugin.registry import Plugins, resolve
from engine.plugin.routing import Arrival, RoutingPolicy, View

LATE = 0.01  # seconds from a step's end to the router's hearing of its events
TIDY_EVERY = 16  # requests
RAMP = 5.0  # seconds in which the first sessions begin
SCALED = (8.0, 14.0)  # seconds at which a fleet of 10 becomes one of 50, and one of 15
LEAST_SESSIONS = 2  # a user: with fewer, requests/s is how fast the first sessions begin, and no policy changes that
BETWEEN = 0.05  # mean seconds between two sessions of a user


class Sent(Struct):
    """A request that runs."""

    turn: Turn
    session: Iterator[Turn]
    arrival: Arrival
    place: int
    waiting: int  # characters that count until the first token
    at: float
    cached: float = 0.0


class Figures(Struct):
    """What a run came to. Times are simulated seconds."""

    answered: int
    requests: float  # a second
    hits: float
    ttft: list[float]
    elapsed: float
    by_worker: list[int]

    def percentile(self, share: float) -> float:
        return self.ttft[min(len(self.ttft) - 1, int(share * len(self.ttft)))]


class Fleet:
    """`size` workers behind a policy, and a clock. `tells`: workers publish what is in their caches."""

    def __init__(self, policy: RoutingPolicy, size: int, kv_tokens: int = KV_TOKENS, *, tells: bool = False) -> None:
        self.policy = policy
        self.tells = tells
        self.now = 0.0
        self.workers: list[Worker] = []
        self.views: list[View] = []
        self.offered: list[bool] = []
        self.sent: dict[int, Sent] = {}
        self.ttft: list[float] = []
        self.by_worker: list[int] = []
        self._kv_tokens = kv_tokens
        self._busy: list[bool] = []
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._gone: set[str] = set()
        self._order = count()
        self._rng = random.Random(0)
        self._numbers = count(1)
        self._pending: Iterator[Session] = iter(())
        self._in_time: tuple[int, float] | None = None  # answered, and when, as the last session began
        for _ in range(size):
            self.add()

    # ── workers ──────────────────────────────────────────────────────────────────────────────

    def add(self) -> None:
        """One more worker."""
        place = len(self.workers)
        self.workers.append(Worker(self._kv_tokens))
        self.views.append(View(f"http://worker-{place}", 0, 0, ROWS))
        self.offered.append(True)
        self._busy.append(False)
        self.by_worker.append(0)

    def drain(self, place: int) -> None:
        """No more requests for a worker; it ends what it has."""
        self.offered[place] = False
        self._gone.add(self.views[place].name)
        self.policy.removed(self.views[place].name)

    def at(self, when: float, what: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), what, arguments))

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    def run(self, waiting: Iterator[Session], users: int, ramp: float = RAMP) -> Figures:
        """`users` of the sessions `waiting` at a time, until all have ended; the first begin within `ramp` seconds."""
        self._pending = waiting
        for user in range(users):
            self.at(ramp * user / users, self._next_session)
        while self._events:
            self.now, _, what, arguments = heapq.heappop(self._events)
            what(*arguments)
        assert not self.sent, "a request is lost"
        answered, elapsed = self._in_time or (len(self.ttft), self.now)
        prompt, cached = (
            sum(getattr(each, name) for each in self.workers) for name in ("prompt_tokens", "cached_tokens")
        )
        rate = answered / max(elapsed, 1e-9)
        return Figures(len(self.ttft), rate, cached / prompt, sorted(self.ttft), self.now, self.by_worker)

    def _next_session(self) -> None:
        if (session := next(self._pending, None)) is not None:
            self.at(self.now + self._rng.expovariate(1 / BETWEEN), self._go_on, iter(session))
        elif self._in_time is None:
            self._in_time = len(self.ttft), self.now

    def _go_on(self, session: Iterator[Turn]) -> None:
        if (turn := next(session, None)) is None:
            self._next_session()
        else:
            self.at(self.now + turn.pause, self._send, turn, session)

    def _send(self, turn: Turn, session: Iterator[Turn]) -> None:
        arrival = Arrival("m", turn.prompt, program=turn.program)
        places = [place for place, offered in enumerate(self.offered) if offered]
        choice = self.policy.choose(arrival, [self.views[place] for place in places])
        place = places[choice.worker]
        view = self.views[place]
        self.policy.sent(arrival, view.name)
        waiting = max(0, len(turn.prompt) - choice.matched)
        view.running += 1
        view.waiting_chars += waiting
        number = next(self._numbers)
        self.sent[number] = Sent(turn, session, arrival, place, waiting, self.now)
        self.by_worker[place] += 1
        blocks = chained(turn.prompt) if self.tells else array("Q")
        prompt, reply = (array("i", text.encode()) for text in (turn.prompt, turn.reply))
        self.workers[place].admit(Call(number, prompt, reply, blocks))
        if number % TIDY_EVERY == 0:
            self.policy.tidy(0)
        if not self._busy[place]:
            self._step(place)

    def _step(self, place: int) -> None:
        step = self.workers[place].step()
        self._busy[place] = step is not None
        if step is not None:
            self.at(self.now + step.seconds, self._stepped, place, step)

    def _stepped(self, place: int, step: Step) -> None:
        view = self.views[place]
        for number, cached in step.firsts:
            sent = self.sent[number]
            self.ttft.append(self.now - sent.at)
            view.waiting_chars -= sent.waiting
            sent.cached = cached * 4 / len(sent.turn.prompt)
        for number in step.ended:
            sent = self.sent.pop(number)
            view.running -= 1
            self.policy.answered(sent.arrival, view.name, sent.cached)
            self._go_on(sent.session)
        if self.tells and (step.stored or step.evicted):
            self.at(self.now + LATE, self._tell, view.name, step.stored, step.evicted)
        self._step(place)

    def _tell(self, name: str, stored: Sequence[int], evicted: Sequence[int]) -> None:
        if name not in self._gone:
            self.policy.evicted(name, evicted)
            self.policy.stored(name, b"", stored)


# ── runs ─────────────────────────────────────────────────────────────────────────────────────


def policy_of(name: str, plugins: Sequence[str] = ()) -> RoutingPolicy:
    """The policy `name`, which may be of one of `plugins`; one that draws is seeded."""
    target = resolve(Plugins.load(plugins).entries("routing")[name].target)
    made: RoutingPolicy = target(random.Random(0)) if name in ("random", "power_of_two") else target()
    return made


def simulate(
    traffic: Traffic,
    policy: str,
    workers: int,
    *,
    plugins: Sequence[str] = (),
    kv_tokens: int = KV_TOKENS,
    seed: int = 0,
    ramp: float = RAMP,
) -> tuple[Figures, RoutingPolicy]:
    """One run. `policy` "told" is cache_aware with workers that publish."""
    told = policy == "told"
    made = policy_of("cache_aware" if told else policy, plugins)
    fleet = Fleet(made, workers, kv_tokens, tells=told)
    if traffic.name == "flapping":
        for turn in range(1, 400):
            fleet.at(turn * 0.5, _flap, fleet, turn)
    if traffic.name == "scaling":  # as many users as at `workers`, whatever there is
        _scale(fleet, 10)
        fleet.at(SCALED[0], _scale, fleet, 50)
        fleet.at(SCALED[1], _scale, fleet, 15)
    return fleet.run(sessions(traffic, workers, seed), traffic.users * workers, ramp), made


def _flap(fleet: Fleet, turn: int) -> None:
    """A health check fails for half a second at one worker after another; what it runs goes on."""
    size = len(fleet.workers)
    fleet.offered[(turn - 1) % size], fleet.offered[turn % size] = True, False


def _scale(fleet: Fleet, size: int) -> None:
    """Workers come, or the last ones are drained."""
    while sum(fleet.offered) < size:
        fleet.add()
    for place in range(size, len(fleet.workers)):
        fleet.drain(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[8])
    parser.add_argument("--traffics", nargs="+", default=list(TRAFFICS), choices=list(TRAFFICS))
    parser.add_argument("--policies", nargs="+", default=["least_load", "cache_aware", "told"])
    parser.add_argument("--plugins", nargs="+", default=[])
    part = f"of the sessions, at least {LEAST_SESSIONS} a user: a shorter run"
    parser.add_argument("--part", type=float, default=1.0, help=part)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("traffic        workers policy       requests/s  ratio   hits  ratio TTFT p50, ms  p99, ms  ratio most/mean")
    for size in options.workers:
        for name in options.traffics:
            base: Figures | None = None
            whole = TRAFFICS[name]
            least = LEAST_SESSIONS * whole.users
            traffic = replace(whole, sessions=max(least, round(options.part * whole.sessions)))
            for policy in ("round_robin", *options.policies):
                figures, _ = simulate(traffic, policy, size, plugins=options.plugins, seed=options.seed)
                base = base or figures
                print(f"{name:14s} {size:7d} {policy:12s} {_row(figures, base)}", flush=True)


def _row(figures: Figures, base: Figures) -> str:
    median, late = (1e3 * figures.percentile(share) for share in (0.5, 0.99))
    even = max(figures.by_worker) * len(figures.by_worker) / sum(figures.by_worker)
    return (
        f"{figures.requests:10.1f} {figures.requests / base.requests:6.2f} {figures.hits:6.1%} "
        f"{figures.hits / max(base.hits, 1e-9):6.2f} {median:12.1f} {late:8.0f} "
        f"{late / (1e3 * base.percentile(0.99)):6.2f} {even:9.2f}"
    )


if __name__ == "__main__":
    main()
