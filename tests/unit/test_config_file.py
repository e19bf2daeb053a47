"""A TOML file of options: what it may say, what overrules it, and how it is refused."""

from pathlib import Path
from typing import Any

import pytest

from engine import cli
from engine.config import Config, read_file, resolve
from engine.errors import ConfigError


def write(folder: Path, text: str) -> str:
    path = folder / "serve.toml"
    path.write_text(text)
    return str(path)


def test_options_stand_at_the_top_or_in_the_table_of_their_group(tmp_path: Path) -> None:
    path = write(
        tmp_path, 'port = 9001\nplugins = ["a", "b"]\n[schedule]\nmax_running = 9\n[cache]\nprefix_cache = false\n'
    )
    config = resolve({}, {}, read_file(path))
    assert (config.server.port, config.model.plugins) == (9001, ("a", "b"))
    assert (config.schedule.max_running, config.cache.prefix_cache) == (9, False)


def test_flags_overrule_the_environment_and_that_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "port = 1\nmax_running = 2\npage_size = 3\n")
    served: list[Config] = []
    monkeypatch.setattr("engine.runtime.serve.serve", lambda config: served.append(config) or 0)
    monkeypatch.setenv("ENGINE_MAX_RUNNING", "20")
    monkeypatch.setenv("ENGINE_PORT", "10")
    assert cli.main(["serve", "--config", path, "--port", "100"]) == 0
    monkeypatch.setenv("ENGINE_CONFIG", path)
    assert cli.main(["serve", "--port", "100"]) == 0
    assert served[0] == served[1]
    assert (served[0].server.port, served[0].schedule.max_running, served[0].cache.page_size) == (100, 20, 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_runing = 3", ["max_runing", "did you mean 'max_running'"]),
        ("page_size = 300", ["page_size in", "300", "from 1 to 256"]),
        ("port = [1]", ["port in", "[1]", "an integer"]),
        ("port = 1\n[server]\nport = 2", ["port twice"]),
        ("[sched]\nmax_running = 3", ["sched", "no option"]),
        ("port = ", ["cannot be read"]),
    ],
)
def test_refusals(tmp_path: Path, text: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        read_file(write(tmp_path, text))
    for words in said:
        assert words in str(raised.value)


def test_a_file_that_is_missing(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["serve", "--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml cannot be read" in capsys.readouterr().err


def test_completion_knows_commands_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in cli.SHELLS:
        assert cli.main(["completion", shell]) == 0
        script = capsys.readouterr().out
        for word in ("serve", "generate", "max-running", "no-prefix-cache"):
            assert word in script
    assert cli.main(["completion", "elvish"]) == 2
    assert "elvish" in capsys.readouterr().err
