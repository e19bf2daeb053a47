"""Turns llguidance's errors about a grammar into errors for the client that sent it.

llguidance reports errors in the rewritten text: other lines than the client wrote, with options of ours among them, and
rewritten expressions. So a line is named only if the client's own text is Lark, in its own lines. Otherwise the error
names the part as the client wrote it, or not at all. Left out: names of rules that were changed on the way from EBNF.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import llguidance

from engine.plugin import Grammar, RequestError

ASCII = "dws"  # what \d, \w and \s mean in a regular expression is ASCII's, as it is to other engines
HEADER_LINES = 1  # that a text in Lark is given in front
MOST = 400  # characters of a message, and of a line of the client's
LINE = 80
PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): ")
EXCERPT = re.compile(r"\n +\d+ \| .*", re.DOTALL)
WRAPPERS = ("failed to compile JSON schema: ",)
# Behind these come lists, places in the library, or its own words.
ENDLESS = ("\n  while processing", "; following special tokens", ":  (", "; enable ")
EXPRESSION = re.compile(r"(?:invalid regex .*? \(in regex\): )?regex parse error:\n(.*)\nerror: (.*)", re.DOTALL)
LOOK_AROUND = re.compile(
    r"(?:invalid regex .* \(in regex\): )?lookarounds not supported yet; \w+ in regex /(.*)/", re.DOTALL
)
TOKENS = ("doesn't satisfy the grammar", "no error message")  # of a token that may not come
DISJOINT = re.compile(r"patternProperty regexes .* are not disjoint", re.DOTALL)
RENAMED = re.compile(r"Rule '.*' already exists")
NUMBER = re.compile(r"\d+")


def refusal(grammar: Grammar, said: str, code: str = "invalid_grammar") -> RequestError:
    """`said` by llguidance of `grammar`, with the code and the remedy that belong to it."""
    place = PLACE.match(said)
    text = EXCERPT.sub("", said[place.end() :] if place else said).strip()
    for wrapper in WRAPPERS:
        text = text.removeprefix(wrapper)
    text, code, remedy = _in_words(grammar, text, code)
    if place and grammar.kind == "lark":
        text = f"{_in_lines(grammar.source, int(place[1]) - HEADER_LINES, int(place[2]))}: {text}"
    if len(text) > MOST:
        text = f"{text[:MOST]}..."
    return RequestError(f"llguidance does not take the {grammar.kind}: {text}; {remedy}", code=code)


def outgrown(said: str) -> str:
    """The error of a matcher that stopped because of the size of its grammar, and not because of a token."""
    text = said.partition("\n<state>")[0].removeprefix("Parser Error: ").removeprefix("parser error: ").strip()
    return "" if any(of_token in text for of_token in TOKENS) else text


def _in_lines(source: str, line: int, column: int) -> str:
    """A place in the client's own text."""
    lines = source.split("\n")
    shown = lines[line - 1].strip()[:LINE] if 0 < line <= len(lines) else ""
    return f"line {line}, column {column}, in '{shown}'"


def _in_words(grammar: Grammar, text: str, code: str) -> tuple[str, str, str]:
    """The fault, the code and the remedy."""
    if found := EXPRESSION.match(text):
        return _in_expression(grammar, found[1], found[2]), code, "correct it"
    if found := LOOK_AROUND.fullmatch(text):
        expression = _as_written(grammar, found[1])
        where = f": '{expression}'" if expression else ""
        return rf"look-around, such as \b, or ^ and $ inside, is not supported{where}", code, "leave it out"
    for end in ENDLESS:
        text = text.partition(end)[0]
    if text.startswith("oneOf constraints"):
        return "oneOf, where its branches do not plainly exclude each other", "unsupported_keyword", "use anyOf"
    if DISJOINT.match(text):
        return "patternProperties, where a name may match two patterns", "unsupported_keyword", "use one pattern"
    if "Unimplemented keys" in text:
        return text, "unsupported_keyword", "leave it out"
    if text.startswith(("Resource ", "Pointer ")):
        text = f"$ref: {text}"
    elif text == "Unsatisfiable schema: anyOf is empty" and '"anyOf"' not in grammar.source:
        text = "Unsatisfiable schema: enum is empty"
    elif text == "Unsatisfiable schema: Regex is empty":
        text = "Unsatisfiable schema: no string has the pattern, format and length that one is to have"
    elif RENAMED.match(text):
        text = "two of its rules have one name here, where case, - and _ make no difference and root is start"
        return text, code, "rename one"
    return text, code, "correct it"


def _in_expression(grammar: Grammar, shown: str, reason: str) -> str:
    """The fault of a regular expression; `shown` has the rewritten expression, marked from below."""
    lines = shown.split("\n")
    marked = next((index for index, line in enumerate(lines) if index and line.strip(" ") and not line.strip(" ^")), 0)
    start, end = lines[marked].find("^"), lines[marked].rfind("^") + 1
    part = lines[marked - 1][start:end] if marked else ""
    if reason == "decimal literal invalid":
        return f"a number is too large: {max(NUMBER.findall(part), key=len)}"
    expression = _as_written(grammar, lines[0])
    known = part and any(part in text for text in ([expression] if expression else _texts(grammar)))
    if known and part != expression:
        return f"{reason}: '{part}'" + (f" in '{expression}'" if expression else "")
    return f"{reason}: '{expression}'" if expression else reason


def _as_written(grammar: Grammar, expression: str) -> str:
    """The client's own text of a rewritten expression; empty if that is not found."""
    rewritten = (
        text for text in _texts(grammar) if llguidance.regex_to_lark(text, ASCII).strip(" ") == expression.strip(" ")
    )
    return next(rewritten, "")


def _texts(grammar: Grammar) -> Iterator[str]:
    """The texts of a grammar that may be expressions."""
    if grammar.kind in ("json_schema", "structural_tag"):
        yield from _strings(json.loads(grammar.source))
    else:
        yield grammar.source


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    if isinstance(value, dict):
        yield from value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(part)
