"""What the server counts, in Prometheus' text format, from two sources.

Latencies are measured where the tokens of a reply come, before they are written to its client (`ReplyWatch`). Figures
of the scheduler are read from the front's latest Stats when Prometheus asks. Each server has its own registry, so
two servers in one process do not mix. docs/http.md lists the names.
"""

from array import array
from bisect import bisect_left
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from itertools import accumulate
from time import perf_counter
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engine.errors import EngineError
from engine.http.log import TALLY
from engine.http.metric_aliases import Family, WithAliases
from engine.http.tracing import ReplyTrace
from engine.messages.control import Stats
from engine.messages.grammars import GRAMMAR
from engine.messages.questions import ExpertCounts
from engine.messages.reply import Chunk

if TYPE_CHECKING:
    from engine.runtime.front import Front

# Seconds. A step on a fast GPU takes 5 ms, one on a small CPU 100 ms.
TOKEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
FIRST_TOKEN_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
COMPILE_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
REQUEST_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)


class Metrics:
    """The counters and histograms of one server."""

    def __init__(self, front: "Front", model: str, aliases: Sequence[Family] = ()) -> None:
        self.registry = self._shown = CollectorRegistry()
        self._aliases = WithAliases(self.registry, front, aliases, model)
        if aliases:
            self._shown = CollectorRegistry()
            self._shown.register(self._aliases)
        self.registry.register(SchedulerFigures(front, model))
        self.experts = ExpertChoices()
        self.registry.register(self.experts)
        self._requests = Counter(
            "engine_requests",
            "Requests that ended, by endpoint and how: stop, length, abort, disconnect, refused, error",
            ["endpoint", "reason"],
            registry=self.registry,
        )
        self._errors = Counter(
            "engine_http_errors",
            "Error answers, by HTTP status; errors inside a stream are not here",
            ["status"],
            registry=self.registry,
        )
        self.first_token = Histogram(
            "engine_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.inter_token = TokenTimes()
        self.registry.register(self.inter_token)
        self.request = Histogram(
            "engine_request_seconds",
            "From a request's arrival to the end of its reply",
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )
        self._step = Histogram(
            "engine_step_seconds", "Time of one step on the device", buckets=TOKEN_BUCKETS, registry=self.registry
        )

        self._compile = Histogram(
            "engine_grammar_compile_seconds",
            "Time to compile one grammar, refused ones among them",
            buckets=COMPILE_BUCKETS,
            registry=self.registry,
        )

    def watching(self, endpoint: str, trace: ReplyTrace | None = None) -> "ReplyWatch":
        """A watch over a reply that begins now; `trace` is told of it too."""
        return ReplyWatch(self, endpoint, trace)

    async def watch(
        self, stream: AsyncGenerator[Chunk], endpoint: str, trace: ReplyTrace | None = None
    ) -> AsyncGenerator[Chunk]:
        """`stream` unchanged, its times and its end recorded, in `trace` too; closing this closes it."""
        watch = self.watching(endpoint, trace)
        try:
            async with aclosing(stream):
                async for chunk in stream:
                    watch.chunk(chunk, perf_counter())
                    yield chunk
        except Exception as error:
            watch.fail(error)
            raise
        finally:
            watch.end()

    def count_end(self, endpoint: str, reason: str) -> None:
        """A reply for `endpoint` is over."""
        self._requests.labels(endpoint, reason).inc()

    def count_error(self, status: int) -> None:
        """An error answer with HTTP `status` is about to be sent."""
        self._errors.labels(status).inc()

    def on_stats(self, stats: Stats) -> None:
        """Drain the times in a heartbeat; called once for each Stats, as a scrape could miss one."""
        self._aliases.on_stats(stats)
        for seconds in array("f", stats.step_seconds):
            self._step.observe(seconds)
        for seconds in array("f", stats.make_seconds.get(GRAMMAR, b"")):
            self._compile.observe(seconds)

    def page(self, accept: str) -> tuple[bytes, str]:
        """All metrics in the format that an Accept header asks for, and its content type; with aliases, in plain text:
        the encoder of OpenMetrics writes the colon of their names as an underscore."""
        accept = accept if self._shown is self.registry else ""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # a version that is no version
            encode, content_type = choose_encoder("")
        return encode(self._shown), content_type


class ReplyWatch:
    """The times of one reply and how it ends. A token costs two additions where the others of its step took as long."""

    __slots__ = (
        *("_chunk", "_endpoint", "_first", "_inter", "_last", "_metrics"),
        *("_prefill", "_reason", "_start", "_tally", "_tokens", "_trace"),
    )

    def __init__(self, metrics: Metrics, endpoint: str, trace: ReplyTrace | None) -> None:
        self._metrics = metrics
        self._inter = metrics.inter_token
        self._endpoint = endpoint
        self._trace = trace
        self._tally = TALLY.get()
        self._start = self._last = perf_counter()
        self._first: float | None = None
        self._prefill: float | None = None
        self._tokens = 0
        self._chunk: Chunk | None = None  # the last that is one
        self._reason = "disconnect"

    def tokens(self, count: int, now: float) -> None:
        """`count` more tokens came, not the first ones."""
        inter, seconds = self._inter, (now - self._last) / count
        if seconds == inter.seconds:
            inter.alike += count
        else:
            inter.observe(seconds, count)
        self._tokens += count
        self._last = now

    def chunk(self, chunk: Chunk, now: float) -> None:
        """Any part of the reply came."""
        self._chunk = chunk
        if (new := chunk.completion_tokens - self._tokens) > 0:
            if self._first is None:
                self._first, self._prefill = now, chunk.prefill_seconds
                self._metrics.first_token.observe(now - self._start)
            else:
                self._inter.observe((now - self._last) / new, new)
            self._tokens, self._last = chunk.completion_tokens, now
        if chunk.finish is not None:
            self._reason = chunk.finish
            self._metrics.request.observe(now - self._start)

    def fail(self, error: Exception) -> None:
        """The reply ends with `error`."""
        self._reason = "refused" if isinstance(error, EngineError) and not self._tokens else "error"
        if self._trace is not None:
            self._trace.fail(error)

    def end(self) -> None:
        """The reply is over, in one of these ways or because its client has left."""
        chunk = self._chunk
        if chunk is not None and chunk.completion_tokens < self._tokens:  # left in the middle
            chunk = msgspec.structs.replace(chunk, completion_tokens=self._tokens)
        self._metrics.count_end(self._endpoint, self._reason)
        if self._tally is not None:
            self._tally.add(chunk, self._first, self._reason)
        if self._trace is not None:
            self._trace.end(chunk, (self._first, self._last), self._prefill)


class TokenTimes(Collector):
    """The histogram of the times between tokens. It counts each token of each reply, for a tenth of what the library's
    own histogram costs: that has a lock for each number."""

    def __init__(self) -> None:
        self._counts = [0] * (len(TOKEN_BUCKETS) + 1)  # by bucket, the last without a bound
        self._sum = 0.0
        self.seconds = 0.0  # the last time, which all rows of a step share
        self.alike = 0  # tokens of that time, not counted yet

    def observe(self, seconds: float, count: int) -> None:
        """`count` tokens came `seconds` after the one before, each."""
        self._count()
        self.seconds, self.alike = seconds, count

    def _count(self) -> None:
        self._counts[bisect_left(TOKEN_BUCKETS, self.seconds)] += self.alike
        self._sum += self.seconds * self.alike
        self.alike = 0

    def collect(self) -> Iterator[Metric]:
        """The one family."""
        self._count()
        bounds = [*map(floatToGoString, TOKEN_BUCKETS), "+Inf"]
        yield HistogramMetricFamily(
            "engine_inter_token_seconds",
            "Between two tokens of one reply; tokens that come together share the time",
            buckets=list(zip(bounds, accumulate(self._counts), strict=True)),
            sum_value=self._sum,
        )


class ExpertChoices(Collector):
    """How often each expert was chosen, once that is counted. `counted` is what the worker last answered."""

    counted: ExpertCounts | None = None

    def describe(self) -> list[Metric]:
        """Nothing: the registry then does not scrape at start to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family, or none."""
        if self.counted is None:
            return
        text = "Choices of an expert by a token since /expert_distribution/start"
        family = CounterMetricFamily("engine_expert_choices", text, labels=["layer", "expert"])
        counts, layers = array("q", self.counted.counts), self.counted.layers
        experts = len(counts) // max(len(layers), 1)
        for place, count in enumerate(counts):
            family.add_metric([str(layers[place // experts]), str(place % experts)], count)
        yield family


class SchedulerFigures(Collector):
    """Gauges and counters that the scheduler keeps, read from `front.stats` at scrape time."""

    def __init__(self, front: "Front", model: str) -> None:
        self._front = front
        self._model = model

    def describe(self) -> list[Metric]:
        """Nothing: the registry then does not scrape at start to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family for each figure."""
        stats, info = self._front.stats, self._front.info
        held = stats.pages - stats.pages_free - stats.pages_cached
        gauges = (
            ("engine_ready", "1 while the engine answers, else 0", float(self._front.health().ok)),
            ("engine_requests_running", "Requests in the running batch", stats.running),
            ("engine_requests_waiting", "Requests in the queue", stats.waiting),
            ("engine_kv_pages", "Pages of the KV cache", stats.pages),
            ("engine_kv_pages_free", "Pages that hold nothing", stats.pages_free),
            ("engine_kv_pages_cached", "Pages of cached prefixes that no request uses", stats.pages_cached),
            ("engine_kv_use_ratio", "Share of the pages that running requests use", held / max(stats.pages, 1)),
            (
                "engine_cache_hit_ratio",
                "Share of all prompt tokens so far that the prefix cache held",
                stats.cached_tokens_total / max(stats.prompt_tokens_total, 1),
            ),
            ("engine_worker_restart_seconds", "From the last death of the worker to ready", stats.restart_seconds),
        )
        counters = (
            ("engine_prompt_tokens", "Prompt tokens of admitted requests", stats.prompt_tokens_total),
            ("engine_cached_tokens", "Prompt tokens that the prefix cache held", stats.cached_tokens_total),
            ("engine_generated_tokens", "Tokens sampled", stats.generated_tokens_total),
            ("engine_retractions", "Requests put back into the queue for want of pages", stats.retractions_total),
            ("engine_steps", "Steps of the device", stats.steps),
            ("engine_device_idle_seconds", "Time that the device waited for the next step", stats.idle_seconds_total),
            ("engine_worker_restarts", "Device workers that took the place of a dead one", stats.restarts_total),
        )
        yield from (GaugeMetricFamily(name, text, value=value) for name, text, value in gauges)
        yield from (CounterMetricFamily(name, text, value=value) for name, text, value in counters)
        labels = {"model": self._model}
        if info is not None:
            labels |= {"device": info.device, "attention": info.attention}
        yield InfoMetricFamily("engine", "What is served, and where", value=labels)
