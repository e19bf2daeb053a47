"""From records to figures: distributions and totals, as a table for people and as JSON for programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from engine.client.bench.clients import ClientLoad, warnings
from engine.client.bench.load import Record, Run
from engine.client.bench.plot import draw
from engine.client.bench.spread import Spread, spread
from engine.client.options import ReportOptions
from engine.errors import ConfigError, counted

LABELS = {
    "ttft": "time to first token (TTFT)",
    "itl": "inter-token latency (ITL)",
    "tpot": "time per output token (TPOT)",
    "e2e": "end to end (E2E)",
    "batch": "whole batch",
    "ready": "process start to ready",
    "first_token": "process start to first token",
}


class Report(Struct, frozen=True):
    """The result of a measurement. `milliseconds` is by the keys of LABELS; `clients` has the client processes."""

    command: str
    settings: dict[str, Any]
    totals: dict[str, float]
    milliseconds: dict[str, Spread]
    requests: list[dict[str, Any]]
    errors: dict[str, int]
    clients: Sequence[ClientLoad] = ()


Samples = Mapping[str, Sequence[float]]


def samples_of(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Every latency of the answered requests of `runs`, in milliseconds."""
    records = [record for run in runs for record in run.answered]
    found = {
        "ttft": [record.first for record in records],
        "itl": [gap for record in records for gap in record.gaps],
        "tpot": [each for record in records if (each := record.per_token) is not None],
        "e2e": [record.whole for record in records],
    }
    return {name: [value * 1e3 for value in values] for name, values in found.items()}


def totals_of(runs: Sequence[Run]) -> dict[str, float]:
    """Counts and rates of `runs`, one after another."""
    records = [record for run in runs for record in run.answered]
    seconds = sum(run.seconds for run in runs)
    read, said = (sum(getattr(record, name) for record in records) for name in ("input_tokens", "output_tokens"))
    pieces = sum(len(record.pieces) for record in records)
    return {
        "seconds": seconds,
        "answered": len(records),
        "failed": sum(run.asked for run in runs) - len(records),
        "input_tokens": read,
        "cached_tokens": sum(record.cached_tokens for record in records),
        "output_tokens": said,
        "requests_per_second": len(records) / seconds,
        "output_tokens_per_second": said / seconds,
        "tokens_per_second": (read + said) / seconds,
        "events": pieces,
        "events_per_second": pieces / seconds,
        "one_token_share": one_token_share(records),
    }


def one_token_share(records: Sequence[Record]) -> float:
    """The least share of the events with a text that can have held one token each: of n tokens in m events, at most
    n - m events held more. A token without a text of its own counts as one that came with another."""
    pieces = sum(len(record.pieces) for record in records)
    least = sum(max(0, 2 * len(record.pieces) - record.output_tokens) for record in records)
    return least / pieces if pieces else 0.0


def report_of(
    command: str,
    settings: dict[str, Any],
    runs: Sequence[Run],
    samples: Samples,
    clients: Sequence[ClientLoad] = (),
) -> Report:
    """The report of `runs`; `samples` are by the keys of LABELS, in milliseconds."""
    requests = []
    errors: dict[str, int] = {}
    for record in (record for run in runs for record in run.records):
        row: dict[str, Any] = {"sent": record.sent, "ended": record.ended}
        if record.error is None:
            row |= {"first": record.first, "input_tokens": record.input_tokens, "output_tokens": record.output_tokens}
        else:
            row["error"] = record.error
            errors[record.error] = errors.get(record.error, 0) + 1
        requests.append(row)
    spreads = {name: spread(values) for name, values in samples.items() if values}
    return Report(command, settings, totals_of(runs) if runs else {}, spreads, requests, errors, clients)


def publish(report: Report, samples: Samples, options: ReportOptions) -> int:
    """Print the report, write the files that were asked for; the exit code: 1 if anything failed."""
    console = Console(highlight=False, width=None if Console().is_terminal else 100)
    console.print(f"\n[bold]{headline(report)}[/bold]")
    for line in total_lines(report.totals) + client_lines(report):
        console.print(f"  {line}")
    console.print(table(report.milliseconds))
    for warning in warnings(report.clients):
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    for error, count in report.errors.items():
        console.print(f"failed {counted(count, 'time')}: {error}", style="red", markup=False)
    if options.json:
        _write(options.json, msgspec.json.format(msgspec.json.encode(report)))
    if options.plot:
        panels = {LABELS[name]: values for name, values in samples.items() if values}
        _write(options.plot, draw(headline(report), " · ".join(total_lines(report.totals)[:2]), panels).encode())
    return 1 if report.errors else 0


def headline(report: Report) -> str:
    """The measurement in a line: its command and what it was told."""
    return f"{report.command}: " + ", ".join(f"{name} {value}" for name, value in report.settings.items())


def total_lines(totals: Mapping[str, float]) -> list[str]:
    """The totals in sentences."""
    if not totals:
        return []
    read = f"{counted(round(totals['input_tokens']), 'token')} in ({totals['cached_tokens']:.0f} of them cached)"
    return [
        f"{counted(round(totals['answered']), 'request')} in {totals['seconds']:.2f} s, {totals['failed']:.0f} failed",
        f"{totals['requests_per_second']:.2f} requests/s, {totals['output_tokens_per_second']:.1f} output tokens/s, "
        f"{totals['tokens_per_second']:.1f} tokens/s in and out",
        f"{read if totals['input_tokens'] else 'input tokens not reported'}, {totals['output_tokens']:.0f} out",
    ]


def client_lines(report: Report) -> list[str]:
    """The events of a server in sentences, and how the clients fared."""
    if not (loads := report.clients):
        return []
    totals = report.totals
    what = "1 client process" if len(loads) == 1 else f"{len(loads)} client processes, the busiest"
    return [
        f"{totals['events_per_second']:.0f} events/s, at least {totals['one_token_share']:.1%} of them with one token",
        f"{what}: {max(load.cpu for load in loads):.0%} of a core, "
        f"woke at most {max(load.late_most for load in loads) * 1e3:.1f} ms too late",
    ]


def table(milliseconds: Mapping[str, Spread]) -> Table:
    made = Table("milliseconds", box=None, header_style="bold", padding=(0, 2))
    for column in ("mean", "p50", "p90", "p99"):
        made.add_column(column, justify="right")
    for name, row in milliseconds.items():
        made.add_row(LABELS[name], *(f"{value:,.1f}" for value in (row.mean, row.p50, row.p90, row.p99)))
    return made


def _write(path: str, content: bytes) -> None:
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path} ({error.strerror}); give the path of a file in a folder that is there"
        ) from None
