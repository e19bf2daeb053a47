"""`engine bench`: the traffic is what was asked for, the load generator notes what came, and the figures follow."""

import json
import random
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, closing
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec
import pytest
from aiohttp import web
from http_front import FakeFront, chunks, serving
from hypothesis import given
from hypothesis import strategies as st

from engine import cli
from engine.client.bench.asking import Api, Asker, Target
from engine.client.bench.load import Clock, Record, Run, of_chunks, play
from engine.client.bench.plot import draw, ticks
from engine.client.bench.process import serve_command, serve_environment
from engine.client.bench.report import report_of, samples_of, totals_of
from engine.client.bench.spread import percentile
from engine.client.bench.traffic import Turn, arrivals, conversations
from engine.client.client import Client
from engine.client.options import TrafficOptions
from engine.config import Config, resolve
from engine.errors import RequestError, WorkerError
from engine.messages.reply import Chunk
from engine.params.sampling import SamplingParams

ROOT = Path(__file__).parents[3]


def words(text: str) -> int:
    return len(text.split())


# ── traffic ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("traffic", ["random", "shared-prefix", "multi-turn"])
def test_the_seed_decides_the_traffic(traffic: Any) -> None:
    options = TrafficOptions(traffic=traffic, requests=10, range_ratio=0.5)
    assert conversations(options) == conversations(options)
    assert conversations(options) != conversations(msgspec.structs.replace(options, seed=1))
    assert sum(map(len, conversations(options))) == 10


def test_lengths_are_as_asked_for() -> None:
    fixed = conversations(TrafficOptions(requests=20, input_len=30, output_len=5))
    assert {(words(turn.text), turn.output_len) for (turn,) in fixed} == {(30, 5)}
    spread = [
        turn for (turn,) in conversations(TrafficOptions(requests=400, input_len=30, output_len=4, range_ratio=0.5))
    ]
    assert {words(turn.text) for turn in spread} == set(range(15, 46))
    assert {turn.output_len for turn in spread} == set(range(2, 7))
    assert all(words(turn.text) >= 1 for (turn,) in conversations(TrafficOptions(input_len=1, range_ratio=1)))


def test_prompts_of_a_group_begin_alike_and_others_do_not() -> None:
    options = TrafficOptions(traffic="shared-prefix", requests=40, groups=3, prefix_len=20, input_len=10)
    prompts = [turn.text.split() for (turn,) in conversations(options)]
    assert len({tuple(prompt[:20]) for prompt in prompts}) == 3
    assert len({prompt[0] for prompt in prompts}) <= 3
    assert len({tuple(prompt[20:]) for prompt in prompts}) == 40


def test_conversations_have_the_turns_asked_for() -> None:
    made = conversations(TrafficOptions(traffic="multi-turn", requests=10, turns=4))
    assert [len(conversation) for conversation in made] == [4, 4, 2]


def test_arrivals_are_a_poisson_process() -> None:
    times = list(takewhile(lambda at: at < 200, arrivals(50.0, 3)))
    gaps = [after - before for before, after in pairwise(times)]
    assert min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)  # exponential: as wide as its mean


# ── load ─────────────────────────────────────────────────────────────────────────────────────


class Answers:
    """Answers a prompt with "<n>" in pieces, and remembers what it was asked and how many were open."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.prompts: list[str] = []
        self.lengths: list[int] = []
        self.open = 0
        self.most = 0
        self.fails_at = fails_at

    async def __call__(self, prompt: str, length: int) -> AsyncGenerator[Chunk, None]:
        number = len(self.prompts)
        self.prompts.append(prompt)
        self.lengths.append(length)
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            await anyio.lowlevel.checkpoint()
            if number == self.fails_at:
                raise RequestError("no")
            yield Chunk("", f"<{number}", [])
            await anyio.lowlevel.checkpoint()
            yield Chunk("", ">", [])
            yield Chunk("", "", [], "length", None, 11, 4, 3)
        finally:
            self.open -= 1


def singles(count: int) -> list[tuple[Turn]]:
    return [(Turn(f"p{number}", number + 1),) for number in range(count)]


@pytest.mark.anyio
@pytest.mark.parametrize(("concurrency", "most"), [(1, 1), (3, 3), (50, 7), (None, 7)])
async def test_so_many_requests_are_open(concurrency: int | None, most: int) -> None:
    answers = Answers()
    replies: list[None] = []
    run = await play(singles(7), of_chunks(answers), concurrency=concurrency, on_reply=lambda: replies.append(None))
    assert answers.most == most
    assert sorted(answers.prompts) == [f"p{number}" for number in range(7)]
    assert answers.lengths == [int(prompt[1:]) + 1 for prompt in answers.prompts]
    assert len(replies) == run.asked == len(run.answered) == 7


@pytest.mark.anyio
async def test_a_record_has_what_came() -> None:
    run = await play(singles(1), of_chunks(Answers()))
    (record,) = run.records
    assert (record.input_tokens, record.cached_tokens, record.output_tokens) == (11, 4, 3)
    assert len(record.pieces) == 2  # the last chunk brought no text
    assert record.sent <= record.pieces[0] <= record.pieces[1] <= record.ended
    assert record.gaps == [record.pieces[1] - record.pieces[0]]
    assert record.per_token == record.gaps[0] / 2
    assert run.seconds == record.whole


@pytest.mark.anyio
async def test_a_conversation_grows_by_its_replies() -> None:
    answers = Answers()
    run = await play([(Turn("a", 1), Turn("b", 1), Turn("c", 1))], of_chunks(answers))
    assert answers.prompts == ["a", "a<0>b", "a<0>b<1>c"]
    assert all(before.ended <= after.sent for before, after in pairwise(run.records))


@pytest.mark.anyio
async def test_a_failure_ends_its_conversation_alone() -> None:
    run = await play([(Turn("a", 1), Turn("b", 1)), (Turn("c", 1),)], of_chunks(Answers(fails_at=0)), concurrency=1)
    assert [record.error for record in run.records] == ["no", None]
    assert run.asked == 3
    assert totals_of([run])["failed"] == 2
    report = report_of("serve", {}, [run], samples_of([run]))
    assert report.errors == {"no": 1}
    assert report.requests[0]["error"] == "no"


@pytest.mark.anyio
async def test_at_a_rate_the_clock_starts_when_a_request_was_due() -> None:
    run = await play(singles(5), of_chunks(Answers()), rate=2000.0, seed=4)
    due = arrivals(2000.0, 4)
    assert sorted(record.sent for record in run.records) == [next(due) for _ in range(5)]
    assert all(record.first >= 0 for record in run.records)


@pytest.mark.anyio
@pytest.mark.parametrize(("finish", "counted"), [("length", 9), ("stop", 2)])
async def test_tokens_that_a_server_does_not_count(finish: Any, counted: int) -> None:
    async def ask(prompt: str, length: int) -> AsyncGenerator[Chunk, None]:
        yield Chunk("", "a", [])
        yield Chunk("", "b", [])
        yield Chunk("", "", [], finish)

    run = await play([(Turn("p", 9),)], of_chunks(ask))
    assert run.records[0].output_tokens == counted


@pytest.mark.anyio
async def test_a_reply_without_text_has_a_first_token_too() -> None:
    async def ask(prompt: str, length: int) -> AsyncGenerator[Chunk, None]:
        yield Chunk("", "", [], "length", None, 3, 0, 1)

    (record,) = (await play(singles(1), of_chunks(ask))).records
    assert record.first >= 0
    assert record.gaps == []
    assert record.per_token is None


# ── the client ───────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def raw_server(*writes: bytes, status: int = 200) -> AsyncIterator[str]:
    """The URL of a server that answers every POST with `writes`, each a write of its own."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        for data in writes:
            await response.write(data)
            await anyio.lowlevel.checkpoint()
        return response

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


EVENTS = (
    b': a comment\r\n\r\ndata: {"choices": [{"text": "H\xc3\xa9", "finish_reason": null}]}\r\n\r\n'
    b'data:{"choices":[{"text":"llo"}],"usage":null}\n\n'
    b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}\n\ndata: [DONE]\n\n'
)


CUTS = pytest.mark.parametrize("size", [1, 7, 60, 10_000])


@pytest.mark.anyio
@CUTS
async def test_events_are_read_however_they_are_cut(size: int) -> None:
    cut = [EVENTS[start : start + size] for start in range(0, len(EVENTS), size)]
    async with raw_server(*cut) as url, Client(url, model="m") as client:
        found = [chunk async for chunk in client.chat([], SamplingParams())]
    assert [chunk.text for chunk in found] == ["Hé", "llo", ""]
    assert (found[-1].finish, found[-1].prompt_tokens, found[-1].completion_tokens) == ("length", 5, 2)


async def asked(url: str, api: Api = "openai") -> tuple[str, Record]:
    """What the load generator reads of one request."""
    record = Record(0.0, [])
    with closing(Asker(Target(url, "m", api))) as ask:
        read = await ask(["p"], 2, record, Clock(0.0))
        return read(), record


@pytest.mark.anyio
@CUTS
async def test_the_load_generator_reads_them_too(size: int) -> None:
    cut = [EVENTS[start : start + size] for start in range(0, len(EVENTS), size)]
    async with raw_server(*cut) as url:
        text, record = await asked(url)
    assert text == "Héllo"
    assert (record.error, record.input_tokens, record.output_tokens) == (None, 5, 2)
    assert len(record.pieces) == 2
    assert record.events == 4
    assert record.pieces[0] <= record.pieces[1] <= record.ended


FAILURES = pytest.mark.parametrize(
    ("writes", "status", "error", "said"),
    [
        ([b'data: {"choices":[{"text":"a"}]}\n\n'], 200, WorkerError, "without a finish reason"),
        ([b'data: {"error": {"message": "out of luck"}}\n\n'], 200, WorkerError, "out of luck"),
        ([b'{"error": {"message": "too long"}}'], 400, RequestError, "too long"),
        ([b'{"detail": "of FastAPI"}'], 422, RequestError, "of FastAPI"),
        ([b"<html>bad gateway</html>"], 502, RequestError, "bad gateway"),
    ],
)


@pytest.mark.anyio
@FAILURES
async def test_a_reply_that_fails_says_why(writes: list[bytes], status: int, error: type[Exception], said: str) -> None:
    async with raw_server(*writes, status=status) as url, Client(url, model="m") as client:
        with pytest.raises(error, match=said):
            [chunk async for chunk in client.chat([], SamplingParams())]


@pytest.mark.anyio
@FAILURES
async def test_a_failed_reply_is_recorded(writes: list[bytes], status: int, error: type[Exception], said: str) -> None:
    async with raw_server(*writes, status=status) as url:
        text, record = await asked(url)
    assert text == ""
    assert said in (record.error or "")


@pytest.mark.anyio
@pytest.mark.parametrize("api", ["openai", "native"])
async def test_both_apis_against_our_server(api: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    front = FakeFront(chunks("Hello", ", ", "world", finish="length"))
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    async with serving(front) as url:
        line = f"bench serve --url {url} --api {api} --requests 6 --input-len 5 --output-len 3 --concurrency 2"
        argv = [*line.split(), "--json", str(figures), "--plot", str(plot)]
        assert await anyio.to_thread.run_sync(cli.main, argv) == 0
    assert len(front.asked) == 7  # one warms up
    for request in front.asked:
        assert words(request.text or "") == 5
        assert (request.sampling.temperature, request.sampling.max_tokens, request.sampling.ignore_eos) == (0, 3, True)
    assert len({request.text for request in front.asked}) == 7
    found = json.loads(figures.read_text())
    assert found["totals"]["answered"] == 6
    assert found["totals"]["output_tokens"] == 18
    assert found["totals"]["cached_tokens"] == 24
    assert found["settings"]["model"] == "fake"
    assert set(found["milliseconds"]) == {"ttft", "itl", "tpot", "e2e"}
    assert len(found["requests"]) == 6
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    said = capsys.readouterr().out
    for label in ("TTFT", "ITL", "TPOT", "E2E", "p50", "p99", "6 requests", "output tokens/s"):
        assert label in said


@pytest.mark.anyio
async def test_failed_requests_are_counted_and_end_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    front = FakeFront([RequestError("not today", status=503)])
    async with serving(front) as url:
        argv = f"bench serve --url {url} --warmup 0 --requests 3".split()
        assert await anyio.to_thread.run_sync(cli.main, argv) == 1
        assert "failed 3 times: not today" in capsys.readouterr().out
        assert await anyio.to_thread.run_sync(cli.main, [*argv, "--warmup", "1"]) == 2
        assert "not today" in capsys.readouterr().err


@pytest.mark.anyio
async def test_the_extra_body_is_merged(capsys: pytest.CaptureFixture[str]) -> None:
    front = FakeFront()
    async with serving(front, api_key=("secret",)) as url:
        argv = ["bench", "serve", "--url", f"{url}/v1/", "--requests", "1", "--warmup", "0", "--api-key", "secret"]
        extra = ["--extra-body", '{"ignore_eos": null, "top_k": 5}']
        assert await anyio.to_thread.run_sync(cli.main, [*argv, *extra]) == 0
    assert front.asked[0].sampling.top_k == 5
    assert front.asked[0].sampling.ignore_eos is False


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("serve --url http://127.0.0.1:9", ["http://127.0.0.1:9", "is it running"]),
        ("serve --url localhost:8000", ["localhost:8000", "http://host:port"]),
        ("serve --url http://127.0.0.1:9 --max-running 3", ["--max-running", "--url"]),
        ("serve --rate 2 --concurrency 3", ["--rate", "2", "--concurrency", "3"]),
        ("serve --rate 0", ["--rate", "'0'", "above 0"]),
        ("serve --traffic heavy", ["--traffic", "'heavy'", "multi-turn"]),
        ("serve --extra-body [1]", ["--extra-body", "[1]", "JSON object"]),
        ("serve --range-ratio 2", ["--range-ratio", "'2'", "0 to 1"]),
        ("latency --batch 0", ["--batch", "'0'", "at least 1"]),
        ("latency --concurrency 2", ["--concurrency"]),  # the load of a server
        ("throughput --model nothing", ["nothing", "does not exist"]),
        ("startup --model nothing --repeat 1", ["ended with code 2", "nothing", "does not exist"]),
        ("", ["COMMAND"]),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], line: str, said: list[str]) -> None:
    assert cli.main(["bench", *line.split()]) == 2
    message = capsys.readouterr().err
    assert message.startswith("engine: error: ")
    for part in said:
        assert part in message


# ── our own processes ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "labels"),
    [
        ("serve --requests 3 --traffic multi-turn --rate 100", ["3 requests", "TTFT", "of them cached"]),
        ("throughput --requests 3 --traffic shared-prefix --prefix-len 8", ["3 requests", "TTFT", "TPOT"]),
        ("latency --batch 2 --repeat 2", ["4 requests", "whole batch"]),
        ("startup --repeat 1", ["process start to ready", "process start to first token"]),
    ],
)
def test_each_command_on_the_echo_model(capsys: pytest.CaptureFixture[str], line: str, labels: list[str]) -> None:
    lengths = [] if line.startswith("startup") else ["--input-len", "4", "--output-len", "4"]
    assert cli.main(["bench", *line.split(), *lengths, "--model", "echo", "--placement", "single"]) == 0
    said = capsys.readouterr().out
    for label in labels:
        assert label in said


def test_a_server_that_we_start_has_our_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Config] = []
    monkeypatch.setattr("engine.runtime.serve.serve", lambda config: served.append(config) or 0)
    monkeypatch.setenv("ENGINE_MAX_RUNNING", "3")
    monkeypatch.delenv("ENGINE_SPARE_WORKER", raising=False)  # of all tests
    config = resolve({"prefix_cache": "false", "plugins": "llama,lpm", "api_key": "-k,l", "max_running": "64"})
    command = serve_command(config, 9)
    assert not any("-k,l" in word for word in command)  # others would see it
    for name, value in serve_environment(config).items():
        monkeypatch.setenv(name, value)
    assert cli.main(command[command.index("serve") :]) == 0
    server = msgspec.structs.replace(config.server, host="127.0.0.1", port=9)
    assert served == [msgspec.structs.replace(config, server=server)]


# ── figures ──────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.floats(0, 1e6), min_size=2), st.integers(1, 99))
def test_percentiles_are_those_of_the_statistics_module(values: list[float], percent: int) -> None:
    expected = statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
    assert percentile(sorted(values), percent / 100) == pytest.approx(expected, abs=1e-6)


def test_totals_of_several_runs_add_up() -> None:
    records = [
        Record(0.0, [0.1, 0.3], 0.5, 10, 2, 3),
        Record(0.0, [0.2], 1.0, 20, 0, 1),
        Record(0.0, [], 1.0, error="x"),
    ]
    totals = totals_of([Run(records, 3, 1.0), Run(records[:1], 1, 0.5)])
    assert totals["answered"] == 3
    assert totals["failed"] == 1
    assert totals["output_tokens_per_second"] == pytest.approx(7 / 1.5)
    assert totals["tokens_per_second"] == pytest.approx(47 / 1.5)
    samples = samples_of([Run(records, 3, 1.0)])
    assert samples == {
        "ttft": [100.0, 200.0],
        "itl": [pytest.approx(200.0)],
        "tpot": [pytest.approx(100.0)],
        "e2e": [500.0, 1000.0],
    }


@given(st.floats(1e-6, 1e9))
def test_ticks_reach_the_largest_value(largest: float) -> None:
    marks = ticks(largest)
    assert marks[0] == 0
    assert marks[-2] < largest <= marks[-1] * (1 + 1e-6)
    assert 3 <= len(marks) <= 6


def test_a_plot_shows_every_distribution_inside_its_frame() -> None:
    rng = random.Random(0)
    panels = {"a <b>": [rng.expovariate(1 / 30) for _ in range(500)], "one": [5.0], "none": [0.0, 0.0]}
    root = ElementTree.fromstring(draw("title & more", "sub", panels))
    space = "{http://www.w3.org/2000/svg}"
    texts = [node.text or "" for node in root.iter(f"{space}text")]
    assert {"a <b>", "one", "none", "title & more", "sub"} <= set(texts)
    curves = list(root.iter(f"{space}polyline"))
    assert len(curves) == 3
    for curve in curves:
        points = [tuple(map(float, point.split(","))) for point in curve.attrib["points"].split()]
        assert all(0 <= x <= 380 and 0 <= y <= 310 for x, y in points)
        assert points == sorted(points, key=lambda point: (point[0], -point[1]))  # it only rises


# ── the command line ────────────────────────────────────────────────────────────────────────────


def test_help_imports_next_to_nothing() -> None:
    program = """
import sys
from engine.cli import main
for argv in (["chat", "--help"], ["bench", "--help"], ["bench", "serve", "--help"], ["bench", "startup", "--help"]):
    try:
        main(argv)
    except SystemExit as end:
        assert end.code == 0
print(" ".join(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    heavy = {"torch", "aiohttp", "anyio", "rich", "numpy", "tokenizers"}
    assert not {name.split(".")[0] for name in done.stderr.split()} & heavy


def test_the_page_names_every_option() -> None:
    from engine.client import options as tool_options
    from engine.options.option import options_of

    page = (ROOT / "docs/bench.md").read_text()
    others = (tool_options.ChatOptions, tool_options.ExpertsOptions, tool_options.HeldOptions)
    for struct in vars(tool_options).values():
        if isinstance(struct, type) and struct.__name__.endswith("Options") and struct not in others:
            for option in options_of(struct):
                assert f"`{option.flag}" in page, option.flag
