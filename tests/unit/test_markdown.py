"""The Markdown pages: lines are short, and every file, folder, module and heading that a page names exists.

Left out: tables and blocks of code may have long lines, and what blocks of code name is held by test_commands.py;
patterns (`tests/gpu/*`, `<name>.so`, `a/…`) and what a user makes (`model.safetensors`) name no file of the tree."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 120
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for top in ("docs", "bench", "examples", "findings") for page in ROOT.glob(f"{top}/**/*.md")),
    ]
)
TOPS = ("engine", "plugins", "tests", "bench", "docs", "examples", "findings")
NAMES = {path.relative_to(ROOT).as_posix() for top in TOPS for path in ROOT.glob(f"{top}/**/*")}
NAMES |= {path.name for path in ROOT.iterdir()}
OWN = r"py|c|h|md|sh"  # the kinds of files that the tree has, and users do not make


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)


def long_lines(text: str) -> list[str]:
    return [line for line in prose(text).splitlines() if len(line) > LONGEST and not line.lstrip().startswith("|")]


def missing(text: str) -> list[str]:
    """The names in backticks that look like a file, a folder or a module of the tree, and are none."""
    found = []
    for code in re.findall(r"`([^`\n]+)`", prose(text)):
        if re.search(r"[*<>…{}$ ]", code) or code == "engine.plugins":  # that is the group of entry points
            continue
        if re.fullmatch(r"(engine|engine_plugins|bench)(\.\w+)+(?<!\.json)", code):
            if not is_module(code):
                found.append(code)
        elif re.match(rf"({'|'.join(TOPS)})/", code):
            if code.rstrip("/").partition(":")[0] not in NAMES:
                found.append(code)
        elif re.fullmatch(rf"[\w./-]+\.({OWN})", code) and not any(name.endswith("/" + code) for name in NAMES):
            found.append(code)
    return found


def is_module(dotted: str) -> bool:
    """Whether `dotted` is a module, or what a module defines."""
    path = re.sub(r"^engine_plugins\b", "plugins", dotted).replace(".", "/")
    if path in NAMES or f"{path}.py" in NAMES:
        return True
    parent, _, name = path.rpartition("/")
    files = [file for file in (f"{parent}.py", f"{parent}/__init__.py") if file in NAMES]
    return any(re.search(rf"\b{name}\b", (ROOT / file).read_text()) for file in files)


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_lines_of_a_page_are_short(page: Path) -> None:
    assert long_lines(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert missing(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(text)):
        name, _, anchor = target.partition("#")
        led = (page.parent / name).resolve() if name else page
        assert led.exists(), target
        assert not anchor or anchor in anchors(led.read_text()), target


@pytest.mark.parametrize(
    "text",
    ["`engine/nothing.py`", "`engine/worker/nothing/`", "`nothing.py`", "`engine.nothing.more`", "`bench.nothing`"],
)
def test_what_is_not_there_is_noticed(text: str) -> None:
    assert missing(text)
    assert not missing(f"```\n{text}\n```")


@pytest.mark.parametrize(
    "text",
    ["`engine/cli.py`", "`engine/worker/`", "`steps/graphs.py`", "`engine.plugin.layers`", "`engine.plugin.hookimpl`"],
)
def test_what_is_there_is_found(text: str) -> None:
    assert not missing(text)


def test_a_long_line_is_noticed() -> None:
    line = "word " * 25
    assert long_lines(line) and not long_lines("| " + line) and not long_lines(f"```\n{line}\n```")
