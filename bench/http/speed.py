"""A server over HTTP beside the offline engine of the same commit, in turn, on one machine: what HTTP costs.

    python -m bench.http.speed bench/configs/qwen3-0.6b [--fronts 1,2,4,auto] [--rows completions-256,chat-256,...]
        [--turns 3] [--against DIR] [--url NAME=URL] [--option N=V ...] [--clients auto] [--json FILE]
    python -m bench.http.speed echo --option kv_tokens=65536 --rows completions-32,chat-32,one --reply 64  # on a CPU

A folder without a tokenizer gets a made-up one of real size (bench/lib/synthetic.py) and dummy weights. Server, load
generator and offline engine are processes of their own; server and offline engine have half of the device's memory
each, or what --option kv_tokens=N says. A row is an API and a number of streams that begin together, each of `--prompt`
tokens in and `--reply` out; `one` is one stream after another. A turn is the offline engine, then the server, or the
other way round; the first warms up. Each of `--fronts` is a server (the option is passed on where it is not 1).
`--against DIR` measures another checkout, with the Python of its .venv, and `--url` any server that runs already.
Linux alone.
"""

import argparse
import random
import signal
import statistics
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
from msgspec import Struct

from bench.http.gaps import Gaps, figures_of, gaps_of, median_of
from bench.http.offline import Job, Offline, Result, offline
from bench.lib import synthetic
from bench.lib.processes import children, cpu_seconds
from engine.client.bench.asking import Api, Target
from engine.client.bench.clients import Clients, clients_of, started, warnings
from engine.client.bench.load import Run
from engine.client.bench.process import free_port, running
from engine.client.bench.report import one_token_share
from engine.client.bench.spread import percentile
from engine.client.bench.traffic import WORDS, Conversation, Turn
from engine.client.client import Client

HERE = Path(__file__).parents[2]
APIS: dict[str, Api] = {"completions": "openai", "chat": "chat", "native": "native"}
USUAL = "completions-256,chat-256,completions-1024,chat-1024,one"
ONE = 16  # requests of the row `one`
LONG = 1.2  # medians between two tokens offline, from which a gap is long
# Of the device's memory: the server starts beside the offline engine, and --memory-fraction counts what others hold.
OFFLINE_FRACTION, SERVER_FRACTION = "0.42", "0.84"
# The shape of most templates: marks that are one token each around a role and a text.
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|MARK|>' + message.role + '\\n' + message.content + '<|END|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|MARK|>assistant\\n' }}{%- endif %}"
)


class Row(Struct, frozen=True):
    name: str
    api: Api
    streams: int
    requests: int

    @classmethod
    def of(cls, name: str) -> "Row":
        if name == "one":
            return cls(name, "openai", 1, ONE)
        api, _, count = name.rpartition("-")
        if api not in APIS or not count.isdigit():
            raise SystemExit(f"--rows names {name!r}, but takes one, or {'|'.join(APIS)} with a number: chat-256")
        return cls(name, APIS[api], int(count), int(count))


class Server(Struct, frozen=True):
    """A server to measure. `pid` is 0 for one that ran already."""

    name: str
    url: str
    model: str
    pid: int


class Turns(Struct):
    """What one row of one server came to, a value a turn."""

    server: str
    row: str
    rate: list[float] = []  # output tokens a second
    offline_rate: list[float] = []
    first: list[tuple[float, float]] = []  # TTFT, ms: median and 99th percentile
    offline_first: list[tuple[float, float]] = []
    between: list[Gaps] = []  # two events of a request
    offline_between: list[Gaps] = []  # two tokens of one
    each: list[float] = []  # ms a token
    offline_each: list[float] = []
    one_token: list[float] = []
    client_cpu: list[float] = []
    client_late: list[float] = []
    cpu: list[dict[str, float]] = []  # microseconds of CPU time an event, by process
    warnings: list[str] = []


# ── what is asked ────────────────────────────────────────────────────────────────────────────


class Prompts:
    """Makes prompts of a number of tokens, by what a server counts for prompts of so many words."""

    def __init__(self, words: Sequence[str], tokens: int) -> None:
        self._words = words
        self._tokens = tokens
        self._counts: dict[Api, int] = {}

    def make(self, count: int, rng: random.Random) -> str:
        return "".join(rng.choices(self._words, k=count))

    async def fit(self, clients: Clients, target: Target) -> None:
        """Find out how many words make the tokens that are asked for, once for each API."""
        if target.api in self._counts:
            return
        counted = []
        for count in (32, 64):
            run, _ = await clients.play(target, [(Turn(self.make(count, random.Random(count)), 1),)] * 2, concurrency=1)
            counted.append(_answered(run).records[0].input_tokens)
        each = max((counted[1] - counted[0]) / 32, 1e-9)
        self._counts[target.api] = max(1, 64 + round((self._tokens - counted[1]) / each))

    def conversations(self, api: Api, requests: int, reply: int, seed: int) -> list[Conversation]:
        rng = random.Random(seed)
        return [(Turn(self.make(self._counts[api], rng), reply),) for _ in range(requests)]


def _answered(run: Run) -> Run:
    if failed := [record.error for record in run.records if record.error]:
        raise SystemExit(f"{len(failed)} of {run.asked} requests failed, the first: {failed[0]}")
    return run


# ── one measurement ──────────────────────────────────────────────────────────────────────────


async def over_http(
    server: Server, row: Row, prompts: Prompts, clients: Clients, given: Any, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """One run: its figures by the names of Turns, but `between` is all gaps."""
    target = Target(server.url, server.model, row.api, given.api_key, extra_of(row.api, given.temperature))
    asked = prompts.conversations(row.api, row.requests, given.reply, seed)
    before = cpu_of(server.pid)
    run, loads = await clients.play(target, asked, concurrency=row.streams)
    after = cpu_of(server.pid)
    records = _answered(run).records
    tokens = sum(record.output_tokens for record in records)
    events = sum(len(record.pieces) for record in records)
    assert tokens == row.requests * given.reply, f"{tokens} tokens came, not {row.requests * given.reply}"
    return {
        "rate": tokens / run.seconds,
        "first": ends([record.first * 1e3 for record in records]),
        "between": gaps_of(records),
        "each": statistics.median([(record.per_token or 0.0) * 1e3 for record in records]),
        "one_token": one_token_share(records),
        "client_cpu": max(load.cpu for load in loads),
        "client_late": max(load.late_p99 for load in loads) * 1e3,
        "cpu": {name: (after[name] - before.get(name, 0.0)) / events * 1e6 for name in after},
    }, warnings(loads)


def from_offline(result: Result, row: Row, reply: int) -> dict[str, Any]:
    """The same of the offline engine."""
    replies = result.replies
    each = [(one.pieces[-1] - one.pieces[0]) / max(1, reply - 1) for one in replies]
    return {
        "offline_rate": row.requests * reply / result.seconds,
        "offline_first": ends([(one.pieces[0] - one.sent) * 1e3 for one in replies]),
        "offline_between": gaps_of(replies),
        "offline_each": statistics.median(each) * 1e3,
    }


def extra_of(api: Api, temperature: float) -> dict[str, Any]:
    return {} if api == "native" else {"temperature": temperature}


def cpu_of(pid: int) -> dict[str, float]:
    """CPU seconds of a server's processes so far, by module and number."""
    if not pid:
        return {}
    found = {"main": cpu_seconds(pid)}
    for number, (child, module) in enumerate(sorted(children(pid).items())):
        found[f"{module.removeprefix('engine.')} {number}"] = cpu_seconds(child)
    return found


def ends(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return percentile(ordered, 0.5), percentile(ordered, 0.99)


# ── who takes part ───────────────────────────────────────────────────────────────────────────


@contextmanager
def prepared(model: str, most: int) -> Iterator[tuple[dict[str, str], Sequence[str]]]:
    """The options of the engine for `model` and up to `most` streams, and the words of its prompts."""
    options = {"model": model, "max_running": str(most)}
    folder = Path(model)
    if not (folder / "config.json").exists() or (folder / "tokenizer.json").exists():
        yield options, WORDS_AS_TOKENS
        return
    with synthetic.with_tokenizer(folder, whole_words=True) as made:
        size = msgspec.json.decode((made / "config.json").read_bytes())["vocab_size"]
        template = TEMPLATE.replace("MARK", str(size - 2)).replace("END", str(size - 3))
        (made / "chat.jinja").write_text(template)
        options |= {"model": str(made), "load": "dummy", "chat_template": str(made / "chat.jinja")}
        yield options, synthetic.words(size)[:20_000]


WORDS_AS_TOKENS = tuple(f" {word}" for word in WORDS)


@asynccontextmanager
async def serving(name: str, options: dict[str, str], folder: Path = HERE) -> AsyncIterator[Server]:
    """A server of ours, from the checkout `folder`, until the block ends. An option of no value is a bare flag."""
    python = sys.executable if folder == HERE else str(folder / ".venv/bin/python")
    port = free_port()
    flags = [f"--{key.replace('_', '-')}" + (f"={value}" if value else "") for key, value in options.items()]
    command = [python, "-m", "engine.cli", "serve", "--port", str(port), "--log-level", "warning", *flags]
    async with running(command, port, folder=folder) as found, Client(found.url) as client:
        yield Server(name, found.url, client.model_name, found.pid)


class Bench:
    """Measures servers beside one offline engine."""

    def __init__(self, given: Any, rows: list[Row], beside: Offline, words: Sequence[str]) -> None:
        self.given = given
        self.rows = rows
        self.beside = beside
        self.words = words
        self.found: list[Turns] = []

    async def measure(self, server: Server) -> None:
        """All rows of `server`; each is printed when it is known."""
        given = self.given
        prompts = Prompts(self.words, given.prompt)
        async with AsyncExitStack() as stack:
            clients: dict[int, Clients] = {}
            for row in self.rows:
                count = clients_of(given.clients, row.streams)
                if count not in clients:
                    clients[count] = await stack.enter_async_context(started(count))
                await prompts.fit(clients[count], Target(server.url, server.model, row.api, given.api_key))
                self.found.append(turns := Turns(server.name, row.name))
                for turn in range(given.turns + 1):
                    await self._turn(turn, server, row, prompts, clients[count], turns)
                print(line(turns, server), flush=True)

    async def _offline(self, job: Job) -> Result:
        return await anyio.to_thread.run_sync(self.beside.measure, job, abandon_on_cancel=True)

    async def _turn(self, turn: int, server: Server, row: Row, prompts: Prompts, clients: Clients, into: Turns) -> None:
        given, seed = self.given, random.Random(f"{server.name} {row.name} {turn}").getrandbits(31)
        job = Job(row.requests, row.streams, given.prompt, given.reply, given.temperature, seed)
        figures: dict[str, Any] = {}
        for beside in (True, False) if turn % 2 else (False, True):
            if beside:
                figures |= from_offline(await self._offline(job), row, given.reply)
            else:
                http, said = await over_http(server, row, prompts, clients, given, seed)
                figures |= http
        limit = LONG * median_of(figures["offline_between"])
        for name in ("between", "offline_between"):
            figures[name] = figures_of(figures[name], limit)
        if turn:  # the first warms up
            for name, value in figures.items():
                getattr(into, name).append(value)
            into.warnings += said


# ── what is printed ──────────────────────────────────────────────────────────────────────────

HEAD = (
    f"{'server':12} {'row':16} {'tok/s':>8} {'offline':>8} {'ratio (min - max)':>21} {'ms/token':>9}"
    f" {'TTFT ms p50 (more)':>19} {'p99 (more)':>14} {'ITL p99/step':>12} {'steady':>12}"
    f" {'one-token':>9} {'client':>6} {'us/event':>8}"
)


def line(turns: Turns, server: Server | None = None) -> str:
    """A row of the table. `ms/token` is HTTP's over offline's; `more` is beyond offline's; the 99th percentile between
    tokens is over offline's median, of all gaps and of those while nobody comes or goes, with offline's own beside it;
    `client` is the busiest client's share of a core; `us/event` the CPU time of all fronts."""
    middle = statistics.median
    ratios = [ours / theirs for ours, theirs in zip(turns.rate, turns.offline_rate, strict=True)]
    each = middle(ours / max(theirs, 1e-9) for ours, theirs in zip(turns.each, turns.offline_each, strict=True))
    first = [middle(value[index] for value in turns.first) for index in (0, 1)]
    more = [
        middle(ours[index] - theirs[index] for ours, theirs in zip(turns.first, turns.offline_first, strict=True))
        for index in (0, 1)
    ]
    ratio = f"{middle(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})"
    front = middle(sum(value for name, value in cpu.items() if _serves(name, cpu)) for cpu in turns.cpu)
    return (
        f"{turns.server:12} {turns.row:16} {middle(turns.rate):8.0f} {middle(turns.offline_rate):8.0f} {ratio:>21}"
        f" {each:9.3f} {f'{first[0]:.1f} ({more[0]:+.1f})':>19} {f'{first[1]:.1f} ({more[1]:+.1f})':>14}"
        f" {over_step(turns, lambda gaps: gaps.p99):>12} {over_step(turns, lambda gaps: gaps.steady):>12}"
        f" {min(turns.one_token):9.1%} {max(turns.client_cpu):6.0%} {front:8.1f}"
    )


def over_step(turns: Turns, figure: Callable[[Gaps], float]) -> str:
    """A figure of the gaps over offline's median gap, and (offline's own)."""
    steps = [max(each.p50, 1e-9) for each in turns.offline_between]
    ours, theirs = (
        statistics.median(figure(each) / step for each, step in zip(found, steps, strict=True))
        for found in (turns.between, turns.offline_between)
    )
    return f"{ours:.2f} ({theirs:.2f})"


def _serves(name: str, cpu: dict[str, float]) -> bool:
    """Whether the process of that name serves HTTP."""
    several = [other for other in cpu if "front" in other]
    return name in several if several else name == "main"


async def run(given: Any) -> list[Turns]:
    rows = [Row.of(name) for name in given.rows.split(",")]
    most = max(row.streams for row in rows)
    with prepared(given.model, most) as (options, words):
        options |= dict(option.split("=", 1) for option in given.option)
        beside_options = dict(options)
        if not {"kv_tokens", "memory_fraction"} & set(options):
            beside_options["memory_fraction"], options["memory_fraction"] = OFFLINE_FRACTION, SERVER_FRACTION
        with offline(beside_options) as beside:
            bench = Bench(given, rows, beside, words)
            print(HEAD, flush=True)
            for fronts_ in given.fronts.split(","):
                more = {} if fronts_ == "1" else {"fronts": fronts_}
                async with serving(f"ours, {fronts_}", options | more) as server:
                    await bench.measure(server)
            if given.against:
                async with serving("theirs", options, given.against.resolve()) as server:
                    await bench.measure(server)
            for text in given.url:
                name, _, url = text.rpartition("=")
                async with Client(url, api_key=given.api_key) as client:
                    server = Server(name or url, client.url, client.model_name, 0)
                await bench.measure(server)
    return bench.found


async def until_ended(measure: Any, given: Any) -> Any:
    """What `measure` finds. At SIGTERM and SIGINT all processes that it started end, and then this one."""

    async def watch(scope: anyio.CancelScope) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch, group.cancel_scope)
        found = await measure(given)
        group.cancel_scope.cancel()
        return found
    raise SystemExit("it was told to end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a config.json, or what --model takes")
    parser.add_argument("--rows", default=USUAL, help=f"default: {USUAL}")
    parser.add_argument("--fronts", default="1", help="numbers of front processes, and auto")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in")
    parser.add_argument("--reply", type=int, default=256, help="tokens out")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--clients", default="auto", help="client processes of a load")
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="a server that runs")
    parser.add_argument("--api-key")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the engine")
    parser.add_argument("--json", type=Path, help="write the figures of all turns there too")
    given = parser.parse_args()
    found = anyio.run(until_ended, run, given, backend_options={"use_uvloop": True})
    print(f"\n{given.prompt} tokens in, {given.reply} out, {given.turns} turns; medians\n{HEAD}")
    print(*map(line, found), sep="\n")
    for warning in dict.fromkeys(warning for turns in found for warning in turns.warnings):
        print(f"warning: {warning}")
    if given.json:
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)))


if __name__ == "__main__":
    main()
