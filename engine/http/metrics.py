"""What the server counts, in Prometheus' text format, from two sources.

Latencies are measured where the tokens of a reply come, before they are written to its client (`ReplyWatch`). Each
front counts in a row of memory that all fronts read (`counters`), so the page is of the whole engine, whichever front
gives it. Figures of the scheduler are read from the front's latest Stats when Prometheus asks. docs/http.md lists the
names.
"""

from array import array
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from time import perf_counter
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from engine.errors import EngineError
from engine.http.counters import TOTALS, Histogram, MediaCounts, Row, Rows, TokenTimes
from engine.http.exposition import Figures, page
from engine.http.log import TALLY
from engine.http.metric_aliases import Family, WithAliases
from engine.http.tier_metrics import tiers_of
from engine.http.tracing import ReplyTrace
from engine.messages.control import Stats
from engine.messages.grammars import GRAMMAR
from engine.messages.questions import ExpertCounts, ExpertMap
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
        self.mixture = MixtureFigures()
        self.registry.register(self.mixture)
        self.first_token, self.inter_token = Histogram(row, "first_token"), TokenTimes(row)
        self.request = Histogram(row, "request")
        self._step, self._compile = Histogram(row, "step"), Histogram(row, "compile")
        self.registry.register(Counted(self.rows, self.inter_token))
        self.registry.register(MediaFigures(self.rows))
        if front.media is not None:
            front.media.figures = MediaCounts(row)

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
        return page(self._shown, accept if self._shown is self.registry else "")


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


class Counted(Figures):
    """What the fronts have counted, of all of them together. What others hold back (`own` is this front's) is a
    heartbeat old at most."""

    def __init__(self, rows: Rows, own: TokenTimes) -> None:
        self._rows = rows
        self._own = own

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


class MediaFigures(Figures):
    """What the fronts have counted of images and video, once there were any."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def collect(self) -> Iterator[Metric]:
        """All families, or none."""
        counts = {result: self._rows.media(result) for result in ("hit", "made", "refused")}
        if not any(counts.values()):
            return
        text = "Images and videos of requests: known already, decoded (made), or refused"
        family = CounterMetricFamily("engine_media", text, labels=["result"])
        for result, count in counts.items():
            family.add_metric([result], count)
        yield family
        yield CounterMetricFamily("engine_media_bytes", "Bytes of images and videos read", self._rows.media("bytes"))
        yield CounterMetricFamily("engine_media_pixels", "Pixels of them decoded", self._rows.media("pixels"))
        text = "Time to read an image or a video, to decode it, and to prepare its pixels for the model"
        seconds = HistogramMetricFamily("engine_media_seconds", text, labels=["stage"])
        for stage in ("read", "decode", "prepare"):
            seconds.add_metric([stage], *self._rows.histogram(f"media_{stage}"))
        yield seconds


class ExpertChoices(Figures):
    """How often each expert was chosen, once that is counted. `counted` is what the worker last answered."""

    counted: ExpertCounts | None = None
    changes = 0  # of the counting, when that was

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


def copies_of(stats: Stats) -> Iterator[Metric]:
    """Figures of each copy of attention, where there are several."""
    if not stats.copies:
        return
    gauges = (
        ("engine_copy_requests_running", "Requests that run in a copy of attention", "running"),
        ("engine_copy_kv_pages_free", "Pages of its KV cache that hold nothing", "pages_free"),
        ("engine_copy_kv_pages_cached", "Pages of cached prefixes that no request uses", "pages_cached"),
    )
    for name, text, field in gauges:
        gauge = GaugeMetricFamily(name, text, labels=["copy"])
        for copy, each in enumerate(stats.copies):
            gauge.add_metric([str(copy)], getattr(each, field))
        yield gauge
    tokens = CounterMetricFamily("engine_copy_tokens", "Tokens that a copy of attention computed", labels=["copy"])
    for copy, each in enumerate(stats.copies):
        tokens.add_metric([str(copy)], each.tokens_total)
    yield tokens
    text = "Tokens of the copy that had the most, over all steps"
    yield CounterMetricFamily("engine_copy_most_tokens", text, value=stats.most_tokens_total)


class MixtureFigures(Figures):
    """How even the ranks of a mixture are. `found` is what the worker last answered."""

    found: ExpertMap | None = None

    def collect(self) -> Iterator[Metric]:
        """All families, or none."""
        if (found := self.found) is None:
            return
        even, drift = (found.windows[-1].balance, found.windows[-1].drift) if found.windows else (1.0, 0.0)
        text = "Largest load of a rank over the mean one, in the last window of steps"
        yield GaugeMetricFamily("engine_expert_balance", text, even)
        text = "Share of choices that went elsewhere than before, in the last window of steps"
        yield GaugeMetricFamily("engine_expert_drift", text, drift)
        text = "Choices that a rank would compute as experts lie now, over the mean"
        family = GaugeMetricFamily("engine_expert_load_ratio", text, labels=["rank"])
        loads = array("d", found.loads)
        total = sum(loads)
        for rank in range(found.ranks):
            family.add_metric([str(rank)], sum(loads[rank :: found.ranks]) * found.ranks / total if total else 1.0)
        yield family
        yield CounterMetricFamily("engine_expert_layers_moved", "Layers whose experts were rearranged", found.moved)


def slices_of(shown: float, made: float) -> Iterator[Metric]:
    """What was encoded of media, once any were `shown`, and how often it was not, because it was there."""
    if shown:
        text = "Images, and slices of video, that prompts showed: encoded for it (made), or held already"
        family = CounterMetricFamily("engine_media_slices", text, labels=["result"])
        family.add_metric(["made"], made)
        family.add_metric(["held"], shown - made)
        yield family


class SchedulerFigures(Figures):
    """Gauges and counters that the scheduler keeps, read from `front.stats` at scrape time."""

    def __init__(self, front: "Front", model: str, rows: Rows) -> None:
        self._front = front
        self._model = model
        self._rows = rows

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
            ("engine_sessions", "Sessions that live", stats.sessions),
            ("engine_session_pages", "Pages that sessions have, each counted once", stats.session_pages),
            ("engine_worker_restart_seconds", "From the last death of the worker to ready", stats.restart_seconds),
        )
        counters = (
            ("engine_prompt_tokens", "Prompt tokens of admitted requests", totals["prompt_tokens_total"]),
            ("engine_cached_tokens", "Prompt tokens that the prefix cache held", totals["cached_tokens_total"]),
            ("engine_generated_tokens", "Tokens sampled", totals["generated_tokens_total"]),
            ("engine_retractions", "Requests put back into the queue for want of pages", totals["retractions_total"]),
            (
                "engine_pins_released",
                "Sessions and programs that lost their pages before their time",
                totals["pins_released_total"],
            ),
            ("engine_steps", "Steps of the device", totals["steps"]),
            (
                "engine_device_idle_seconds",
                "Time that the device waited for the next step",
                totals["idle_seconds_total"],
            ),
            ("engine_worker_restarts", "Device workers that took the place of a dead one", totals["restarts_total"]),
        )
        yield from (GaugeMetricFamily(name, text, value=value) for name, text, value in gauges)
        yield from copies_of(stats)
        yield from tiers_of(stats, info)
        yield from (CounterMetricFamily(name, text, value=value) for name, text, value in counters)
        yield from slices_of(totals["slices_shown_total"], totals["slices_made_total"])
        labels = {"model": self._model}
        if info is not None:
            labels |= {"device": info.device, "attention": info.attention}
        yield InfoMetricFamily("engine", "What is served, and where", value=labels)
