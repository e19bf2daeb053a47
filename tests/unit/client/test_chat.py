"""`engine chat`: what is said, kept, changed and stopped; scripted, and at a terminal of its own."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from http_front import FakeFront, chunks, serving, written
from rich.console import Console

from engine import cli
from engine.client.chat import MAX_TOKENS, Conversation
from engine.client.options import sampling_options
from engine.errors import RequestError
from engine.messages.reply import Chunk
from engine.params.grammar import Grammar
from engine.params.sampling import SamplingParams


class Scripted:
    """A source that answers with `replies` in turn: texts to say, or errors to raise after what was said."""

    model_name = "scripted"

    def __init__(self) -> None:
        self.replies: list[list[str | Exception]] = []
        self.asked: list[tuple[list[dict[str, Any]], SamplingParams]] = []
        self.hangs = False
        self.finish: Any = "stop"
        self.closed = 0

    async def chat(self, messages: list[dict[str, Any]], params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        self.asked.append((list(messages), params))
        try:
            for number, text in enumerate(self.replies.pop(0) if self.replies else ["re", "ply"], 1):
                if isinstance(text, Exception):
                    raise text
                yield Chunk("", text, [], None, None, 7, 4, number)
            if self.hangs:
                await anyio.sleep_forever()
            yield Chunk("", "", [], self.finish, None, 7, 4, 3)
        finally:
            self.closed += 1


class Screen(io.StringIO):
    """What the chat has written; `interrupt` is a text that makes the user press Ctrl-C."""

    interrupt = "\0"

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.interrupt in text:
            signal.raise_signal(signal.SIGINT)
        return written


class Talk:
    def __init__(self, portal: Any, params: SamplingParams, system: str | None) -> None:
        self.source = Scripted()
        self.screen = Screen()
        console = Console(file=self.screen, highlight=False, markup=False, soft_wrap=True)
        self.conversation = Conversation(portal, self.source, console, params, system)

    def take(self, *lines: str) -> str:
        """What is shown after these lines."""
        self.screen.seek(0)
        self.screen.truncate()
        self.code = self.conversation.script(iter(lines))
        return self.screen.getvalue()

    @property
    def last(self) -> list[str]:
        """The messages of the last request, as "role: content"."""
        return [f"{message['role']}: {message['content']}" for message in self.source.asked[-1][0]]


@pytest.fixture
def talk() -> Iterator[Talk]:
    with anyio.from_thread.start_blocking_portal("asyncio") as portal:
        yield Talk(portal, SamplingParams(), None)


def test_a_conversation_has_its_history(talk: Talk) -> None:
    assert talk.take("hi\n") == "reply\n"
    talk.take(" there \n", "\n")
    assert talk.last == ["user: hi", "assistant: reply", "user: there"]
    assert len(talk.source.asked) == 2  # an empty line is none
    assert talk.code == 0


def test_reset_forgets_but_the_system_prompt_stays(talk: Talk) -> None:
    talk.take("/system be brief", "one", "/reset", "two")
    assert talk.last == ["system: be brief", "user: two"]
    assert "be brief" in talk.take("/system")
    talk.take("/system off", "three")
    assert talk.last == ["user: two", "assistant: reply", "user: three"]


def test_settings(talk: Talk) -> None:
    talk.take("/set temperature 0.7", "/set max-tokens 5", "/set stop a,b", "hi")
    assert talk.source.asked[-1][1] == SamplingParams(temperature=0.7, max_tokens=5, stop=("a", "b"))
    talk.take("/set temperature default", "hi")
    assert talk.source.asked[-1][1].temperature is None
    talk.take("/set json_schema {}", "/set strict_schema false", "/set logit_bias default", "hi")
    assert talk.source.asked[-1][1].grammar == Grammar("json_schema", "{}", strict=False)
    talk.take("/set json_schema default", "hi")
    assert talk.source.asked[-1][1].grammar is None
    listing = talk.take("/set")
    for name in (option.name for option in sampling_options()):
        assert f"{name} " in listing


def test_the_settings_stand_in_columns(talk: Talk) -> None:
    talk.take("/set stop " + "long," * 30, "/set logit_bias " + '{"5": -1.5}', "/set ignore_eos true", "/set top_k 5")
    lines = talk.take("/set").splitlines()
    assert max(map(len, lines)) <= 80
    (second,) = {line.index(word) for line in lines for word in ("long,", '{"5"', "none", "1024") if f" {word}" in line}
    third = next(line for line in lines if line.startswith("top_p ")).index("keep")
    for option in sampling_options():
        row = next(place for place, line in enumerate(lines) if line.startswith(f"{option.name} "))
        assert lines[row][second - 1] == lines[row][third - 1] == " " != lines[row][second]
        told = lines[row][third:]
        while row + 1 < len(lines) and not lines[row + 1][:third].strip():
            row += 1
            told += lines[row][third:]
        assert "".join(told.split()) == "".join(option.description.split())
    assert all(name in talk.take("/set") for name in ("default", "true", '{"5":-1.5}'))


def test_a_reply_has_a_limit_that_can_be_moved(talk: Talk) -> None:
    talk.source.finish = "length"
    assert f"cut off after {MAX_TOKENS} tokens" in talk.take("hi")
    assert talk.source.asked[-1][1].max_tokens == MAX_TOKENS
    assert talk.take("/set max_tokens 5000", "hi") == "max_tokens 5000\nreply\n"
    assert talk.source.asked[-1][1].max_tokens == 5000
    talk.take("/set max_tokens default", "hi")
    assert talk.source.asked[-1][1].max_tokens == MAX_TOKENS


def test_a_context_without_room_for_the_limit_gives_what_it_has(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    full = RequestError("max_tokens 1024 and a prompt of 9 tokens are over the model's length", param="max_tokens")
    talk.source.replies = [[full], ["it fits"], [full], [RequestError("too long")], [RequestError("busy", status=503)]]
    assert talk.take("hi") == "it fits\n"
    assert [params.max_tokens for _, params in talk.source.asked] == [MAX_TOKENS, None]
    talk.take("hi", "hi")
    said = capsys.readouterr().err
    assert "error: too long" in said and "error: busy" in said and "1024" not in said
    assert not talk.source.replies


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/se", ["/set "]),
        ("/s", ["/system ", "/set ", "/stats ", "/save "]),
        ("/set temp", ["temperature "]),
        ("/set to", ["top_p ", "top_k "]),
        ("/set ignore-eos ", ["default ", "true ", "false "]),
        ("/set temperature d", ["default "]),
        ("/set nothing ", []),
        ("/set temperature 1 ", []),
        ("/save /se", []),
        ("hello /se", []),
        ("h", []),
        ("", []),
    ],
)
def test_completion_by_tab(talk: Talk, line: str, words: list[str]) -> None:
    assert talk.conversation.completions(line) == words


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/rest", ["/rest", "did you mean '/reset'"]),
        ("/set temprature 1", ["temprature", "did you mean 'temperature'"]),
        ("/set strict_schema false", ["strict_schema goes with a schema", "/set json_schema first"]),
        ("/set temperature hot", ["temperature", "'hot'", "a number"]),
        ("/set temperature 9", ["temperature", "9", "from 0 to 2"]),
        ("/set top_p", ["top_p", "a number", "default"]),
        ("/save", ["/save", "name of a file"]),
        ("/save /nowhere/at/all", ["/nowhere/at/all", "No such file"]),
        ("/load /nowhere/at/all", ["/nowhere/at/all", "No such file"]),
    ],
)
def test_a_wrong_command_changes_nothing(
    talk: Talk, capsys: pytest.CaptureFixture[str], line: str, said: list[str]
) -> None:
    talk.take(line, "hi")
    message = capsys.readouterr().err
    for part in said:
        assert part in message
    assert talk.code == 1
    assert talk.source.asked == [([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=MAX_TOKENS))]


def test_two_slashes_are_a_message(talk: Talk) -> None:
    talk.take("//help me")
    assert talk.last == ["user: /help me"]


def test_help_names_every_command(talk: Talk) -> None:
    said = talk.take("/help")
    for name in ["/help", "/reset", "/system", "/set", "/stats", "/save", "/load", "/exit"]:
        assert name in said
        assert f"`{name}" in (Path(__file__).parents[3] / "docs/chat.md").read_text()


def test_exit_leaves(talk: Talk) -> None:
    talk.take("/exit", "hi")
    assert talk.source.asked == []


def test_stats(talk: Talk) -> None:
    assert "no whole reply" in talk.take("/stats")
    said = talk.take("hi", "/stats")
    for part in ("7 tokens in (4 cached), 3 out", "tokens/s", "ended by stop"):
        assert part in said


def test_a_saved_conversation_goes_on(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    talk.take("/system s", "/set top_k 5", "hi", f"/save {file}", "/reset", "/system off", "/set top_k 0")
    talk.take(f"/load {file}", "more")
    assert talk.last == ["system: s", "user: hi", "assistant: reply", "user: more"]
    assert talk.source.asked[-1][1].top_k == 5


@pytest.mark.parametrize(
    "content",
    ["not json", "[]", '{"messages": [], "more": 1}', '{"messages": [], "settings": {"heat": 1}}',
     '{"messages": [], "settings": {"temperature": 9}}'],
)  # fmt: skip
def test_a_file_that_is_no_conversation_changes_nothing(
    talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    file = tmp_path / "talk.json"
    file.write_text(content)
    talk.take("hi", f"/load {file}", "more")
    assert capsys.readouterr().err.startswith("error: ")
    assert talk.last == ["user: hi", "assistant: reply", "user: more"]
    assert talk.source.asked[-1][1] == SamplingParams(max_tokens=MAX_TOKENS)


def test_ctrl_c_stops_the_reply_and_keeps_what_was_said(talk: Talk) -> None:
    talk.source.replies = [["so ", "far"]]
    talk.source.hangs = True
    talk.screen.interrupt = "far"
    assert talk.take("hi") == "so far [stopped]\n"
    talk.source.hangs = False
    talk.take("on")
    assert talk.last == ["user: hi", "assistant: so far", "user: on"]
    assert talk.source.closed == 2


def test_a_refused_message_is_not_kept(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talk.source.replies = [[RequestError("too long")], [RequestError("too long")]]
    talk.take("hi")
    assert "too long" in capsys.readouterr().err
    assert talk.code == 1
    talk.take("again")
    assert talk.last == ["user: again"]


def test_each_piece_is_shown_before_the_next_is_made(talk: Talk) -> None:
    shown: list[str] = []

    async def chat(messages: list[dict[str, Any]], params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        for text in "abc":
            yield Chunk("", text, [])
            with anyio.fail_after(60):
                while not talk.screen.getvalue().endswith(text):
                    await anyio.sleep(0.001)
            shown.append(text)
        yield Chunk("", "", [], "stop")

    talk.source.chat = chat  # type: ignore[method-assign]
    talk.take("hi")
    assert shown == ["a", "b", "c"]


def test_ctrl_c_at_the_prompt_leaves_nothing(talk: Talk) -> None:
    typed = iter(["hi", KeyboardInterrupt(), "more", EOFError(), "never"])

    def read() -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    assert talk.conversation.talk(read) == 0
    assert talk.last == ["user: hi", "assistant: reply", "user: more"]
    assert "/exit leaves" in talk.screen.getvalue()
    assert next(typed) == "never"


# ── whole ────────────────────────────────────────────────────────────────────────────────────


def test_a_chat_with_the_engine_in_this_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n/stats\n"))
    assert (
        cli.main(["chat", "--model", "echo", "--placement", "single", "--max-tokens", "35", "--temperature", "0"]) == 0
    )
    said = capsys.readouterr().out
    assert bytes(range(32, 46)).decode() in said  # the echo model counts on from the newline before its reply
    assert "2 tokens in (0 cached), 35 out" in said
    assert "ended by length" in said


@pytest.mark.anyio
async def test_a_chat_with_a_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    front = FakeFront(chunks("Hello", ", ", "world"))
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/stats\nyou\n"))
    async with serving(front, api_key=("key",)) as url:
        argv = ["chat", "--url", url, "--api-key", "key", "--system", "s", "--min-p", "0.5"]
        assert await anyio.to_thread.run_sync(cli.main, argv) == 0
    assert [message["content"] for message in written(front.asked[-1])] == ["s", "hi", "Hello, world", "you"]
    assert front.asked[0].sampling.min_p == 0.5
    said = capsys.readouterr().out
    assert "Hello, world\n" in said
    assert "7 tokens in (4 cached), 3 out" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--url http://127.0.0.1:9", ["http://127.0.0.1:9", "is it running"]),
        ("--url http://127.0.0.1:9 --device cpu", ["--device", "--url"]),
        ("--temperature 9", ["--temperature", "from 0 to 2"]),
        ("--rate 2", ["--rate"]),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], line: str, said: list[str]) -> None:
    assert cli.main(["chat", *line.split()]) == 2
    message = capsys.readouterr().err
    for part in said:
        assert part in message


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, *command: str, home: Path) -> None:
        self._unread = b""
        self._side, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(home)}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(theirs), os.O_RDWR)),  # makes it the controlling one
        )  # fmt: skip
        os.close(theirs)

    def read_until(self, text: str) -> str:
        wanted = text.encode()
        while wanted not in self._unread:
            assert select.select([self._side], [], [], 20)[0], f"{text!r} did not come in {self._unread!r}"
            self._unread += os.read(self._side, 4096)
        before, self._unread = self._unread.split(wanted, 1)
        return (before + wanted).decode()

    def type(self, text: str) -> None:
        os.write(self._side, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._side)


@pytest.mark.anyio
async def test_ctrl_c_at_a_terminal_stops_the_reply_not_the_chat(tmp_path: Path) -> None:
    # It goes on: a client that closes its connection and is not gone would be answered, so only a write tells.
    front = FakeFront([Chunk("", "\x1b[2Jabc", [1]), *[Chunk("", ".", [1])] * 1000], pause=0.02)

    def drive(terminal: Terminal) -> None:
        terminal.read_until("> ")
        terminal.type("hi\r")
        shown = terminal.read_until("abc")
        assert "[2Jabc" in shown
        assert "\x1b[2J" not in shown  # a reply cannot clear the screen
        terminal.type("\x03")
        terminal.read_until("[stopped]")
        terminal.read_until("> ")
        terminal.type("/se\ttempe\td\t\r")
        for _ in ("what is typed", "what is said"):
            terminal.read_until("temperature default")
        terminal.read_until("> ")
        terminal.type("/help\r")
        terminal.read_until("/save FILE")
        terminal.read_until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0

    async with serving(front) as url:
        terminal = Terminal(sys.executable, "-m", "engine.cli", "chat", "--url", url, home=tmp_path)
        try:
            await anyio.to_thread.run_sync(drive, terminal)
        finally:
            terminal.close()
        with anyio.fail_after(60):
            await front.closed.wait()
    assert "hi\n/set temperature default \n/help\n" in (tmp_path / "engine/chat_history").read_text()


def test_a_saved_file_is_json_for_people(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    talk.take("hi", f"/save {file}")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "reply"}]
    assert json.loads(file.read_text()) == {"messages": messages, "system": None, "settings": {}}
    assert file.read_text().count("\n") > 5


# ── pictures ─────────────────────────────────────────────────────────────────────────────────


def test_pictures_go_with_the_next_message(talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    (tmp_path / "b.mp4").write_bytes(b"mp4")
    said = talk.take(f"/image {tmp_path / 'a.png'}", f"/image {tmp_path / 'b.mp4'}", "/image https://a/c.webp", "what?")
    assert "the next message shows 3 images and videos" in said and talk.code == 0
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,cG5n"}}
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,bXA0"}}
    other = {"type": "image_url", "image_url": {"url": "https://a/c.webp"}}
    assert talk.source.asked[0][0] == [
        {"role": "user", "content": [image, video, other, {"type": "text", "text": "what?"}]}
    ]
    talk.take("and now?")
    assert talk.source.asked[1][0][-1] == {"role": "user", "content": "and now?"}
    assert talk.source.asked[1][0][0]["content"][0] == image
    assert "shows 0 images" in talk.take("/image")
    talk.take(f"/image {tmp_path / 'none.png'}")
    assert "none.png cannot be read: No such file" in capsys.readouterr().err and talk.code == 1


def test_the_first_message_shows_the_pictures_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    asked: list[Any] = []

    async def serve() -> None:
        front = FakeFront(chunks("seen"))
        async with serving(front) as url:
            command = [sys.executable, "-m", "engine", "chat", "--url", url, "--image", f"{tmp_path}/a.png"]
            done = await anyio.run_process(command, input=b"what?\n", check=False)
            assert (done.returncode, done.stdout) == (0, b"seen\n"), done.stderr
        asked.extend(front.asked)

    anyio.run(serve)
    assert [type(part).__name__ for part in asked[0].messages[0].parts] == ["Image", "Text"]
