"""`engine top`: what a server is doing, in the terminal: the figures of its page at /, twice a second.

    tokens/s 2845   steps/s 336   running 7 of 64   waiting 0   hits 33.9%   in use 34.9%
    steps    ▂▂▃▅▂▂▂█▂  0.35 ms, 7 rows, 7 tokens
    pages    ██████▒▒▒▒▒▒▒▒░░░░
    host     1204 of 4096 ▓▓▓▒▒▒▒▒░░░░░░░░
    tree     30 nodes, 1532 pages, 12 of them used by requests

Left out: texts, experts (`engine experts`), and what /metrics keeps for later.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import aclosing

import anyio
import msgspec
from msgspec import Struct
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from engine.client.client import Client
from engine.client.experts import bars
from engine.client.options import TopOptions
from engine.config import Config
from engine.errors import WorkerError, counted
from engine.http.keys import own_key
from engine.http.page.live import LiveEvent, LiveTier

NAMES = 10  # columns of the names of lines
PHASES = ("on their prompt", "decode", "end")
# Letters of maps, in the order of the bars that they become.
OWNERS = (
    ("r", "█", "blue"),
    ("s", "▓", "green"),
    ("a", "▓", "green"),
    ("k", "▓", "magenta"),
    ("i", "█", "yellow"),
    ("o", "█", "red"),
    ("c", "▒", "cyan"),
    (".", "░", "grey42"),
)


class Seen(Struct, frozen=True):
    """An event, and when it came, in seconds of this machine's clock."""

    event: LiveEvent
    at: float


def show(options: TopOptions, config: Config) -> int:
    """Print what the server is doing, once or until interrupted. Raises RequestError where it tells nobody here,
    WorkerError where it ends."""
    console, key = Console(), own_key(config.server)
    if options.once:
        anyio.run(_once, console, options.url, key)
        return 0
    with Live(console=console, auto_refresh=False) as live:
        anyio.run(_follow, live, console, options.url, key)
    return 0


async def _once(console: Console, url: str, key: str | None) -> None:
    async with Client(url, api_key=key, model="any") as client, aclosing(client.events("/live/events")) as events:
        async for data in events:
            console.print(drawn(read(data), None, console.width))
            return


async def _follow(live: Live, console: Console, url: str, key: str | None) -> None:
    before: Seen | None = None
    async with Client(url, api_key=key, model="any") as client:
        async for data in client.events("/live/events"):
            seen = read(data)
            live.update(drawn(seen, before, console.width), refresh=True)
            before = seen
    raise WorkerError(f"{url} has ended the stream; is it shutting down?")


def read(data: bytes) -> Seen:
    return Seen(msgspec.json.decode(data, type=LiveEvent), time.monotonic())


def drawn(seen: Seen, before: Seen | None, width: int) -> Group:
    """The screen, for a terminal of so many columns; rates are of the time since `before`."""
    event, room = seen.event, max(10, width - NAMES - 2)
    lines = [
        ("", Text("   ".join(figures(seen, before)))),
        ("steps", Text(strip(event, room))),
        ("batch", Text(batch(event))),
        ("queue", Text(f"{bars(event.queue[:room])} {counted(event.counts.get('waiting', 0), 'request')}".lstrip())),
        ("pages", pages(event, room)),
        *((each.tier, tier(each, room)) for each in event.tiers),
        ("tree", Text(tree(event))),
        ("channels", Text(", ".join(fill(each.actor, each.waiting, each.capacity) for each in event.channels))),
        ("needs", Text(", ".join(f"{each.count} {each.kind} {each.state}" for each in event.assets) or "none")),
    ]
    if event.copies:
        lines.append(("copies", Text(", ".join(f"{copy['running']} running" for copy in event.copies))))
    if event.status != "ready":
        lines.insert(0, (event.status, Text(event.cause, "red")))
    table = Table.grid(padding=(0, 1))
    table.add_column(width=NAMES, style="bold", no_wrap=True)
    table.add_column()
    for name, said in lines:
        table.add_row(name, said)
    return Group(table)


def figures(seen: Seen, before: Seen | None) -> list[str]:
    """The first line. Without an event before there are no rates."""
    counts = seen.event.counts
    prompt, total = counts.get("prompt_tokens_total", 0), counts.get("pages", 0)
    found = [f"running {counts.get('running', 0)}", f"waiting {counts.get('waiting', 0)}"]
    if before is not None:
        seconds = max(seen.at - before.at, 1e-3)
        rates = (("generated_tokens_total", "tokens/s"), ("steps", "steps/s"))
        found[:0] = [
            f"{unit} {(counts.get(name, 0) - before.event.counts.get(name, 0)) / seconds:.0f}" for name, unit in rates
        ]
    if prompt:
        hits = counts["cached_tokens_total"] / prompt
        most = max(hits, seen.event.ceiling)  # that is told once a second, and lags behind
        ceiling = f" of at most {100 * most:.1f}%" if seen.event.ceiling else ""
        found.append(f"hits {100 * hits:.1f}%{ceiling}")
    if total:
        found.append(f"in use {100 * (total - counts['pages_free'] - counts['pages_cached']) / total:.1f}%")
    return found


def strip(event: LiveEvent, room: int) -> str:
    """The seconds of the last steps, and the last one in words."""
    steps = event.steps
    if not steps.seconds:
        return "none while this is open"
    said = f"{1000 * steps.seconds[-1]:.2f} ms, {counted(steps.rows[-1], 'row')}, {counted(steps.tokens[-1], 'token')}"
    return f"{bars(steps.seconds[-max(8, room - len(said) - 2) :])}  {said}"


def batch(event: LiveEvent) -> str:
    rows = event.rows
    if not rows.slots:
        return "nothing runs"
    phases = ", ".join(f"{rows.phases.count(phase)} {name}" for phase, name in enumerate(PHASES))
    longest = max(map(sum, zip(rows.prompts, rows.replies, strict=True)))
    return f"{phases}; longest {counted(longest, 'token')}"


def pages(event: LiveEvent, room: int) -> Text:
    """A bar of all pages by owner; of who holds them nothing where they are too many."""
    if not event.pages.owners:
        return Text(f"{event.counts.get('pages_free', 0)} of {event.counts.get('pages', 0)} free")
    return bar(event.pages.owners, room)


def tier(found: LiveTier, room: int) -> Text:
    """What a tier holds, in words, and a bar of it by what becomes of the pages."""
    said = f"{found.used} of {found.pages} " if found.pages else f"{counted(found.used, 'page')} "
    return Text(said).append(bar(found.map.owners, room - len(said)))


def bar(owners: str, room: int) -> Text:
    """`owners`, in the order of `OWNERS`, so many columns wide."""
    text, counted_yet = Text(), 0
    for owner, shade, colour in OWNERS:
        counted_yet += owners.count(owner)
        text.append(shade * (round(room * counted_yet / max(1, len(owners))) - len(text)), colour)
    return text


def tree(event: LiveEvent) -> str:
    found, used = event.tree, pages_of(event.tree.pages, event.tree.locks)
    hidden = f", and {sum(found.hidden)} below that are not told" if any(found.hidden) else ""
    nodes = counted(len(found.pages), "node")
    return f"{nodes}, {counted(sum(found.pages), 'page')}, {used} of them used by requests{hidden}"


def pages_of(numbers: Iterable[int], locks: Sequence[int]) -> int:
    """The pages of nodes that are locked."""
    return sum(count for count, lock in zip(numbers, locks, strict=True) if lock)


def fill(actor: str, waiting: int, capacity: int) -> str:
    return f"{actor} {waiting}/{capacity}" if capacity else f"{actor} {waiting}"
