"""`engine cache`: what it draws of what a server holds."""

import io

import pytest
from rich.console import Console

from engine import cli
from engine.client.held import MOST_SHOWN, Cache, Session, Tier, drawn
from engine.options.sizes import show_size

CACHE = Cache(16, [Tier("device", 812, 31, 1 << 30, 4 << 30), Tier("disk", 9, 0, 5 << 40, 6 << 40)], 3, 40)


def text_of(sessions: list[Session]) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=100)
    console.print(drawn(CACHE, sessions))
    return [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_each_tier_and_each_session_is_a_line() -> None:
    lines = text_of([Session("agent-7", 12, 240, 1, 0.4, 3599.6, below=3)])
    assert lines == [
        ["tier", "pages", "bytes", "of", "in", "use"],
        ["device", "812", "1", "GiB", "4", "GiB", "31"],
        ["disk", "9", "5", "TiB", "6", "TiB", "0"],
        ["3", "sessions", "with", "40", "pages", "of", "16", "tokens;", "1", "of", "this", "key", "and", "salt"],
        ["session", "pages", "below", "tokens", "running", "idle", "left"],
        ["agent-7", "12", "3", "240", "1", "0", "s", "3600", "s"],
    ]


def test_sessions_beyond_a_screen_are_counted() -> None:
    assert len(text_of([])) == 4
    lines = text_of([Session(str(number), 1, 16, 0, 1.0, 1.0) for number in range(MOST_SHOWN + 2)])
    assert len(lines) == 5 + MOST_SHOWN + 1 and lines[-1] == ["and", "2", "more"]


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536 << 20, "1.5 GiB"), (1 << 52, "4096 TiB")],
)
def test_bytes_are_said_in_the_unit_that_fits(size: int, words: str) -> None:
    assert show_size(size) == words


def test_where_no_server_answers_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for action in ([], ["clear"]):
        assert cli.main(["cache", *action, "--url", "http://127.0.0.1:1"]) == 2
        said = capsys.readouterr().err
        assert "no server answers at http://127.0.0.1:1 ([Errno " in said
        assert "ssl" not in said
    assert cli.main(["cache", "drop"]) == 2
    assert "invalid choice: 'drop'" in capsys.readouterr().err
