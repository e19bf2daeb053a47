"""The four measurements: a server under load, the offline engine's throughput and latency, and its start.

Every reply has exactly the requested length: greedy, past the model's own end tokens.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from typing import Any

import anyio
import msgspec
from msgspec import Struct
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from engine.client.bench.asking import Asker, Target
from engine.client.bench.clients import clients_of, started
from engine.client.bench.load import Ask, Run, of_chunks, play
from engine.client.bench.process import free_port, running, serve_command, serve_environment
from engine.client.bench.report import Report, Samples, publish, report_of, samples_of
from engine.client.bench.traffic import Conversation, conversations
from engine.client.client import Client
from engine.client.options import BatchOptions, LengthOptions, LoadOptions, RepeatOptions, ReportOptions, TrafficOptions
from engine.config import Config
from engine.errors import ConfigError, WorkerError
from engine.http.keys import own_key
from engine.params.sampling import SamplingParams
from engine.runtime.offline import AsyncEngine

CONCURRENCY = 8
Result = tuple[Report, Samples]


def serve(config: Config, model: str | None, traffic: TrafficOptions, load: LoadOptions, options: ReportOptions) -> int:
    """Measure the server at `load.url` (which is asked for `model`, if one is named), or one that `config` starts."""
    return publish(*_run(measure_server, config, model, traffic, load), options)


def throughput(config: Config, traffic: TrafficOptions, options: ReportOptions) -> int:
    """Measure the offline engine with all conversations at once."""
    return publish(*_run(measure_throughput, config, traffic), options)


def latency(config: Config, lengths: LengthOptions, batches: BatchOptions, options: ReportOptions) -> int:
    """Measure the offline engine with one batch after another."""
    return publish(*_run(measure_latency, config, lengths, batches), options)


def startup(config: Config, repetition: RepeatOptions, options: ReportOptions) -> int:
    """Measure fresh processes of `engine serve`."""
    return publish(*_run(measure_startup, config, repetition), options)


def _run(measure: Callable[..., Any], *arguments: Any) -> Result:
    result: Result = anyio.run(measure, *arguments, backend_options={"use_uvloop": True})
    return result


# ── what is measured ─────────────────────────────────────────────────────────────────────────


async def measure_server(config: Config, model: str | None, traffic: TrafficOptions, load: LoadOptions) -> Result:
    if load.concurrency is not None and load.rate is not None:
        raise ConfigError(f"--concurrency is {load.concurrency} and --rate is {load.rate}; give one of them")
    concurrency = None if load.rate is not None else load.concurrency or CONCURRENCY
    count = clients_of(load.clients, concurrency)
    asked = conversations(traffic)
    async with _server(config, model, load) as target, started(count) as clients:
        with closing(Asker(target)) as ask:
            _all_answered(await play(_warm_up(traffic, load.warmup), ask, concurrency=1))
        with progress("requests", traffic.requests) as advance:
            run, loads = await clients.play(
                target, asked, concurrency=concurrency, rate=load.rate, seed=traffic.seed, on_replies=advance
            )
    pressure = {"concurrency": concurrency} if concurrency else {"rate": f"{load.rate:g}/s"}
    settings = {"model": target.model, "api": load.api, **_settings(traffic), **pressure, "clients": count}
    samples = samples_of([run])
    return report_of("serve", settings, [run], samples, loads), samples


async def measure_throughput(config: Config, traffic: TrafficOptions) -> Result:
    asked = conversations(traffic)
    async with AsyncEngine(config) as engine:
        ask = offline_asker(engine)
        _all_answered(await play(_warm_up(traffic, 1), ask))
        with progress("requests", traffic.requests) as advance:
            run = await play(asked, ask, on_reply=advance)
        settings = {"model": engine.front.model_name, **_settings(traffic)}
    samples = samples_of([run])
    return report_of("throughput", settings, [run], samples), samples


async def measure_latency(config: Config, lengths: LengthOptions, batches: BatchOptions) -> Result:
    given = {name: getattr(lengths, name) for name in lengths.__struct_fields__}
    asked = conversations(TrafficOptions(**given, requests=batches.batch * (batches.repeat + 1)))
    runs = []
    async with AsyncEngine(config) as engine:
        ask = offline_asker(engine)
        with progress("batches", batches.repeat) as advance:
            for start in range(0, len(asked), batches.batch):
                runs.append(_all_answered(await play(asked[start : start + batches.batch], ask)))
                advance()
        settings = {"model": engine.front.model_name, **given, "batch": batches.batch, "repeat": batches.repeat}
    del runs[0]  # warms up
    samples = {"batch": [run.seconds * 1e3 for run in runs], **samples_of(runs)}
    return report_of("latency", settings, runs, samples), samples


async def measure_startup(config: Config, repetition: RepeatOptions) -> Result:
    shortest = _warm_up(LengthOptions(input_len=8, output_len=1), 1)
    ready, first = [], []
    with progress("starts", repetition.repeat) as advance:
        for _ in range(repetition.repeat):
            port = free_port()
            async with (
                running(serve_command(config, port), port, environment=serve_environment(config)) as server,
                Client(server.url, api_key=own_key(config.server)) as client,
            ):
                model = client.model_name
                with closing(Asker(Target(server.url, model, api_key=own_key(config.server)))) as ask:
                    run = _all_answered(await play(shortest, ask))
            ready.append((server.ready - server.began) * 1e3)
            first.append(ready[-1] + run.records[0].first * 1e3)
            advance()
    samples = {"ready": ready, "first_token": first}
    return report_of("startup", {"model": model, "repeat": repetition.repeat}, [], samples), samples


# ── how it is asked ──────────────────────────────────────────────────────────────────────────


def offline_asker(engine: AsyncEngine) -> Ask:
    """Asks an engine in this process."""
    return of_chunks(
        lambda prompt, length: engine.stream(prompt, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True))
    )


def extra_body(text: str | None) -> dict[str, Any]:
    """--extra-body, decoded."""
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"--extra-body is {text!r}, but takes a JSON object ({error})") from None


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on standard error, if that is a terminal; call the function that it gives for each one done, or with how
    many were."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count=1: bar.advance(task, count)


@asynccontextmanager
async def _server(config: Config, model: str | None, load: LoadOptions) -> AsyncIterator[Target]:
    key = own_key(config.server)
    extra = extra_body(load.extra_body)

    async def target(url: str) -> Target:
        async with Client(url, api_key=key, model=model, timeout=load.timeout) as client:
            return Target(client.url, client.model_name, load.api, key, extra, load.timeout)

    if load.url is not None:
        yield await target(load.url)
        return
    port = free_port()
    async with running(serve_command(config, port), port, environment=serve_environment(config)) as server:
        yield await target(server.url)


def _warm_up(lengths: LengthOptions, count: int) -> list[Conversation]:
    """`count` requests of that size, with prompts that no measured one begins with."""
    warm = TrafficOptions(input_len=lengths.input_len, output_len=lengths.output_len, seed=lengths.seed - 10**9)
    return conversations(msgspec.structs.replace(warm, requests=max(count, 1)))[:count]


def _all_answered(run: Run) -> Run:
    """Raises WorkerError for the first failure of a run that must not have one."""
    for record in run.records:
        if record.error is not None:
            raise WorkerError(f"a request failed, so nothing was measured: {record.error}")
    return run


def _settings(traffic: Struct) -> dict[str, Any]:
    """The options of `traffic` that are not at their default, and those that always matter."""
    always = ("traffic", "requests", "input_len", "output_len")
    default = type(traffic)()
    names = [
        name for name in traffic.__struct_fields__ if name in always or getattr(traffic, name) != getattr(default, name)
    ]
    return {name: getattr(traffic, name) for name in names}
