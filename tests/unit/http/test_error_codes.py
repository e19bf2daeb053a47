"""Every code that an error may carry is in docs/http.md or docs/router.md, and nothing else is."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
NO_CODES = {"engine/bench", "engine/client/client.py", "engine/client/chat.py"}  # of other processes than the server's
CODE_OF = {"Failed": 2, "Refusal": 1, "refused": 0}  # the place of their argument


def texts(tree: ast.AST | None) -> set[str]:
    """What `tree` may be, where it is a text or a choice between texts."""
    match tree:
        case ast.Constant(value=str() as text):
            return {text}
        case ast.IfExp(body=one, orelse=other):
            return texts(one) | texts(other)
    return set()


def codes_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.keyword(arg="code", value=ast.Constant() | ast.IfExp() as value):
                yield from texts(value)
            case ast.Assign(targets=[ast.Name("code")], value=ast.Constant() | ast.IfExp() as value):
                yield from texts(value)
            case ast.AnnAssign(target=ast.Name("code"), value=ast.Constant() | ast.IfExp() as value):
                yield from texts(value)
            case ast.Call(func=ast.Name(name), args=args) if len(args) > CODE_OF.get(name, 99):
                yield from texts(args[CODE_OF[name]])
            case ast.arguments():
                names = [*node.posonlyargs, *node.args][-len(node.defaults) or 99 :] + node.kwonlyargs
                for name, default in zip(names, [*node.defaults, *node.kw_defaults], strict=True):
                    if name.arg == "code":
                        yield from texts(default)
            case ast.FunctionDef(name="_http_words"):  # returns a code and a message
                for part in ast.walk(node):
                    if isinstance(part, ast.Return) and isinstance(part.value, ast.Tuple):
                        yield from texts(part.value.elts[0])


def raised() -> set[str]:
    files = [*(ROOT / "engine").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    found: set[str] = set()
    for path in files:
        if not any(str(path.relative_to(ROOT)).startswith(place) for place in NO_CODES):
            found |= set(codes_in(ast.parse(path.read_text())))
    return found - {""}


def documented() -> set[str]:
    pages = [(ROOT / "docs" / name).read_text() for name in ("http.md", "router.md")]
    sections = [page.partition("\n## Errors\n")[2].partition("\n## ")[0] for page in pages]
    lines = "\n".join(sections).splitlines()
    rows = [line.split("|")[2] for line in lines if re.match(r"\| (\d{3}|response)(, \d{3})* \|", line)]
    return {code for row in rows for code in re.findall(r"`(\w+)`", row)}


MADE_UP = {"grammar_failed"}  # of a kind's name, in engine/sched/assets.py


def test_the_codes_of_the_docs_are_all_codes() -> None:
    assert raised() | MADE_UP == documented()


def test_codes_are_found_however_they_are_written() -> None:
    source = """
def refuse(message, *, code="one"): ...
refuse("m", code="two" if x else "three")
Failed(rid, 400, "four", "m")
code = "five" if remedy == "no code" else "six"
Refusal(503, "seven", "m")
"""
    assert set(codes_in(ast.parse(source))) == {"one", "two", "three", "four", "five", "six", "seven"}
