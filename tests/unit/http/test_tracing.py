"""Traces over OTLP: a collector of our own gets the spans as a real one would, in protobuf over HTTP."""

import asyncio
import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from aiohttp import web
from house import House, open_house
from http_front import FakeFront, chunks, serving
from hypothesis import given
from hypothesis import strategies as st
from joined_fronts import joined_fronts
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from engine.cli import main
from engine.config import resolve
from engine.errors import ConfigError, WorkerError
from engine.http.app import ROUTES
from engine.http.exporting import tracing_to
from engine.http.otlp import Delivery, Said
from engine.http.request_id import HEADER
from engine.http.tracing import OPERATIONS, ReplyTrace, Trace, clean, traces_url
from engine.messages.reply import Chunk

pytestmark = pytest.mark.anyio
HI = [{"role": "user", "content": "hi"}]
TRACE_ID, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-{PARENT}-01"}
OK, ERROR = 0, 2  # of a span's status: unset, and error
SERVER = 2  # of a span's kind


class Span:
    """One span as it was sent."""

    def __init__(self, sent: Any, resource: Any) -> None:
        self.name, self.kind, self.status = sent.name, sent.kind, sent.status.code
        self.trace, self.id, self.parent = sent.trace_id.hex(), sent.span_id.hex(), sent.parent_span_id.hex()
        self.state = sent.trace_state
        self.start, self.end = sent.start_time_unix_nano, sent.end_time_unix_nano
        self.attributes = {each.key: value_of(each.value) for each in sent.attributes}
        self.resource = {each.key: value_of(each.value) for each in resource.attributes}


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [value_of(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)


class Collector:
    """Takes spans, or answers `status` in their place."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.status = 200
        self.asked = 0
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        self.asked += 1
        sent = ExportTraceServiceRequest.FromString(await request.read())
        if self.status == 200:
            for group in sent.resource_spans:
                self.spans += [Span(span, group.resource) for scope in group.scope_spans for span in scope.spans]
        return web.Response(status=self.status)

    async def servers(self, count: int = 1) -> list[Span]:
        """The spans of the first `count` requests, once they are there."""
        with anyio.fail_after(60):
            while len(found := [span for span in self.spans if span.kind == SERVER]) < count:
                await anyio.sleep(0.005)
        return found

    def children(self, parent: Span) -> list[Span]:
        return sorted((span for span in self.spans if span.parent == parent.id), key=lambda span: span.start)


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "5")
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield collector
    await runner.cleanup()


@asynccontextmanager
async def traced(endpoint: str, **options: Any) -> AsyncIterator[tuple[House, aiohttp.ClientSession]]:
    """A house and a session with a server over it that traces to `endpoint`."""
    async with (
        open_house(**options) as house,
        serving(house.front, otlp_endpoint=endpoint, api_key=("key",)) as url,  # type: ignore[arg-type]
        aiohttp.ClientSession(url, headers={"Authorization": "Bearer key"}) as session,
    ):
        yield house, session


async def post(session: aiohttp.ClientSession, path: str, body: object, **headers: str) -> tuple[int, bytes]:
    async with session.post(path, json=body, headers=headers) as response:
        return response.status, await response.read()


# ── what a span says ─────────────────────────────────────────────────────────────────────────

GENERATING: list[tuple[str, dict[str, Any], str, str]] = [
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 3, "temperature": 0}, "chat", "length"),
    ("/v1/completions", {"prompt": "abcd", "max_tokens": 3, "temperature": 0}, "text_completion", "length"),
    ("/v1/completions", {"prompt": "abcd", "temperature": 0, "stop": "g"}, "text_completion", "stop"),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 3, "temperature": 0}, "chat", "length"),
    ("/v1/messages", {"messages": HI, "max_tokens": 3, "temperature": 0}, "chat", "length"),
    (
        "/generate",
        {"text": "ab", "sampling_params": {"max_new_tokens": 3, "temperature": 0}},
        "text_completion",
        "length",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_each_generating_route_has_its_span(collector: Collector, stream: bool) -> None:
    before, ids = time.time_ns(), set()
    async with traced(collector.url) as (_, session):
        for path, body, *_ in GENERATING:
            headers = SAMPLED | {"tracestate": "a=b,c=d", HEADER: "mine"}
            status, answer = await post(session, path, body | {"stream": stream}, **headers)
            assert status == 200
            ids |= {found.decode() for found in re.findall(rb'"id": ?"([^"]+)"', answer)}
        spans = await collector.servers(len(GENERATING))
    for span, (path, _, operation, finish) in zip(spans, GENERATING, strict=True):
        assert (span.name, span.trace, span.parent, span.state) == (f"POST {path}", TRACE_ID, PARENT, "a=b,c=d")
        assert (span.status, span.resource["service.name"]) == (OK, "actorserve")
        said = span.attributes
        assert (
            said.items()
            >= {
                "http.request.method": "POST",
                "http.route": path,
                "url.path": path,
                "url.scheme": "http",
                "http.response.status_code": 200,
                "http.response.header.x-request-id": ["mine"],
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "actorserve",
                "gen_ai.request.model": "echo",
                "gen_ai.request.temperature": 0.0,
                "gen_ai.response.model": "echo",
                "gen_ai.response.finish_reasons": [finish],
                "gen_ai.usage.output_tokens": 3,
            }.items()
        )
        assert said["gen_ai.usage.input_tokens"] in (2, 3, 4)
        assert said["gen_ai.response.id"] in ids
        assert ("gen_ai.request.stream" in said) == ("gen_ai.response.time_to_first_chunk" in said) == stream
        children = collector.children(span)
        assert [child.name for child in children] == ["queue", "prefill", "decode"]
        assert {child.trace for child in children} == {TRACE_ID}
        times = [before, span.start, *(time for child in children for time in (child.start, child.end)), span.end]
        assert times == sorted(times)
        assert [child.end for child in children[:2]] == [child.start for child in children[1:]]
    assert len(collector.spans) == 4 * len(GENERATING)


async def test_the_replies_of_a_request_are_one_span(collector: Collector) -> None:
    async with traced(collector.url) as (_, session):
        _, answer = await post(session, "/v1/completions", {"prompt": ["abcd", "abcde"], "n": 3, "max_tokens": 2})
        (span,) = await collector.servers()
    said = span.attributes
    assert said["gen_ai.request.choice.count"] == 3
    assert said["gen_ai.response.finish_reasons"] == ["length"] * 6
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (9, 12)  # as the answer's usage
    assert b'"usage":{"prompt_tokens":9,"completion_tokens":12,' in answer
    assert [child.name for child in collector.children(span)] == ["queue", "prefill", "decode"]


async def test_cached_tokens_and_vectors(collector: Collector) -> None:
    async with traced(collector.url) as (_, session):
        for _ in range(2):
            await post(session, "/v1/completions", {"prompt": "abcdefghij", "max_tokens": 1})
        spans = await collector.servers(2)
    assert [span.attributes["gen_ai.usage.cache_read.input_tokens"] for span in spans] == [0, 8]
    collector.spans.clear()
    async with traced(collector.url, embedding_size=4) as (_, session):
        assert (await post(session, "/v1/embeddings", {"input": ["abc", "de"]}))[0] == 200
        (span,) = await collector.servers()
    said = span.attributes
    assert (said["gen_ai.operation.name"], said["gen_ai.usage.input_tokens"]) == ("embeddings", 5)


async def test_the_queue_ends_where_the_request_is_placed(collector: Collector) -> None:
    async with traced(collector.url) as (house, session), anyio.create_task_group() as group:
        await post(session, "/pause_generation", {})
        group.start_soon(post, session, "/v1/completions", {"prompt": "abcd", "max_tokens": 2})
        with anyio.fail_after(60):
            while house.scheduler.scheduler is None or not house.scheduler.scheduler.counts()["waiting"]:
                await anyio.sleep(0.002)
        resumed = time.time_ns()
        await post(session, "/continue_generation", None)
        (span,) = await collector.servers()
    queue, prefill, _ = collector.children(span)
    assert queue.start < resumed < queue.end == prefill.start < prefill.end


async def test_other_routes_have_none(collector: Collector) -> None:
    async with traced(collector.url) as (_, session):
        for path in ("/v1/models", "/health", "/metrics", "/nowhere"):
            async with session.get(path, headers=SAMPLED):
                pass
        await post(session, "/tokenize", {"prompt": "a"}, **SAMPLED)
        await post(session, "/v1/completions", {"prompt": "a", "max_tokens": 1})
        assert len(await collector.servers()) == 1
    assert set(OPERATIONS) <= {route.path for route in ROUTES if route.method == "POST"}


async def test_a_background_response_has_a_span_of_its_own(collector: Collector) -> None:
    async with traced(collector.url, seconds=0.01) as (_, session):
        await post(session, "/v1/responses", {"input": "a", "background": True, "max_output_tokens": 3}, **SAMPLED)
        (span,) = await collector.servers()
        with anyio.fail_after(60):
            while not (later := collector.children(span)):
                await anyio.sleep(0.005)
    (child,) = later
    assert "gen_ai.usage.output_tokens" not in span.attributes
    assert (child.name, child.attributes["gen_ai.usage.output_tokens"]) == ("chat echo", 3)
    assert [phase.name for phase in collector.children(child)] == ["queue", "prefill", "decode"]


# ── whose trace it is ────────────────────────────────────────────────────────────────────────


async def test_the_parent_decides_what_is_sampled(collector: Collector) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    async with traced(collector.url) as (_, session):
        await post(session, "/v1/completions", body, traceparent=f"00-{TRACE_ID}-{PARENT}-00")
        for wrong in ("", "no", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE_ID}-{PARENT}-01", "x" * 4000):
            await post(session, "/v1/completions", body, traceparent=wrong)
        spans = await collector.servers(5)
    assert len(spans) == 5  # a caller that does not want a trace gets none
    assert {span.parent for span in spans} == {""} and len({span.trace for span in spans}) == 5
    assert TRACE_ID not in {span.trace for span in spans}


async def test_the_environment_names_the_service_and_the_sampler(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    async with traced(collector.url) as (_, session):
        body = {"prompt": "a", "max_tokens": 1}
        await post(session, "/v1/completions", body)
        await post(session, "/v1/completions", body, **SAMPLED)
        (span,) = await collector.servers()
    assert (span.trace, span.resource["service.name"]) == (TRACE_ID, "mine")


# ── how it ends ──────────────────────────────────────────────────────────────────────────────


async def test_refused_requests(collector: Collector) -> None:
    async with traced(collector.url) as (house, session):
        refused: list[tuple[Any, dict[str, str], int]] = [
            ({}, {}, 400),
            ({"prompt": "a", "model": "other" * 100}, {}, 404),
            ({"prompt": "a"}, {"Authorization": "Bearer no"}, 401),
            ({"prompt": "a" * 5000}, {}, 400),
        ]
        for body, headers, status in refused:
            assert (await post(session, "/v1/completions", body, **headers))[0] == status
        house.front.draining = True
        assert (await post(session, "/v1/completions", {"prompt": "a"}))[0] == 503
        spans = await collector.servers(5)
    assert [span.attributes["http.response.status_code"] for span in spans] == [400, 404, 401, 400, 503]
    assert [span.status for span in spans] == [OK, OK, OK, OK, ERROR]  # what a client does wrong is no server's error
    assert [span.attributes.get("error.type") for span in spans] == [None, None, None, None, "draining"]
    assert spans[1].attributes["gen_ai.request.model"] == ("other" * 100)[:200]


async def test_a_failure_in_the_stream_is_an_error(collector: Collector) -> None:
    front = FakeFront([*chunks("a", "b", "c")[:2], WorkerError("it died")])
    async with serving(front, otlp_endpoint=collector.url) as url, aiohttp.ClientSession(url) as session:
        await post(session, "/v1/completions", {"prompt": "x", "stream": True})
        (span,) = await collector.servers()
    assert (span.status, span.attributes["error.type"]) == (ERROR, "WorkerError")
    assert span.attributes["gen_ai.usage.output_tokens"] == 2
    assert "gen_ai.response.finish_reasons" not in span.attributes


async def test_clients_that_leave(collector: Collector) -> None:
    async with traced(collector.url) as (house, session):
        body = {"prompt": "a", "max_tokens": 3000, "stream": True}
        async with session.post("/v1/completions", json=body, headers=SAMPLED) as response:
            await response.content.readany()
        (span,) = await collector.servers()
        await house.settled()
    assert (span.status, span.attributes["error.type"]) == (ERROR, "disconnect")
    assert span.attributes["gen_ai.usage.output_tokens"] >= 1
    assert [child.name for child in collector.children(span)] == ["queue", "prefill", "decode"]


async def test_an_aborted_request_is_no_error(collector: Collector) -> None:
    async with traced(collector.url, seconds=0.005) as (_, session), anyio.create_task_group() as group:
        body = {"prompt": "a", "max_tokens": 3000}
        group.start_soon(lambda: post(session, "/v1/completions", body, **{HEADER: "mine"}))
        with anyio.fail_after(60):
            while b'"aborted":0' in (await post(session, "/abort_request", {"rid": "mine"}))[1].replace(b" ", b""):
                await anyio.sleep(0.002)
        (span,) = await collector.servers()
    assert (span.status, span.attributes["gen_ai.response.finish_reasons"]) == (OK, ["abort"])


async def test_bytes_that_are_no_text_spoil_no_batch(collector: Collector) -> None:
    async with traced(collector.url) as (_, session):
        host, port = session._base_url.host, session._base_url.port  # type: ignore[union-attr]
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key\r\nConnection: close\r\n"
            b'User-Agent: caf\xe9\r\nContent-Length: 29\r\n\r\n{"prompt":"a","max_tokens":1}'
        )
        assert b" 200 " in await reader.readline()
        writer.close()
        (span,) = await collector.servers()
    assert span.attributes["user_agent.original"] == "caf?"
    assert clean("é" * 300) == "é" * 200


# ── a collector that is not there ────────────────────────────────────────────────────────────


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith(("engine.tracing", "opentelemetry"))]


async def test_what_does_not_arrive_is_said_once(
    collector: Collector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    collector.status = 400
    body = {"prompt": "a", "max_tokens": 1}
    with caplog.at_level("INFO"):
        async with traced(collector.url) as (_, session):
            with anyio.fail_after(60):
                while collector.asked < 5:
                    assert (await post(session, "/v1/completions", body))[0] == 200
                    await anyio.sleep(0.005)
            (warning,) = warnings(caplog)
            assert f"spans do not arrive at {collector.url}/v1/traces (" in warning and "400" in warning
            collector.status = 200
            with anyio.fail_after(60):
                while len(warnings(caplog)) < 2:
                    assert (await post(session, "/v1/completions", body))[0] == 200
                    await anyio.sleep(0.005)
    assert warnings(caplog)[1:] == [f"spans arrive at {collector.url}/v1/traces again"]


def test_the_reason_is_the_exporters(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            for name, said in (("sdk", "Queue full"), ("exporter", "no such host"), ("exporter", "Failed")):
                logging.getLogger(f"opentelemetry.{name}").warning(said)
            return SpanExportResult.FAILURE

    said = Said()
    delivery = Delivery("http://h/v1/traces", Failing(), said)
    said.attach()
    delivery.export(())
    said.detach()
    (warning,) = warnings(caplog)
    assert "spans do not arrive at http://h/v1/traces (no such host); " in warning


async def test_a_port_that_nobody_listens_on_disturbs_nobody(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "5")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        with anyio.fail_after(60):
            async with traced(endpoint) as (_, session):
                while not warnings(caplog):
                    assert (await post(session, "/v1/completions", {"prompt": "a", "max_tokens": 1}))[0] == 200
                    await anyio.sleep(0.005)
    (warning,) = warnings(caplog)
    assert endpoint in warning and "refused" in warning


async def test_a_collector_that_says_nothing_holds_up_no_end(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with anyio.fail_after(9):  # it would be waited for for 10 s
            async with traced(f"http://127.0.0.1:{silent.getsockname()[1]}") as (_, session):
                assert (await post(session, "/v1/completions", {"prompt": "a", "max_tokens": 1}))[0] == 200


# ── the option ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://localhost:4318", "http://localhost:4318/v1/traces"),
        ("http://localhost:4318/", "http://localhost:4318/v1/traces"),
        ("https://otlp.example.com/otlp", "https://otlp.example.com/otlp/v1/traces"),
        ("http://[::1]:4318/v1/traces", "http://[::1]:4318/v1/traces"),
    ],
)
def test_endpoints(endpoint: str, url: str) -> None:
    assert traces_url(endpoint) == url


@pytest.mark.parametrize(
    "endpoint", ["localhost:4318", "grpc://localhost:4317", "http://", "http://h:99999", "http://h?a=b", "http://[::1"]
)
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"--otlp-endpoint is '.*'; give the URL of a collector"):
        tracing_to(endpoint)


def test_a_variable_that_the_sdk_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "3")
    opened = tracing_to("http://localhost:4318")
    with pytest.raises(ConfigError, match=r"OTEL_\* variables say: .*max_export_batch_size"):
        opened and opened()


def test_the_start_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "engine.http.otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert main(["serve", "--model", "nothing-of-that-name", "--otlp-endpoint", "http://localhost:4318"]) == 2
    said = capsys.readouterr().err
    assert "--otlp-endpoint is 'http://localhost:4318'" in said and "opentelemetry.sdk.trace" in said
    assert "pip install 'actorserve[otel]'" in said


def test_nothing_is_imported_without_the_option() -> None:
    assert resolve({}).server.otlp_endpoint is None
    program = (
        "import sys; from http_front import FakeFront; import engine.runtime.launch\n"
        "from engine.config import ServerOptions\n"
        "from engine.http.app import create_app; create_app(FakeFront(), ServerOptions())\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry', 'google', 'requests'))])"
    )
    run = [sys.executable, "-c", program]
    found = subprocess.run(
        run, cwd=Path(__file__).parents[2] / "lib", capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout == "[]\n"


# ── phases ───────────────────────────────────────────────────────────────────────────────────

seconds = st.floats(0, 10)


@given(st.lists(st.tuples(seconds, seconds, seconds, seconds, seconds), min_size=1, max_size=4), st.booleans())
def test_phases_follow_each_other(replies: list[tuple[float, ...]], answers: bool) -> None:
    trace, began, ends = Trace("chat", "m"), [], []
    for start, wait, prefill, decode, rest in replies:
        reply = ReplyTrace(0, trace)
        trace.replies.append(reply)
        reply.start = start
        first = start + wait if answers else None
        reply.end(Chunk("r", "", []), (first, start + wait + decode if answers else start), prefill)
        reply.ended = start + wait + decode + rest
        began.append(start)
        ends.append(reply.ended)
    phases = trace.phases()
    assert [phase.name for phase in phases] == (["queue", "prefill", "decode"] if answers else ["queue"])
    times = [time for phase in phases for time in (phase.start, phase.end)]
    assert times == sorted(times)
    assert (times[0], times[1:-1:2]) == (min(began), times[2::2])
    assert times[-1] <= max(ends)


async def test_a_request_that_is_passed_on_is_one_span_of_the_front_that_answers(collector: Collector) -> None:
    async with joined_fronts(FakeFront(), FakeFront(), otlp_endpoint=collector.url) as engine:
        first, second = engine.sessions
        async with first.post("/v1/responses", json={"input": "Hi."}) as response:
            made = await response.json()
        asked = {"input": "And?", "previous_response_id": made["id"]}
        async with second.post("/v1/responses", json=asked, headers=SAMPLED) as response:
            more = await response.json()
    begun, passed = await collector.servers(2)
    assert begun.attributes["gen_ai.response.id"] == made["id"]
    assert (
        passed.attributes["gen_ai.response.id"] == more["id"] and passed.attributes["gen_ai.usage.output_tokens"] == 3
    )
    assert (passed.trace, passed.parent) == (TRACE_ID, PARENT)
    assert len([span for span in collector.spans if span.kind == SERVER]) == 2  # the servers have sent all
