"""`engine chat`: a conversation in the terminal, with the model in this process or with any OpenAI-compatible server.

The main thread reads lines and writes the reply; an event loop in another thread makes it. Ctrl-C therefore ends
the reply alone: it cancels the stream, which aborts the request. Input that is no terminal is read line by line, so
that a chat can be scripted. Left out: several lines in one message, tools.
"""

import os
import queue
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import anyio.from_thread
import msgspec
from anyio.from_thread import BlockingPortal
from msgspec import Struct
from rich.console import Console
from rich.table import Column, Table

from engine.client.client import Client, changed, settings_of
from engine.client.options import ChatOptions, sampling_options
from engine.client.pictures import part_of
from engine.config import Config
from engine.errors import ConfigError, EngineError, RequestError, counted, did_you_mean
from engine.http.keys import own_key
from engine.messages.reply import Chunk
from engine.params.sampling import SamplingParams, check_sampling
from engine.runtime.offline import AsyncEngine

PROMPT = "\001\x1b[1;36m\002> \001\x1b[0m\002"  # the marks tell readline what takes no room on the line
HISTORY_LINES = 1000
MAX_TOKENS = 1024  # of a reply, unless a limit is set: a small model may go on until its context is full
VALUE_WIDTH = 20  # characters of a setting that /set shows
# A reply must not move the cursor or set the terminal's title: of the control characters only \t and \n are shown.
CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10})


class Source(Protocol):
    """Who answers."""

    @property
    def model_name(self) -> str: ...

    def chat(self, messages: list[dict[str, Any]], params: SamplingParams) -> AsyncGenerator[Chunk, None]: ...


class Embedded:
    """The engine in this process as a Source; use it as an async context manager."""

    def __init__(self, config: Config) -> None:
        self._engine = AsyncEngine(config)

    async def __aenter__(self) -> Self:
        await self._engine.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._engine.__aexit__(kind, error, trace)

    @property
    def model_name(self) -> str:
        return self._engine.front.model_name

    def chat(self, messages: list[dict[str, Any]], params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        return self._engine.stream(messages, params)


def chat(config: Config, model: str | None, options: ChatOptions, params: SamplingParams) -> int:
    """Chat until the user leaves; the exit code. `model` is what a server is asked for, if one is named."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    interactive = sys.stdin.isatty() and console.is_terminal
    shown = [part_of(where) for where in options.image]
    with anyio.from_thread.start_blocking_portal("asyncio", {"use_uvloop": True}) as portal:
        with Console(stderr=True).status("loading the model" if options.url is None else "connecting"):
            context = portal.wrap_async_context_manager(_source(config, model, options.url))
            source = context.__enter__()
        try:
            conversation = Conversation(portal, source, console, params, options.system)
            conversation.shown = shown
            if not interactive:
                return conversation.script(sys.stdin)
            with _line_editing(conversation.completions):
                return conversation.talk(lambda: input(PROMPT))
        finally:
            context.__exit__(None, None, None)


def _source(config: Config, model: str | None, url: str | None) -> AbstractAsyncContextManager[Source]:
    if url is None:
        return Embedded(config)
    return Client(url, api_key=own_key(config.server), model=model)


class Saved(Struct, forbid_unknown_fields=True):
    """What /save writes and /load reads."""

    messages: list[dict[str, Any]]
    system: str | None = None
    settings: dict[str, Any] = {}


class Exchange(Struct, frozen=True):
    """What /stats says about one reply."""

    last: Chunk
    first_seconds: float
    seconds: float

    def __str__(self) -> str:
        said = self.last.completion_tokens
        rate = (said - 1) / (self.seconds - self.first_seconds) if said > 1 and self.seconds > self.first_seconds else 0
        return (
            f"{counted(self.last.prompt_tokens, 'token')} in ({self.last.cached_tokens} cached), {said} out; "
            f"first after {self.first_seconds * 1e3:.0f} ms, then {rate:.1f} tokens/s; ended by {self.last.finish}"
        )


class Conversation:
    """The messages so far, and what the user can do about them."""

    def __init__(
        self, portal: BlockingPortal, source: Source, console: Console, params: SamplingParams, system: str | None
    ) -> None:
        self.messages: list[dict[str, Any]] = []
        self.shown: list[dict[str, Any]] = []  # images that the next message shows
        self.params = params
        self.system = system
        self.exchanges: list[Exchange] = []
        self._portal = portal
        self._source = source
        self._console = console
        self._failed = False
        self._left = False
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/help": ("", "this list", self._help),
            "/reset": ("", "forget the conversation; the system prompt and the settings stay", self._reset),
            "/system": ("TEXT", "set the system prompt; `off` removes it, without TEXT it is shown", self._system),
            "/image": ("FILE", "show an image or a video with the next message, a file or a URL", self._image),
            "/set": ("NAME VALUE", "set a sampling parameter; `default` resets it, alone it lists them", self._set),
            "/stats": ("", "tokens, time to the first token and speed of the last reply", self._stats),
            "/save": ("FILE", "write the conversation to FILE, as JSON", self._save),
            "/load": ("FILE", "take up the conversation in FILE", self._load),
            "/exit": ("", "leave (or Ctrl-D); Ctrl-C stops a reply", self._exit),
        }

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    def talk(self, read: Callable[[], str]) -> int:
        """Take lines from a person until the end of input or /exit."""
        limit = self.params.max_tokens or MAX_TOKENS
        self._note(f"{self._source.model_name}; replies of at most {limit} tokens; /help lists the commands")
        while not self._left:
            try:
                line = read()
            except EOFError:
                self._console.print()
                break
            except KeyboardInterrupt:
                self._note("\nCtrl-D or /exit leaves")
                continue
            self.take(line)
        return 0

    def script(self, lines: Iterator[str]) -> int:
        """Take lines of a file or pipe; 1 if one of them failed."""
        for line in lines:
            self.take(line)
            if self._left:
                break
        return int(self._failed)

    def take(self, line: str) -> None:
        """One line: a command, or a message; `//` begins a message that begins with a slash."""
        line = line.strip()
        try:
            if line.startswith("/") and not line.startswith("//"):
                name, _, rest = line.partition(" ")
                if name not in self._commands:
                    raise ConfigError(
                        f"there is no command {name}; /help lists them{did_you_mean(name, self._commands)}"
                    )
                self._commands[name][2](rest.strip())
            elif line:
                self._say(line[1:] if line.startswith("//") else line)
        except EngineError as error:
            self._failed = True
            Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"error: {error}", style="red")

    # ── talking ──────────────────────────────────────────────────────────────────────────────

    def _say(self, text: str) -> None:
        """Send a message and show the reply as it comes. A message without a reply is not kept."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        shown, self.shown = self.shown, []
        message = {"role": "user", "content": [*shown, {"type": "text", "text": text}] if shown else text}
        reply = ""
        began = time.perf_counter()
        first = 0.0
        try:
            for chunk in self._chunks([*system, *self.messages, message]):
                if chunk.text:
                    first = first or time.perf_counter() - began
                    reply += chunk.text
                    self._write(chunk.text)
            self.exchanges.append(Exchange(chunk, first, time.perf_counter() - began))
            if chunk.finish == "length" and self.params.max_tokens is None:
                self._note(
                    f" [cut off after {MAX_TOKENS} tokens, or where the context is full; see /set max_tokens]", end=""
                )
        except KeyboardInterrupt:
            self._note(" [stopped]", end="")
        finally:
            if reply:
                self.messages += [message, {"role": "assistant", "content": reply}]
            self._console.print()

    def _chunks(self, messages: list[dict[str, Any]]) -> Iterator[Chunk]:
        """The reply; leaving the iterator, by Ctrl-C too, aborts it."""
        chunks: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async with aclosing(self._limited(messages)) as stream:
                    async for chunk in stream:
                        chunks.put(chunk)
            finally:
                chunks.put(None)

        future = self._portal.start_task_soon(pump)
        try:
            while (chunk := chunks.get()) is not None:
                yield chunk
            future.result()
        finally:
            future.cancel()

    async def _limited(self, messages: list[dict[str, Any]]) -> AsyncGenerator[Chunk, None]:
        """The reply, of at most MAX_TOKENS if no limit is set and the context has room for as many."""
        if self.params.max_tokens is None:
            params = msgspec.structs.replace(self.params, max_tokens=MAX_TOKENS)
            try:
                async with aclosing(self._source.chat(messages, params)) as stream:
                    async for chunk in stream:
                        yield chunk
                return
            except RequestError as error:  # it may be for the limit; if it is not, the same is said again
                if error.status != 400:
                    raise
        async with aclosing(self._source.chat(messages, self.params)) as stream:
            async for chunk in stream:
                yield chunk

    def _write(self, text: str) -> None:
        """Show a piece of a reply at once."""
        self._console.file.write(text.translate(CONTROLS) if self._console.is_terminal else text)
        self._console.file.flush()

    def _note(self, text: str, end: str = "\n") -> None:
        self._console.print(text, style="dim", end=end)

    # ── commands ─────────────────────────────────────────────────────────────────────────────

    def _help(self, _: str) -> None:
        self._columns([(f"{name} {argument}", about) for name, (argument, about, _run) in self._commands.items()])
        self._note("a message that begins with a slash begins with two")

    def _reset(self, _: str) -> None:
        self.messages.clear()
        self.shown.clear()
        self.exchanges.clear()
        self._note("the conversation is empty")

    def _system(self, text: str) -> None:
        if text:
            self.system = None if text == "off" else text
        self._note(f"system prompt: {self.system or 'none'}")

    def _image(self, where: str) -> None:
        if where:
            self.shown.append(part_of(where))
        self._note(f"the next message shows {counted(len(self.shown), 'image or video', 'images and videos')}")

    def _set(self, words: str) -> None:
        options = {option.name: option for option in sampling_options()}
        if not words:
            values = {name: _shown(value) for name, value in settings_of(self.params).items()}
            values["max_tokens"] = str(self.params.max_tokens or MAX_TOKENS)
            self._columns([(name, values[name], option.description) for name, option in options.items()])
            return
        name, _, text = words.partition(" ")
        name = name.replace("-", "_")
        if name not in options:
            raise ConfigError(f"there is no setting {name!r}; /set lists them{did_you_mean(name, options)}")
        if not text:
            raise ConfigError(f"/set {name} has no value; it takes {options[name].expects}, or default")
        value = settings_of(SamplingParams())[name] if text == "default" else options[name].read(text, name)
        params = SamplingParams(**{**settings_of(self.params), name: value})
        check_sampling(params)
        if settings_of(params)[name] != value:
            raise ConfigError(f"{name} goes with a schema, and none is set; /set json_schema first")
        self.params = params
        self._note(f"{name} {'default' if text == 'default' else _shown(value)}")

    def _columns(self, rows: Sequence[tuple[str, ...]]) -> None:
        """Show `rows` with their columns one below the other; what is too long for the last one goes on below it."""
        table = Table.grid(*(Column(no_wrap=True) for _ in rows[0][1:]), Column(), padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(*row)
        self._console.print(table, soft_wrap=False)

    def completions(self, line: str) -> list[str]:
        """The completions of the last word of `line`, in which Tab was pressed."""
        *before, word = line.split(" ")
        options = {option.name: option for option in sampling_options()}
        match before:
            case []:
                known: Iterable[str] = self._commands if word.startswith("/") else ()
            case ["/set"]:
                known = options
            case ["/set", name] if (option := options.get(name.replace("-", "_"))) is not None:
                known = ("default", *(("true", "false") if option.kind is bool else option.choices))
            case _:
                known = ()
        return [f"{one} " for one in known if one.startswith(word)]

    def _stats(self, _: str) -> None:
        if not self.exchanges:
            self._note("no whole reply yet")
            return
        self._console.print(f"last reply: {self.exchanges[-1]}")
        tokens = sum(exchange.last.completion_tokens for exchange in self.exchanges)
        self._console.print(f"all {len(self.exchanges)}: {counted(tokens, 'token')} out")

    def _save(self, path: str) -> None:
        saved = Saved(self.messages, self.system, changed(self.params))
        with _files("/save", path) as file:
            file.write_bytes(msgspec.json.format(msgspec.json.encode(saved)))
        self._note(f"saved {counted(len(self.messages), 'message')} in {path}")

    def _load(self, path: str) -> None:
        with _files("/load", path) as file:
            content = file.read_bytes()
        try:
            saved = msgspec.json.decode(content, type=Saved)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path} is no conversation that /save wrote: {error}") from None
        params = _params(saved.settings)
        check_sampling(params)
        self.messages, self.system, self.params = saved.messages, saved.system, params
        self.exchanges.clear()
        self._note(f"loaded {counted(len(self.messages), 'message')} from {path}")

    def _exit(self, _: str) -> None:
        self._left = True


def _shown(value: Any) -> str:
    """The value of a setting in a column."""
    match value:
        case None:
            text = "default"
        case bool():
            text = str(value).lower()
        case tuple():
            text = ",".join(map(str, value)) or "none"
        case dict():
            text = msgspec.json.encode(value).decode() if value else "none"
        case _:
            text = str(value)
    return text if len(text) <= VALUE_WIDTH else f"{text[: VALUE_WIDTH - 1]}…"


def _params(settings: dict[str, Any]) -> SamplingParams:
    """The parameters that `settings` describe. Raises ConfigError."""
    options = {option.name: option for option in sampling_options()}
    for name in settings:
        if name not in options:
            raise ConfigError(f"there is no setting {name!r}{did_you_mean(name, options)}")
    return SamplingParams(**{name: options[name].read(value, name) for name, value in settings.items()})


@contextmanager
def _files(command: str, path: str) -> Iterator[Path]:
    """The file at `path`; an error of the system in the context becomes ours."""
    if not path:
        raise ConfigError(f"{command} needs the name of a file")
    try:
        yield Path(path).expanduser()
    except OSError as error:
        raise ConfigError(f"{command} {path}: {error.strerror}") from None


@contextmanager
def _line_editing(complete: Callable[[str], list[str]]) -> Iterator[None]:
    """Line editing where the platform has readline: the lines of earlier chats are at the up arrow, and Tab completes a
    word as `complete` says of the line so far."""
    try:
        import readline
    except ImportError:
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "engine" / "chat_history"
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)

    def one(_: str, number: int) -> str | None:
        found = complete(readline.get_line_buffer()[: readline.get_endidx()])
        return found[number] if number < len(found) else None

    readline.set_completer_delims(" ")  # a slash is part of its word
    readline.set_completer(one)
    editline = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if editline else "tab: complete")
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
