"""What a router counts, in Prometheus' text format. docs/router.md lists the names.

Figures of workers are read from the fleet when Prometheus asks. Workers have metrics of their own, which are not in
this page: `GET /workers/targets` tells Prometheus where to scrape them.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.http.exposition import Figures, page
from engine.router.dispatch import Dispatcher
from engine.router.workers import Fleet

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class RouterMetrics:
    """The counters of one router."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.first_byte = Histogram(
            "engine_router_first_byte_seconds",
            "From a request's body to the first byte of its answer, its wait for a worker included",
            buckets=BUCKETS,
            registry=self.registry,
        )
        self._errors = Counter(
            "engine_router_errors", "Error answers of the router itself, by status", ["status"], registry=self.registry
        )

    def count_error(self, status: int) -> None:
        """An error answer of the router's own is about to be sent."""
        self._errors.labels(str(status)).inc()

    def page(self, accept: str) -> tuple[bytes, str]:
        """All metrics in the format that an Accept header asks for, and its content type."""
        return page(self.registry, accept)


class FleetFigures(Figures):
    """The figures of the queue and of each worker, at scrape time."""

    def __init__(self, fleet: Fleet, dispatcher: Dispatcher) -> None:
        self._fleet = fleet
        self._dispatcher = dispatcher

    def collect(self) -> Iterator[Metric]:
        """One family for each figure."""
        dispatcher = self._dispatcher
        yield GaugeMetricFamily("engine_router_queue", "Requests that wait for a worker", value=dispatcher.waiting)
        text = "Requests that were refused because the queue was full, or waited too long"
        family = CounterMetricFamily("engine_router_refused", text, labels=["reason"])
        family.add_metric(["queue_full"], dispatcher.refused)
        family.add_metric(["queue_timeout"], dispatcher.timed_out)
        yield family
        workers = list(self._fleet.workers.values())
        gauges = (
            ("engine_router_worker_ready", "1 while requests may be sent there", lambda one: float(one.may_take)),
            ("engine_router_worker_running", "Requests that run there", lambda one: one.view.running),
            ("engine_router_worker_waiting_chars", "Prompts there that are not answered yet, in characters",
             lambda one: one.view.waiting_chars),
        )  # fmt: skip
        for name, text, read in gauges:
            gauge = GaugeMetricFamily(name, text, labels=["worker"])
            for worker in workers:
                gauge.add_metric([worker.url], read(worker))
            yield gauge
        counters = (
            ("sent", "engine_router_requests", "Requests that were sent there"),
            ("answered", "engine_router_answers", "Answers that came whole"),
            ("failed", "engine_router_broken", "Answers that broke off"),
            ("moved", "engine_router_retries", "Requests that were sent elsewhere, because no answer began there"),
            ("prompt_chars", "engine_router_prompt_chars", "Characters of prompts that were sent there"),
            ("matched_chars", "engine_router_matched_chars", "Those that its cache was thought to hold"),
            ("prompt_tokens", "engine_router_prompt_tokens", "Prompt tokens of answers that say what was cached"),
            ("cached_tokens", "engine_router_cached_tokens", "Those that were cached, as the worker says"),
            ("evictions", "engine_router_evictions", "Blocks that left its cache, as its events say"),
        )
        for field, name, text in counters:
            counter = CounterMetricFamily(name, text, labels=["worker"])
            for worker in workers:
                counter.add_metric([worker.url], getattr(worker.counts, field))
            yield counter
