"""What the log says of requests and of the load: a line for each request that ends, and one every ten seconds.

A request's line is written where its answer leaves the server, refusals and clients that left among them; what is
counted for it is added once, at the end of each reply (`Metrics.watch`), and nothing is done for a token. Left out:
what is refused before there is a request (too many connections, a head that is no HTTP), which /metrics counts.
"""

import logging
from contextvars import ContextVar
from time import monotonic, perf_counter

from aiohttp import web
from aiohttp.typedefs import Handler

from engine.http.request_id import PASSED, ensure_named
from engine.messages.control import Stats
from engine.messages.reply import Chunk

log = logging.getLogger("engine.requests")
load_log = logging.getLogger("engine.load")

LEFT = 499  # nginx's status of a request whose client did not wait for the answer
LOAD_SECONDS = 10.0


class Tally:
    """What one request came to so far: the sums over its replies."""

    __slots__ = ("answered", "began", "cached", "ends", "first", "prompt", "replied", "route")

    def __init__(self, route: str) -> None:
        self.route = route
        self.began = perf_counter()
        self.answered = False
        self.prompt = self.cached = self.replied = 0  # tokens
        self.first: float | None = None  # when the first token came, as perf_counter has it
        self.ends: list[str] = []  # how replies ended, each word once

    def add(self, last: Chunk | None, first: float | None, end: str) -> None:
        """A reply is over: its last chunk, when its first token came, and how it ended."""
        if last is not None:
            self.prompt += last.prompt_tokens
            self.cached += last.cached_tokens
            self.replied += last.completion_tokens
        if first is not None:
            self.first = first if self.first is None else min(self.first, first)
        if end not in self.ends:
            self.ends.append(end)
        if self.answered:  # it went on in the background
            self.write("background")

    def write(self, status: int | str) -> None:
        """Log the line. The id of the request stands before it, as before every line about one."""
        words = [self.route, str(status)]
        if self.ends:
            words += [f"in={self.prompt}", f"out={self.replied}", f"cached={self.cached}"]
        if self.first is not None:
            words.append(f"ttft={self.first - self.began:.3f}")
        words.append(f"seconds={perf_counter() - self.began:.3f}")
        if self.ends:
            words.append(f"end={','.join(self.ends)}")
        log.info("%s", " ".join(words))


TALLY: ContextVar[Tally | None] = ContextVar("tally", default=None)  # of the request at hand, if requests are logged


@web.middleware
async def log_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Log `request` once it is answered or its client has left. Probes and scrapes that succeed are not logged."""
    resource = request.match_info.route.resource
    # A path that no route has is logged as it was sent, percent signs and all: it cannot break the line.
    path = request.rel_url.raw_path[:200] if resource is None else resource.canonical
    tally = Tally(f"{request.method} {path}")
    TALLY.set(tally)
    status = LEFT
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        tally.answered = True
        ensure_named(request)
        if PASSED not in request and (status != 200 or path not in request.app[QUIET]):
            tally.write(status)


QUIET = web.AppKey("quiet", frozenset[str])  # the paths of probes and scrapes


class LoadLog:
    """One line every ten seconds in which something ran or waited, from the scheduler's heartbeats."""

    def __init__(self) -> None:
        self._began = monotonic()
        self._last: Stats | None = None  # at the end of the last ten seconds

    def on_stats(self, stats: Stats) -> None:
        """Take a heartbeat; log if ten seconds are over and were not idle."""
        now = monotonic()
        if self._last is None:
            self._began, self._last = now, stats
        if (seconds := now - self._began) < LOAD_SECONDS:
            return
        if line := load_line(self._last, stats, seconds):
            load_log.info("%s", line)
        self._began, self._last = now, stats


def load_line(before: Stats, now: Stats, seconds: float) -> str:
    """What happened between two heartbeats that are `seconds` apart; empty if nothing did."""
    prompt = max(
        now.prompt_tokens_total - before.prompt_tokens_total, 0
    )  # a worker that died may have taken some along
    replied = max(now.generated_tokens_total - before.generated_tokens_total, 0)
    cached = max(now.cached_tokens_total - before.cached_tokens_total, 0)
    if not (now.running or now.waiting or prompt or replied):
        return ""
    held = now.pages - now.pages_free - now.pages_cached
    paused = "paused; " if now.paused else ""
    return (
        f"{paused}{now.running} running, {now.waiting} waiting; {prompt / seconds:.1f} prompt tokens/s, "
        f"{replied / seconds:.1f} output tokens/s; KV cache {100 * held / max(now.pages, 1):.0f} % in use, "
        f"{100 * cached / max(prompt, 1):.0f} % of prompt tokens from it"
    )
