"""Spans of requests, sent to a collector with OpenTelemetry's SDK: OTLP over HTTP. Imported where that is asked for.

A request of a route in `tracing.OPERATIONS` is one server span, with a child for each phase of its life. Spans are
encoded and sent by a thread of the SDK's; the event loop only puts them into its queue, which is bounded and drops the
oldest. Where they do not arrive the log says so once, and once more when they do again. The standard variables of the
environment hold for the rest (`OTEL_TRACES_SAMPLER`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_EXPORTER_OTLP_HEADERS`,
`OTEL_BSP_*`); the parent's decision to sample is kept by the SDK's default sampler. Left out: metrics and logs over
OTLP.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import anyio
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from multidict import CIMultiDictProxy
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.environment_variables import OTEL_BSP_MAX_EXPORT_BATCH_SIZE
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from engine import __version__
from engine.errors import ConfigError
from engine.http.request_id import HEADER, ID, PASSED
from engine.http.service import SERVICE
from engine.http.tracing import OPERATIONS, PROVIDER, TRACE, Trace, Value, clean, traces_url

log = logging.getLogger("engine.tracing")
BATCH = 64  # spans: while they are encoded, for 2 ms, the interpreter does nothing else
FLUSH_SECONDS = 2.0  # what the end of the server waits for the last spans to be taken
GONE = "disconnect"  # the error of a request whose client did not wait for the answer


class Tracing:
    """The spans of one server, on their way to `endpoint`."""

    def __init__(self, endpoint: str) -> None:
        """Raises ConfigError for an OTEL_* variable that the SDK does not take."""
        url = traces_url(endpoint)
        size = None if OTEL_BSP_MAX_EXPORT_BATCH_SIZE in os.environ else BATCH
        try:
            self._said = Said()
            self._exporter = Delivery(url, OTLPSpanExporter(endpoint=url), self._said)
            self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
            self._provider.add_span_processor(BatchSpanProcessor(self._exporter, max_export_batch_size=size))
        except ValueError as error:
            raise ConfigError(f"tracing cannot start as the environment's OTEL_* variables say: {error}") from None
        self._said.attach()
        self.middleware = trace_requests(self._provider.get_tracer("engine", __version__))

    async def close(self) -> None:
        """Send what is left, for at most FLUSH_SECONDS."""
        loop, sent = asyncio.get_running_loop(), anyio.Event()

        def end() -> None:
            self._provider.force_flush()
            self._exporter.shutdown()
            self._provider.shutdown()
            self._said.detach()  # not before: a batch that is given up is one more warning
            with suppress(RuntimeError):  # nobody waits any more, and the loop is closed
                loop.call_soon_threadsafe(sent.set)

        # A thread that no exit of the process waits for: a collector that says nothing holds it for seconds.
        threading.Thread(target=end, name="engine-traces-end", daemon=True).start()
        with anyio.move_on_after(FLUSH_SECONDS):
            await sent.wait()
        self._exporter.shutdown()  # where it still tries to send, it gives up


def _resource() -> Resource:
    """What the spans come from: as the environment says, or this engine."""
    found = Resource.create()
    unnamed = str(found.attributes[SERVICE_NAME]).startswith("unknown_service")
    return found.merge(Resource({SERVICE_NAME: PROVIDER})) if unnamed else found


# ── a request ────────────────────────────────────────────────────────────────────────────────


class Headers(Getter[CIMultiDictProxy[str]]):
    """How the propagator reads the headers of a request: all of one name, as `tracestate` may come in several. Of
    several `traceparent` none is the caller's."""

    def get(self, carrier: CIMultiDictProxy[str], key: str) -> list[str] | None:
        lines = carrier.getall(key, None)
        return None if lines is not None and len(lines) > 1 and key == "traceparent" else lines

    def keys(self, carrier: CIMultiDictProxy[str]) -> list[str]:
        return list(carrier.keys())


def trace_requests(tracer: Tracer) -> Middleware:
    """The middleware that makes a span of each request to a route in OPERATIONS."""
    propagator, headers = TraceContextTextMapPropagator(), Headers()

    @web.middleware
    async def trace_request(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        path = "" if resource is None else resource.canonical
        operation = OPERATIONS.get(path)
        if operation is None:
            return await handler(request)
        span = tracer.start_span(
            f"{request.method} {path}",
            propagator.extract(request.headers, getter=headers),
            kind=SpanKind.SERVER,
            attributes=_http_attributes(request, path),
        )
        if not span.is_recording():  # the caller, or the sampler, does not want it
            return await handler(request)
        trace = RequestSpan(tracer, span, operation, request.app[SERVICE].model)
        token = TRACE.set(trace)
        status: int | None = None
        try:
            response = await handler(request)
            status = response.status
            trace.streamed = response.content_type == "text/event-stream"
            return response
        finally:
            TRACE.reset(token)
            if PASSED not in request:  # else it is never sent: the front that answers has one of its own
                trace.end(status, request.get(ID, ""))

    return trace_request


def _http_attributes(request: web.Request, path: str) -> dict[str, Value]:
    """What conventions ask of a server's span at its start, so that samplers may go by it."""
    found: dict[str, Value] = {
        "http.request.method": request.method,
        "http.route": path,
        "url.path": clean(request.rel_url.raw_path),
        "url.scheme": request.scheme,
        "network.protocol.version": f"{request.version.major}.{request.version.minor}",
    }
    if request.remote:
        found["client.address"] = request.remote
    if agent := request.headers.get("User-Agent"):
        found["user_agent.original"] = clean(agent)
    return found


class RequestSpan(Trace):
    """The trace of one request, and the span that tells it."""

    def __init__(self, tracer: Tracer, span: Span, operation: str, served: str) -> None:
        super().__init__(operation, served)
        self._tracer = tracer
        self._span = span
        self._epoch = time.time_ns() - round(time.perf_counter() * 1e9)  # ns, of perf_counter's zero

    def end(self, status: int | None, request_id: str) -> None:
        """The request is answered, with `status`; None if its client has left."""
        span = self._span
        self.answered = True
        if request_id:
            span.set_attribute(f"http.response.header.{HEADER.lower()}", [request_id])
        if status is not None:
            span.set_attribute("http.response.status_code", status)
        self._describe(span)
        if status is None:
            self._fail(span, GONE)
        elif status >= 500:
            self._fail(span, self.cause or str(status))
        elif self.cause and status < 400:  # in the stream
            self._fail(span, self.cause)
        span.end(self._time(time.perf_counter()))  # not the clock's time, which may have been set since

    def late(self) -> None:
        """A child tells of it: the span of the request has ended."""
        start = self._time(min(reply.start for reply in self.replies))
        name = f"{self.operation} {clean(self.model or self.served)}"
        span = self._tracer.start_span(name, set_span_in_context(self._span), start_time=start)
        self._describe(span)
        if self.cause:
            self._fail(span, self.cause)
        span.end(self._time(time.perf_counter()))

    def _describe(self, span: Span) -> None:
        """The phases as children of `span`, and the attributes."""
        context = set_span_in_context(span)
        for name, start, end in self.phases():
            child = self._tracer.start_span(name, context, start_time=self._time(start))
            child.end(end_time=self._time(end))
        span.set_attributes(self.attributes())

    def _fail(self, span: Span, kind: str) -> None:
        span.set_attribute("error.type", kind)
        span.set_status(Status(StatusCode.ERROR))

    def _time(self, seconds: float) -> int:
        return self._epoch + round(seconds * 1e9)


# ── on their way ─────────────────────────────────────────────────────────────────────────────


class Delivery(SpanExporter):
    """`exporter`, whose failures are said once: from the first to the next success.

    `export` is called in threads of the SDK's."""

    def __init__(self, url: str, exporter: SpanExporter, said: "Said") -> None:
        self._url = url
        self._exporter = exporter
        self._arrives = True
        self._ended = False
        self._said = said

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._said.first = ""
        if self._ended:
            return SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # what the HTTP client raises; older exporters pass it on, and it is said below
            result, self._said.first = SpanExportResult.FAILURE, f"{type(error).__name__}: {error}"[:500]
        arrives = result is SpanExportResult.SUCCESS
        if arrives != self._arrives and not self._ended:
            self._arrives = arrives
            if arrives:
                log.info("spans arrive at %s again", self._url)
            else:
                log.warning(
                    "spans do not arrive at %s (%s); requests are served all the same, and spans are dropped until "
                    "they do; check --otlp-endpoint",
                    self._url, self._said.first or "no reason is given",
                )  # fmt: skip
        return result

    def shutdown(self) -> None:
        if not self._ended:
            self._ended = True
            self._exporter.shutdown()


class Said(logging.Handler):
    """Takes what the SDK logs in place of the root's handlers, as it repeats itself for every batch, and keeps the
    exporter's first warning of each batch: it says why."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.first = ""
        self._logger = logging.getLogger("opentelemetry")

    def attach(self) -> None:
        self._logger.addHandler(self)
        self._logger.propagate = False

    def detach(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = not any(isinstance(other, Said) for other in self._logger.handlers)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()[:500]
        if record.name.startswith("opentelemetry.exporter"):  # else the queue is full, which is no reason
            self.first = self.first or message
        log.debug("%s", message)
