"""Translates `pattern` of JSON Schema, an expression of ECMA-262, into the syntax of grammar engines.

    ^a|[b&&c]\\s     found anywhere in a string, `&&` are two signs, \\s is any space of Unicode
    (?:a(?s:.*)|(?s:.*)[b\\x{26}c][\\x{9}...])     the whole string, in Rust's syntax

An expression is read as with ECMA-262's flag `u`, which JSON Schema recommends: a character is a code point. A brace or
bracket that cannot be anything else is a literal, as without that flag, unless the expression has syntax that only the
flag gives a meaning. Left out, and refused in words: what no engine can enforce (look-around, \\b, back references)
and what is not ECMA-262.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import NoReturn

ANYTHING = "(?s:.*)"
DIGITS = r"0-9"
WORDS = r"0-9A-Z_a-z"
SPACES = r"\x{9}-\x{d}\x{20}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}"
LINE_ENDS = r"\x{a}\x{d}\x{2028}\x{2029}"
SETS = {"d": DIGITS, "w": WORDS, "s": SPACES}
CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
LAST = 0x10FFFF
QUANTIFIER = re.compile(r"\{(\d+)(?:(,)(\d*))?\}", re.ASCII)
HEX = {"x": re.compile(r"([0-9a-fA-F]{2})"), "u": re.compile(r"([0-9a-fA-F]{4})|\{([0-9a-fA-F]+)\}")}
LOW_HALF = re.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})")
PROPERTY = re.compile(r"\{(?:(General_Category|gc|Script|sc|Script_Extensions|scx)=)?(\w+)\}", re.ASCII)
NAME = re.compile(r"<[\w$]+>")
SYNTAX = "^$\\.*+?()[]{}|/"  # what may stand behind a backslash for itself
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
BINARY = {"ASCII": r"\x{0}-\x{7f}", "Any": r"\x{0}-\x{10ffff}"}  # the names of properties that Rust has not
MOST_BRANCHES = 64  # that anchors inside of groups may make
MOST_DEPTH = 100  # of groups in groups
MOST_SHOWN = 80  # characters of an expression


class Unheld(Exception):
    """The expression or schema cannot be enforced: the reason with a remedy, and the code of the refusal."""

    def __init__(self, why: str, remedy: str, code: str) -> None:
        super().__init__(f"{why}; {remedy}")
        self.code = code


@dataclass
class Node:
    """A part of an expression. `kind` is chars (`text`, in Rust), `^` or `$`, group (of `branches`) or repeat (of the
    node in them, with the quantifier `text`)."""

    kind: str
    text: str = ""
    branches: list[list["Node"]] = field(default_factory=list)
    empty: bool = False  # whether it may match the empty text


def whole_string(pattern: str) -> str:
    """An expression in Rust's syntax that matches exactly the strings, from end to end, in which `pattern` is found.

    Raises Unheld for one that cannot be written so, and says why."""
    branches = []
    for items in _flat(_Reader(pattern).read(), pattern):
        if (text := _anchored(items)) is not None:
            branches.append(text)
    if not branches:
        raise _refused(pattern, "nothing matches it: ^ stands behind something, or $ before it", "correct it")
    return f"(?:{'|'.join(branches)})"


def _refused(pattern: str, why: str, remedy: str = "leave it out") -> Unheld:
    code = "invalid_grammar" if remedy == "correct it" else "unsupported_keyword"
    return Unheld(f"pattern '{pattern[:MOST_SHOWN]}': {why}", remedy, code)


# ── anchors ──────────────────────────────────────────────────────────────────────────────────


def _flat(branches: list[list[Node]], pattern: str) -> Iterator[list[Node]]:
    """`branches` with the anchors inside of groups taken out of them."""
    count = 0
    for items in branches:
        parts = [list(_flat(item.branches, pattern)) if _holds_anchor(item, pattern) else [[item]] for item in items]
        for chosen in product(*parts):
            count += 1
            if count > MOST_BRANCHES:
                raise _refused(pattern, "it has too many ^ and $ in groups", "write it with fewer")
            yield [item for part in chosen for item in part]


def _holds_anchor(node: Node, pattern: str) -> bool:
    """Whether `node` is a group with an anchor in it. Refused is one that is repeated."""
    if node.kind not in ("group", "repeat"):
        return False
    inside = any(each.kind in "^$" or _holds_anchor(each, pattern) for items in node.branches for each in items)
    if inside and node.kind == "repeat":
        raise _refused(pattern, "^ or $ in a group that is repeated is not supported")
    return inside


def _anchored(items: list[Node]) -> str | None:
    """The whole string, of which `items` are a part; None if nothing matches.

    What stands before `^` or behind `$` can only be empty."""
    starts = [at for at, item in enumerate(items) if item.kind == "^"]
    ends = [at for at, item in enumerate(items) if item.kind == "$"]
    first = starts[-1] + 1 if starts else 0
    last = ends[0] if ends else len(items)
    outside = items[:first] + items[last:]
    if any(item.kind not in "^$" and not item.empty for item in outside):
        return None
    inside = "".join(_written(item) for item in items[first:last])
    return ("" if starts else ANYTHING) + inside + ("" if ends else ANYTHING)


def _written(node: Node) -> str:
    if node.kind == "chars":
        return node.text
    inner = "|".join("".join(map(_written, items)) for items in node.branches)
    return f"(?:{inner}){node.text}"


# ── reading ──────────────────────────────────────────────────────────────────────────────────


class _Reader:
    """Reads one expression from left to right."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0
        self._names: set[str] = set()  # of groups
        self._by_flag = not pattern.isascii() and max(pattern) > "\uffff"  # whether it means another thing without `u`
        self._without_flag = False  # whether the flag `u` forbids what is in it

    def read(self) -> list[list[Node]]:
        """The branches of the whole expression."""
        branches = self._branches()
        if self._at < len(self._pattern):
            self._wrong("unopened group: ')'")
        if self._by_flag and self._without_flag:
            self._wrong(
                "what the flag u forbids, as a bracket or a brace alone, stands beside what only u gives a meaning"
            )
        return branches

    def _refuse(self, why: str) -> NoReturn:
        raise _refused(self._pattern, why)

    def _wrong(self, why: str) -> NoReturn:
        raise _refused(self._pattern, why, "correct it")

    def _next(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self, text: str) -> bool:
        if self._pattern.startswith(text, self._at):
            self._at += len(text)
            return True
        return False

    def _branches(self) -> list[list[Node]]:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            self._refuse(f"groups are {self._depth} deep, and at most {MOST_DEPTH} are taken")
        branches: list[list[Node]] = [[]]
        while (character := self._next()) and character != ")":
            if self._take("|"):
                branches.append([])
            else:
                branches[-1].append(self._quantified(self._atom()))
        self._depth -= 1
        return branches

    def _quantified(self, node: Node) -> Node:
        found = QUANTIFIER.match(self._pattern, self._at)
        if found is None and (not self._next() or self._next() not in "*+?"):
            return node
        text = found[0] if found else self._next()
        self._at += len(text)
        if node.kind in "^$":
            self._wrong(f"nothing to repeat: '{node.kind}{text}'")
        if found and found[3] and int(found[3]) < int(found[1]):
            self._wrong(f"the numbers of a repetition are out of order: '{text}'")
        if found and max(int(found[1]), int(found[3] or 0)) > 1 << 31:
            self._wrong(f"a number is too large: {max(int(found[1]), int(found[3] or 0))}")
        self._take("?")  # lazy: the same strings
        if self._next() and self._next() in "*+?":
            self._wrong(f"nothing to repeat: '{self._next()}'")
        least = int(found[1]) if found else 0 if text in "*?" else 1
        return Node("repeat", text, [[node]], node.empty or not least)

    def _atom(self) -> Node:
        character = self._next()
        self._at += 1
        if character in "^$":
            return Node(character, empty=True)
        if character == ".":
            return Node("chars", f"[^{LINE_ENDS}]")
        if character == "(":
            return self._group()
        if character == "[":
            return self._class()
        if character == "\\":
            return Node("chars", f"[{self._escape(within=False)}]")
        if character in "*+?":
            self._wrong(f"nothing to repeat: '{character}'")
        if character == "{" and QUANTIFIER.match(self._pattern, self._at - 1):
            self._wrong(f"nothing to repeat: '{character}'")
        self._without_flag |= character in "{}]"
        return Node("chars", _letter(self._code(character)))

    def _group(self) -> Node:
        if self._take("?"):
            if self._take("=") or self._take("!") or self._take("<=") or self._take("<!"):
                at = self._pattern.rfind("(", 0, self._at)
                self._refuse(f"look-around is not supported: '{self._pattern[at : self._at]}'")
            if self._take("<"):
                named = NAME.match(self._pattern, self._at - 1)
                if named is None:
                    self._wrong("a group has a name that is none")
                if named[0] in self._names:
                    self._wrong(f"two groups have the name {named[0][:20]}")
                self._names.add(named[0])
                self._at = named.end()
            elif not self._take(":"):
                self._wrong(f"a group begins with '(?{self._next()}', which ECMA-262 has not")
        branches = self._branches()
        if not self._take(")"):
            self._wrong("unclosed group: '('")
        return Node("group", "", branches, any(all(item.empty for item in items) for items in branches))

    def _class(self) -> Node:
        """A set of characters. In Rust's, other signs mean something; here each is written by its number."""
        negated = self._take("^")
        parts: list[str] = []
        while not self._take("]"):
            if not self._next():
                self._wrong("unclosed character class: '['")
            first = self._member()
            if self._next() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._member()
                if isinstance(first, int) and isinstance(last, int):
                    if last < first:
                        self._wrong(f"a range in a character class is out of order: '{chr(first)}-{chr(last)}'")
                    parts.append(f"{_letter(first)}-{_letter(last)}")
                else:  # a set is no end of a range: the sign between is one of the characters
                    self._without_flag = True
                    parts += [_member_text(first), _letter(ord("-")), _member_text(last)]
                continue
            parts.append(_member_text(first))
        if not parts:
            return Node("chars", "(?s:.)" if negated else "[a&&b]")
        return Node("chars", f"[{'^' if negated else ''}{''.join(parts)}]")

    def _member(self) -> int | str:
        """One character of a class, or what a set is in Rust's."""
        character = self._next()
        self._at += 1
        if character != "\\":
            return self._code(character)
        text = self._escape(within=True)
        found = re.fullmatch(r"\\x\{([0-9a-f]+)\}|(\w)", text, re.ASCII)
        return text if found is None else int(found[1], 16) if found[1] else ord(found[2])

    def _escape(self, *, within: bool) -> str:
        """What a backslash means: a part of one of Rust's character classes, `within` one or alone."""
        character = self._next()
        self._at += 1
        if character == "":
            self._wrong("it ends with a backslash")
        if character.lower() in SETS:
            said = SETS[character.lower()]
            return said if character.islower() else f"[^{said}]"
        if character in "pP":
            return self._property(negated=character == "P")
        if character in CONTROLS:
            return _letter(CONTROLS[character])
        if character in HEX:
            return _letter(self._by_number(character))
        if character == "b" and within:
            return _letter(8)
        if character in "bB":
            self._refuse(rf"\{character}, which looks around, is not supported")
        if character == "c" and self._next() and self._next() in LETTERS[:52]:
            self._at += 1
            return _letter(ord(self._pattern[self._at - 1]) % 32)
        if character == "0" and not self._next().isdecimal():
            return _letter(0)
        if character.isascii() and character.isdecimal():
            self._refuse(rf"back references, and numbers behind a backslash, are not supported: '\{character}'")
        if character == "k":
            self._refuse(r"back references are not supported: '\k'")
        if character in LETTERS:
            self._wrong(rf"unrecognized escape sequence: '\{character}'")
        self._without_flag |= character not in SYNTAX and not (within and character == "-")
        return _letter(self._code(character))

    def _by_number(self, kind: str) -> int:
        found = HEX[kind].match(self._pattern, self._at)
        if found is None:
            self._wrong(rf"unrecognized escape sequence: '\{kind}{self._next()}'")
        self._at = found.end()
        code = int(next(filter(None, found.groups())), 16)
        self._by_flag |= found[0].startswith("{") or 0xD800 <= code < 0xE000
        if kind == "u" and found[1] and 0xD800 <= code < 0xDC00:
            low = LOW_HALF.match(self._pattern, self._at)
            if low:
                self._at = low.end()
                code = 0x10000 + ((code - 0xD800) << 10) + (int(low[1], 16) - 0xDC00)
        if code > LAST or 0xD800 <= code < 0xE000:
            self._wrong(rf"no character has the number of '\{kind}{found[0]}'")
        return code

    def _property(self, *, negated: bool) -> str:
        found = PROPERTY.match(self._pattern, self._at)
        self._by_flag = True
        if found is None:
            self._wrong(r"\p is not followed by the name of a property, as in \p{Letter}")
        self._at = found.end()
        if found[1] is None and found[2] in BINARY:
            said = BINARY[found[2]]
            return f"[^{said}]" if negated else said
        return rf"\{'P' if negated else 'p'}{found[0]}"

    def _code(self, character: str) -> int:
        code = ord(character)
        if 0xD800 <= code < 0xE000:
            self._wrong("it holds half of a surrogate pair")
        return code


def _member_text(member: int | str) -> str:
    return _letter(member) if isinstance(member, int) else member


def _letter(code: int) -> str:
    """A character as such, or by its number."""
    return chr(code) if code < 128 and chr(code) in LETTERS else rf"\x{{{code:x}}}"
