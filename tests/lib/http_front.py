"""A Front without an engine: it says what a test tells it to, and remembers what it was asked."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel

from engine.actors.tokenizer import Admission
from engine.config import Config, ServerOptions
from engine.conversation.parsers import Parsers
from engine.conversation.tools import as_written
from engine.http.app import serve
from engine.messages.control import Flushed, Stats, WorkerReady
from engine.messages.looking import ChannelLook, PagesLook, RowsLook, Snapshot, StepsLook, TreeLook
from engine.messages.reply import Chunk
from engine.messages.request import Generate
from engine.messages.sessions import KeptSession
from engine.messages.text import TextAnswer, TextJob
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins, resolve
from engine.runtime.board import Board
from engine.runtime.front import Health
from engine.runtime.mailbox import Mailbox
from engine.runtime.peers import Peers
from engine.text.jobs import perform
from engine.text.tokenizer import Text

READY = WorkerReady(100, 16, 8, 2048, 2048, 1000, 1024, "cpu", "torch", {"weights": 1.0})


def chunks(
    *texts: str, finish: Any = "stop", matched: Any = None, ids_of: Callable[[str], list[int]] | None = None
) -> list[Chunk]:
    """One chunk for each text, one token id each, counts as an engine would count; the last one finishes."""
    made = []
    for number, text in enumerate(texts, start=1):
        last = number == len(texts)
        made.append(
            Chunk(
                "engine-id", text, [number] if ids_of is None else ids_of(text),
                finish if last else None, matched if last else None, 7, 4, number,
            )
        )  # fmt: skip
    return made


def text_of(template: str | None, tool: str | None = None, reasoning: str | None = None) -> Text:
    """The echo model's text with another chat template, and with parsers by name."""
    plugins = Plugins.load()
    targets = [None if name is None else resolve(plugins.entries("parsers")[name].target) for name in (tool, reasoning)]
    spec = open_checkpoint(plugins, "echo").text()
    return Text(spec, template, Parsers(*targets))


def written(request: Generate) -> list[dict[str, Any]]:
    """The messages of `request` as a chat template takes them, with the arguments of calls as text."""
    return list(as_written(request.messages or (), text_arguments=True))


class Inline:
    """Does text jobs of any size at once."""

    def __init__(self, text: Text) -> None:
        self._admission = Admission(text)

    async def ask(self, job: TextJob) -> TextAnswer:
        return perform(self._admission, job)


class FakeFront:
    """Answers every request with `script`: chunks, or an exception to raise in their place."""

    def __init__(self, script: Sequence[Chunk | Exception] = (), *, hangs: bool = False, pause: float = 0.0) -> None:
        self.config = Config()
        self.text: Text | None = None
        self.media = None
        self.model_name = "fake"
        self.created = 1_700_000_000
        self.info: WorkerReady | None = READY
        self.most_open = 100
        self.peers = Peers()
        self.board = Board()
        self.stats = Stats("ready")
        self.on_stats: list[Callable[[Stats], None]] = []
        self.state = Health("ready")
        self.script = list(script or chunks("Hello", ", ", "world", finish=None if hangs else "stop"))
        self.hangs = hangs  # after its script, before the end
        self.pause = pause  # seconds before each item of it
        self.asked: list[Generate] = []
        self.began = anyio.Event()
        self.closed = anyio.Event()
        self.open: set[str] = set()
        self.aborted: list[str | None] = []
        self.ended: list[tuple[bytes, str, str]] = []  # programs
        self.draining = False
        self.looks = 0
        self._pumps: dict[Mailbox, asyncio.Task[None]] = {}

    @property
    def texts(self) -> "Inline | None":
        return None if self.text is None else Inline(self.text)

    def health(self) -> Health:
        return self.state

    def dead(self) -> str:
        return self.state.cause if self.state.status == "failed" else ""

    def begin(self, request: Generate) -> Mailbox:
        """As the front's; what `generate` yields comes into the mailbox."""
        reply = self.generate(request)
        box = Mailbox(request.rid, request.rid)
        self._pumps[box] = asyncio.get_running_loop().create_task(self._pump(box, reply))
        return box

    async def _pump(self, box: Mailbox, reply: AsyncGenerator[Chunk, None]) -> None:
        try:
            async with aclosing(reply):
                async for chunk in reply:
                    box.put(chunk)
                    await anyio.lowlevel.checkpoint()
                    while getattr(box.taker, "waits", False):  # its reader takes one chunk at a time
                        await anyio.sleep(0.001)
        except Exception as error:
            box.fail(error)

    def leave(self, box: Mailbox) -> None:
        self._pumps.pop(box).cancel()
        box.close()

    async def generate(self, request: Generate) -> AsyncGenerator[Chunk, None]:
        self.asked.append(request)
        self.open.add(request.rid)
        self.began.set()
        try:
            for item in self.script:
                if self.pause:
                    await anyio.sleep(self.pause)
                if isinstance(item, Exception):
                    raise item
                yield item
            if self.hangs:
                await anyio.sleep_forever()
        finally:
            self.open.discard(request.rid)
            self.closed.set()

    async def end_programs(self, owner: bytes, cache_salt: str, programs: Sequence[str]) -> None:
        self.ended += ((owner, cache_salt, id) for id in programs)

    def abort(self, rid: str | None) -> int:
        self.aborted.append(rid)
        return len(self.open) if rid is None else int(rid in self.open)

    def end(self) -> int:
        return len(self.open)

    async def sessions(self, owner: bytes, cache_salt: str) -> list[KeptSession]:
        return []

    async def end_session(self, owner: bytes, cache_salt: str, id: str) -> bool:
        return False

    async def look(self) -> Snapshot:
        """Nothing goes on, each time anew."""
        self.looks += 1
        rows, tree = RowsLook(*[b""] * 7), TreeLook(*[b""] * 5)
        steps, pages = StepsLook(0, b"", b"", b"", b""), PagesLook(1, "")
        return Snapshot(self.looks, 0.0, "ready", "", False, {}, (), rows, b"", steps, pages, tree, (), ())

    def channels(self) -> list[ChannelLook]:
        return []

    async def flush(self) -> Flushed:
        return Flushed(12, 3)


@asynccontextmanager
async def serving(front: FakeFront, **options: Any) -> AsyncIterator[str]:
    """The URL of a server over `front` on a free port, for the length of the context."""
    listening = anyio.Event()
    urls: list[str] = []

    def started(url: str) -> None:
        urls.append(url)
        listening.set()

    async def run() -> None:
        await serve(front, ServerOptions(port=0, **options), started=started)  # type: ignore[arg-type]

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        with anyio.fail_after(60):
            await listening.wait()
        yield urls[0]
        group.cancel_scope.cancel()
