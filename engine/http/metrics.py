"""What the server counts, in Prometheus' text format, from two sources.

Latencies are measured here, where a reply passes on its way to its client: `watch` wraps its stream. Each front counts
in a row of memory that all fronts read (`counters`), so the page is of the whole engine, whichever front gives it.
Gauges of the scheduler are read from the front's latest Stats when Prometheus asks. docs/http.md lists the names.
"""

from array import array
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from time import perf_counter
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from engine.errors import EngineError
from engine.http.counters import TOTALS, Histogram, Row, Rows, TokenTimes
from engine.http.log import TALLY
from engine.http.metric_aliases import Family, WithAliases
from engine.http.tracing import ReplyTrace
from engine.messages.control import Stats
from engine.messages.grammars import GRAMMAR
from engine.messages.questions import ExpertCounts
from engine.messages.reply import Chunk

if TYPE_CHECKING:
    from engine.runtime.front import Front


class Metrics:
    """The counters and histograms of one engine, as this front adds to them and tells them."""

    def __init__(self, front: "Front", model: str, aliases: Sequence[Family] = ()) -> None:
        self.registry = self._shown = CollectorRegistry()
        self._aliases = WithAliases(self.registry, front, aliases, model)
        if aliases:
            self._shown = CollectorRegistry()
            self._shown.register(self._aliases)
        board = front.board
        self.rows = Rows([board.kept(number) for number in range(board.count)])
        self.row = row = Row(board.kept(board.number))
        self.registry.register(SchedulerFigures(front, model, self.rows))
        self.experts = ExpertChoices()
        self.registry.register(self.experts)
        self.first_token, self.inter_token = Histogram(row, "first_token"), TokenTimes(row)
        self.request = Histogram(row, "request")
        self._step, self._compile = Histogram(row, "step"), Histogram(row, "compile")
        self.registry.register(Counted(self.rows, self.inter_token))

    async def watch(
        self, stream: AsyncGenerator[Chunk], endpoint: str, trace: ReplyTrace | None = None
    ) -> AsyncGenerator[Chunk]:
        """`stream` unchanged, its times and its end recorded, in `trace` too; closing this closes it."""
        start = last = perf_counter()
        first, tokens, prefill = None, 0, None
        chunk: Chunk | None = None
        reason = "disconnect"
        try:
            async with aclosing(stream):
                async for chunk in stream:
                    now = perf_counter()
                    new = chunk.completion_tokens - tokens
                    if new > 0:
                        if first is None:
                            first, prefill = now, chunk.prefill_seconds
                        self._observe_tokens(now - last, new, first=tokens == 0)
                        tokens, last = chunk.completion_tokens, now
                    if chunk.finish is not None:
                        reason = chunk.finish
                        self.request.observe(now - start)
                    yield chunk
        except Exception as error:
            reason = "refused" if isinstance(error, EngineError) and not tokens else "error"
            if trace is not None:
                trace.fail(error)
            raise
        finally:
            self.count_end(endpoint, reason)
            if (tally := TALLY.get()) is not None:
                tally.add(chunk, first, reason)
            if trace is not None:
                trace.end(chunk, (first, last), prefill)

    def _observe_tokens(self, seconds: float, new: int, *, first: bool) -> None:
        if first:
            self.first_token.observe(seconds)
        else:
            self.inter_token.observe(seconds / new, new)

    def count_end(self, endpoint: str, reason: str) -> None:
        """A reply for `endpoint` is over."""
        self.row.count_request(endpoint, reason)

    def count_error(self, status: int) -> None:
        """An error answer with HTTP `status` is about to be sent."""
        self.row.count_error(status)

    def on_stats(self, stats: Stats) -> None:
        """Drain the times in a heartbeat; called once for each Stats, as a scrape could miss one."""
        self._aliases.on_stats(stats)
        self.row.keep(stats)
        self.inter_token.settle()
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


class Counted(Collector):
    """What the fronts have counted, of all of them together. What others hold back (`own` is this front's) is a
    heartbeat old at most."""

    def __init__(self, rows: Rows, own: TokenTimes) -> None:
        self._rows = rows
        self._own = own

    def describe(self) -> list[Metric]:
        """Nothing: the registry then does not scrape at start to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family for each counter and each histogram."""
        self._own.settle()
        text = "Requests that ended, by endpoint and how: stop, length, abort, disconnect, refused, error"
        requests = CounterMetricFamily("engine_requests", text, labels=["endpoint", "reason"])
        for labels, count in self._rows.requests().items():
            requests.add_metric(labels, count)
        yield requests
        text = "Error answers, by HTTP status; errors inside a stream are not here"
        errors = CounterMetricFamily("engine_http_errors", text, labels=["status"])
        for status, count in self._rows.errors().items():
            errors.add_metric([str(status)], count)
        yield errors
        for name, key, text in (
            ("engine_time_to_first_token_seconds", "first_token", "From a request's arrival to its first token"),
            (
                "engine_inter_token_seconds",
                "inter_token",
                "Between two tokens of one reply; tokens that come together share the time",
            ),
            ("engine_request_seconds", "request", "From a request's arrival to the end of its reply"),
        ):
            yield HistogramMetricFamily(name, text, *self._rows.histogram(key))
        for name, key, text in (  # of the core, whose heartbeats every front counts
            ("engine_step_seconds", "step", "Time of one step on the device"),
            ("engine_grammar_compile_seconds", "compile", "Time to compile one grammar, refused ones among them"),
        ):
            yield HistogramMetricFamily(name, text, *self._rows.histogram(key, max))


class ExpertChoices(Collector):
    """How often each expert was chosen, once that is counted. `counted` is what the worker last answered."""

    counted: ExpertCounts | None = None
    changes = 0  # of the counting, when that was

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

    def __init__(self, front: "Front", model: str, rows: Rows) -> None:
        self._front = front
        self._model = model
        self._rows = rows

    def describe(self) -> list[Metric]:
        """Nothing: the registry then does not scrape at start to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family for each figure."""
        stats, info = self._front.stats, self._front.info
        held = stats.pages - stats.pages_free - stats.pages_cached
        totals = {name: self._rows.total(name, getattr(stats, name)) for name in TOTALS}
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
                totals["cached_tokens_total"] / max(totals["prompt_tokens_total"], 1),
            ),
            ("engine_worker_restart_seconds", "From the last death of the worker to ready", stats.restart_seconds),
        )
        counters = (
            ("engine_prompt_tokens", "Prompt tokens of admitted requests", totals["prompt_tokens_total"]),
            ("engine_cached_tokens", "Prompt tokens that the prefix cache held", totals["cached_tokens_total"]),
            ("engine_generated_tokens", "Tokens sampled", totals["generated_tokens_total"]),
            ("engine_retractions", "Requests put back into the queue for want of pages", totals["retractions_total"]),
            ("engine_steps", "Steps of the device", totals["steps"]),
            (
                "engine_device_idle_seconds",
                "Time that the device waited for the next step",
                totals["idle_seconds_total"],
            ),
            ("engine_worker_restarts", "Device workers that took the place of a dead one", totals["restarts_total"]),
        )
        yield from (GaugeMetricFamily(name, text, value=value) for name, text, value in gauges)
        yield from (CounterMetricFamily(name, text, value=value) for name, text, value in counters)
        labels = {"model": self._model}
        if info is not None:
            labels |= {"device": info.device, "attention": info.attention}
        yield InfoMetricFamily("engine", "What is served, and where", value=labels)
