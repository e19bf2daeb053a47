"""The house's measures: how long a function and a file may be, that no function is written twice, and that arguments
beyond a few are named.

A function's lines are counted from its `def` to its end, without the docstring: what it does must fit a screen, what is
said of it is prose. Decorators are not counted.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path.relative_to(ROOT).as_posix() for top in ("engine", "plugins") for path in (ROOT / top).rglob("*.py")
)
FUNCTION, FILE = 50, 450  # lines, at most
REPEATED = 3  # statements of a body, or more, that stand in one place only

UNNAMED = 5  # arguments that a call may have without their names
# Rooms whose functions compute with tensors: their arguments come in the order of a formula, or of a kernel.
FORMULAS = tuple(f"engine/{room}/" for room in ("kernels", "layers", "worker", "parallel", "testing"))
FORMULAS += tuple(f"plugins/{kind}/" for kind in ("attention", "models", "quantization"))

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[tuple[Function, list[ast.stmt]]]:
    """Every function at any depth, and its statements without the docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            yield node, node.body[1:] if ast.get_docstring(node) is not None else node.body


def long_functions(source: str) -> list[str]:
    found = []
    for node, body in functions(source):
        assert node.end_lineno is not None
        prose = 0
        if body is not node.body:
            assert node.body[0].end_lineno is not None
            prose = node.body[0].end_lineno - node.body[0].lineno + 1
        if (lines := node.end_lineno - node.lineno + 1 - prose) > FUNCTION:
            found.append(f"{node.name} has {lines} lines")
    return found


def repeats(sources: dict[str, str]) -> list[list[str]]:
    """Functions whose bodies are the same but for comments, layout and docstrings. `sources` are texts by path."""
    places: dict[str, list[str]] = defaultdict(list)
    for path, source in sources.items():
        for node, body in functions(source):
            if sum(isinstance(each, ast.stmt) for stmt in body for each in ast.walk(stmt)) >= REPEATED:
                places["\n".join(map(ast.unparse, body))].append(f"{path}: {node.name}")
    return [found for found in places.values() if len(found) > 1]


def unnamed(source: str) -> list[str]:
    """Functions that may be called with more than `UNNAMED` arguments without names, `self` not counted."""
    found = []
    for node, _ in functions(source):
        names = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
        if (count := len(names) - (names[:1] in (["self"], ["cls"]))) > UNNAMED:
            found.append(f"{node.name} takes {count} arguments without names")
    return found


@pytest.mark.parametrize("path", FILES)
def test_functions_and_files_are_short(path: str) -> None:
    source = (ROOT / path).read_text()
    assert path.startswith(FORMULAS) or unnamed(source) == [], "put a * before those that are named"
    assert long_functions(source) == [], f"at most {FUNCTION}, without the docstring"
    assert len(source.splitlines()) <= FILE


def test_no_function_is_written_twice() -> None:
    assert repeats({path: (ROOT / path).read_text() for path in FILES}) == []


def test_the_measures_find_what_is_too_long() -> None:
    full = "def f():\n" + "    x = 1\n" * (FUNCTION - 1)
    assert long_functions(full) == []
    assert long_functions(full + "    x = 1\n") == [f"f has {FUNCTION + 1} lines"]
    assert long_functions("async " + full + "\n    x = 1\n") == [f"f has {FUNCTION + 2} lines"]
    assert long_functions("@made(\n    1\n)\n" + full.replace("():", '():\n    """One.\n\n    Two."""')) == []


def test_arguments_without_names_are_counted() -> None:
    assert unnamed("class A:\n  def f(self, a, b, /, c, d, e, *more, g, h): pass") == []
    found = ["f takes 6 arguments without names"]
    assert (
        unnamed("async def f(a, b, /, c, d, e, g): pass")
        == unnamed("class A:\n  def f(cls, a, b, c, d, e, g): 1")
        == found
    )


def test_repeats_are_found() -> None:
    body = "    a = {0}\n    b = a  # why\n    return b\n"
    one, other = f'def f():\n    """One."""\n{body.format(1)}', f"class A:\n  def g(self):\n{body.format(1)}"
    assert repeats({"a.py": one, "b.py": other}) == [["a.py: f", "b.py: g"]]
    assert repeats({"a.py": one, "b.py": other.replace("1", "2")}) == []
