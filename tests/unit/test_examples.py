"""The examples run as their docstrings say, against a server at ENGINE_URL, and ask for replies with a limit.

And the table of bench/clients.sh: each client has a program and a line in the docs."""

import ast
import io
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from http_front import FakeFront, chunks, serving, written
from test_embeddings import open_site as open_embeddings
from test_http_tools import front as tool_front

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.py") if "third_party_plugin" not in path.parts)
CALL = '<tool_call>\n{"name": "count_letters", "arguments": {"word": "sky"}}\n</tool_call>'


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    async def run(name: str, url: str, *words: str, typed: str = "") -> str:
        """What examples/client/`name` prints."""
        path = str(ROOT / "examples/client" / name)
        monkeypatch.setenv("ENGINE_URL", url)
        monkeypatch.setattr(sys, "argv", [path, *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        await anyio.to_thread.run_sync(lambda: runpy.run_path(path, run_name="__main__"))
        return capsys.readouterr().out

    return run


async def test_the_chat(run: Any) -> None:
    front = FakeFront(chunks("Hello", " there"))
    async with serving(front) as url:
        assert "Hello there\n" in await run("chat_openai.py", url, typed="hi\nmore\n\n")
        await run("chat_openai.py", url, typed="hi\n")  # and Ctrl-D
    assert [len(asked.messages or ()) for asked in front.asked] == [1, 3, 1]
    assert all(asked.sampling.max_tokens for asked in front.asked)


async def test_tools(run: Any) -> None:
    front = tool_front(CALL)
    async with serving(front) as url:
        assert 'count_letters({"word": "sky"}) = 3' in await run("tools_openai.py", url, "How long?", "--must")
    assert front.asked[0].grammar is not None
    assert written(front.asked[1])[-1]["content"] == "3"
    assert all(asked.sampling.max_tokens for asked in front.asked)


async def test_the_native_stream(run: Any) -> None:
    front = FakeFront(chunks("Hello", " there"))
    async with serving(front) as url:
        assert (await run("stream_aiohttp.py", url, "Say", "hello")).startswith("Hello there\n{'id'")
    assert front.asked[0].text == "Say hello" and front.asked[0].sampling.max_tokens


async def test_the_search(run: Any) -> None:
    async with open_embeddings(served_model_name="all-minilm-l6-v2") as (_, url, _):
        said = await run("search.py", url, "How do trees drink?")
    assert len(re.findall(r"^\d+\.\d\d  \w", said, re.MULTILINE)) == 3


def test_every_example_is_known_here_and_can_be_compiled() -> None:
    run_above = {"chat_openai.py", "tools_openai.py", "stream_aiohttp.py", "search.py"}
    # run by test_programs.py, test_pages.py and test_language_servers.py
    programs = {"conversation.py", "classification.py", "extraction.py", "tree_of_thought.py", "react.py"}
    programs |= {"retrieval.py", "picture.py"}
    assert {path.name for path in EXAMPLES} == {*run_above, *programs, "complete.py"}
    (offline,) = (path for path in EXAMPLES if path.name == "complete.py")
    assert "max_tokens" in offline.read_text() and runpy.run_path(str(offline))["main"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_docstring_names_the_file_as_it_is_called_from_the_root(path: Path) -> None:
    assert f"python {path.relative_to(ROOT)}" in (ast.get_docstring(ast.parse(path.read_text())) or "")


def test_the_plugin_needs_nothing_that_is_not_on_the_index() -> None:
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    project = tomllib.loads((ROOT / "examples/third_party_plugin/pyproject.toml").read_text())["project"]
    assert ours not in project["dependencies"], "it may be another project's name on the index"


# ── bench/clients.sh ─────────────────────────────────────────────────────────────────────────

SCRIPT = ROOT / "bench/clients.sh"


def clients() -> dict[str, str]:
    """The version of each client that the script installs."""
    table = re.search(r'^CLIENTS="\n(.*?)\n"$', SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert table
    rows = [line.split() for line in table[1].splitlines()]
    for name, version, *packages in rows:
        assert any(re.search(rf"(==|@){re.escape(version)}$", package) for package in packages), name
        assert all(re.search(r"==[\d.]+$|^npm:@?[a-z/-]+@[\d.]+$", package) for package in packages), name
    return {name: version for name, version, *_ in rows}


def test_every_client_has_a_program_and_a_row_in_the_docs() -> None:
    programs = {path.stem: path for path in (ROOT / "bench/clients").iterdir() if path.is_file()}
    assert programs.keys() == clients().keys()
    page = (ROOT / "docs/clients.md").read_text()
    for name, version in clients().items():
        what = re.match(r'(?:"""|# |// )(.+?)(?:""")?\n', programs[name].read_text())
        assert what, f"{name}: its first line says what it tries"
        assert re.search(rf"^\| .*\b{re.escape(name)}\b.* \| {re.escape(version)} \| ", page, re.MULTILINE), name


def test_the_script_says_what_is_wrong_with_its_arguments() -> None:
    def said(*arguments: str) -> str:
        done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and not done.stdout
        return done.stderr

    assert "usage: " in said() and "openai-node" in said()
    assert "there is no client opanai" in said("http://127.0.0.1:9", "opanai")
    assert "no server answers at http://127.0.0.1:9/v1/models" in said("http://127.0.0.1:9", "openai")
