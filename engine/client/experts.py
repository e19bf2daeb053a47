"""`engine experts`: a heat map of a server's experts in the terminal.

    layer   0                                            63   balance   busiest
        1   ░▒▒▓░ ░█▒▒ …                                         1.31   17 (6.2)

A cell is an expert, or several neighbours where the terminal is too narrow, and shows the busiest of them: how often it
was chosen over the mean of its layer. Left out: a server's ranks by host.
"""

import time
from collections.abc import Sequence
from typing import Any

import anyio
import msgspec
from msgspec import Struct
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from engine.client.client import Client
from engine.client.options import ExpertsOptions
from engine.config import Config
from engine.errors import counted
from engine.http.keys import own_key

SHADES = ((0.25, " ", "grey23"), (0.75, "░", "blue"), (1.5, "▒", "green"), (3.0, "▓", "yellow"), (1e300, "█", "red"))
BARS = "▁▂▃▄▅▆▇█"
BESIDE = 44  # columns of the terminal for what stands beside the map


class Window(Struct, frozen=True):
    """As the server tells it."""

    step: int
    choices: int
    balance: float
    drift: float


class Map(Struct, frozen=True):
    """As the server tells it, at /expert_distribution."""

    layers: tuple[int, ...]
    ranks: int
    counts: list[list[int]]
    loads: list[list[float]]
    balance: list[float]
    moved: int
    waiting: int
    windows: list[Window]


def show(options: ExpertsOptions, config: Config) -> int:
    """Print the map, once or until interrupted. Raises RequestError for a model without experts, ConfigError where no
    server answers."""
    console, key = Console(), own_key(config.server)
    found = anyio.run(fetch, options.url, key)
    if options.seconds is None:
        console.print(drawn(found, console.width))
        return 0
    with Live(drawn(found, console.width), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(options.seconds)
            live.update(drawn(anyio.run(fetch, options.url, key), console.width), refresh=True)


async def fetch(url: str, key: str | None) -> Map:
    """What the server at `url` says."""
    async with Client(url, api_key=key, model="any", timeout=60.0) as client:
        return msgspec.json.decode(await client.get("/expert_distribution"), type=Map)


def drawn(found: Map, width: int) -> Group:
    """The map, and the lines under it, for a terminal of so many columns."""
    experts = len(found.counts[0])
    together = -(-experts // max(8, width - BESIDE))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, justify in (("layer", "right"), (f"experts 0 to {experts - 1}", "left"), ("ranks", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("balance", justify="right")
    table.add_column("busiest", justify="right", no_wrap=True)
    for layer, counts, loads, balance in zip(found.layers, found.counts, found.loads, found.balance, strict=True):
        mean = sum(counts) / experts
        busiest = max(range(experts), key=counts.__getitem__)
        said = f"{busiest} ({counts[busiest] / mean:.1f})" if mean else "none"
        table.add_row(str(layer), heat(counts, together), bars(loads), f"{balance:.2f}", said)
    return Group(table, *(Text(line) for line in summary(found, together)))


def heat(counts: Sequence[int], together: int = 1) -> Text:
    """A cell for each expert, or for so many of them together."""
    text, mean = Text(), sum(counts) / len(counts)
    for first in range(0, len(counts), together):
        share = max(counts[first : first + together]) / mean if mean else 0.0
        _, shade, colour = next(each for each in SHADES if share <= each[0])
        text.append(shade, colour)
    return text


def bars(numbers: Sequence[float]) -> str:
    """A bar for each number, the largest of which is high."""
    most = max(numbers, default=0.0)
    return "".join(BARS[min(7, int(8 * number / most))] if most else BARS[0] for number in numbers)


def summary(found: Map, together: int) -> list[str]:
    """What stands under the map."""
    lines = [f"a cell is {counted(together, 'expert')}: blank up to ¼ of the mean, ░ ¾, ▒ 1½, ▓ 3, █ more"]
    if found.windows:
        last = found.windows[-1]
        past: list[Any] = [window.balance - 1 for window in found.windows[-60:]]
        lines.append(f"balance (largest load of a rank over the mean) {last.balance:.2f}, so far {bars(past)}")
        lines.append(f"drift since the window before {100 * last.drift:.1f}% of choices, at step {last.step}")
    if found.moved or found.waiting:
        lines.append(f"{counted(found.moved, 'layer')} rearranged, {found.waiting} to come")
    return lines
