"""Calls as Llama 4 writes them: a list of Python calls with literal arguments, at the beginning of the reply.

A call is reported as a whole. Text that is not a call of an offered tool with literal arguments is content. A list of
JSON objects, as in a forced reply, is read too. Left out: positional arguments, variables, nested calls.
"""

import ast
import json
import re
from typing import Any

from engine.plugin.parsing import Steps, ToolParser

MARKS = ("<|python_start|>", "<|python_tag|>")
END = "<|python_end|>"
NAME = re.compile(r"[\w.-]*")
MARK = re.compile(r"""[()\[\]{}"'\\]""")
CLOSING = {"(": ")", "[": "]", "{": "}"}
WORDS = {"true": True, "false": False, "null": None}


class Pythonic(ToolParser):
    special = (*MARKS, END)

    def read(self) -> Steps[None]:
        """One list of calls, then text."""
        yield from self.space()
        yield from self.literal(*MARKS)
        yield from self.space()
        if (yield from self.call_list(known=True)):
            yield from self.mark(END)
            self.drop()
            return
        if not (yield from self.literal("[")):
            return
        called = False
        while (yield from self._python_call()):
            called = True
            yield from self.space()
            if (yield from self.literal("]")):
                yield from self.mark(END)
                self.drop()
                return
            if not (yield from self.literal(",")):
                break
        if called:
            self.back()

    def _python_call(self) -> Steps[bool]:
        yield from self.space()
        name = yield from self.word(NAME)
        start = self._at
        if name not in self.names or not (yield from self._brackets()):
            return False
        arguments = json_of(self._text[start : self._at])
        if arguments is None:
            return False
        self.begin(name)
        self.tell_arguments(arguments)
        self.close()
        return True

    def _brackets(self) -> Steps[bool]:
        """Pass over a pair of round brackets and what is between them."""
        if (yield from self.peek()) != "(":
            return False
        closing: list[str] = []
        quote = ""
        while True:
            mark = MARK.search(self._text, self._at)
            wanted = len(self._text) if mark is None else mark.end() + (mark[0] == "\\")
            if mark is None or wanted > len(self._text):
                self._at = len(self._text) if mark is None else mark.start()
                if not (yield from self.more()):
                    return False
                continue
            self._at = wanted
            if quote or mark[0] in "\"'":
                quote = "" if mark[0] == quote else quote or mark[0]
            elif mark[0] in CLOSING:
                closing.append(CLOSING[mark[0]])
            elif not closing or mark[0] != closing.pop():
                return False
            elif not closing:
                return True


def json_of(arguments: str) -> str | None:
    """The arguments of a Python call, "(a=1)", as a JSON object; None unless they are literals by name."""
    try:
        call = ast.parse(f"f{arguments}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        named = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
        if None in named or len(named) < len(call.keywords):
            return None
        text = json.dumps(named, ensure_ascii=False, allow_nan=False)
        text.encode()
        return text
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> Any:
    """The value of a literal; JSON's words for true, false and null are accepted as well. Raises ValueError for
    others."""
    match node:
        case ast.Constant(value=str() | bool() | int() | float() | None):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _literal(value) for key, value in zip(keys, values, strict=True)}
        case ast.Name(id=word) if word in WORDS:
            return WORDS[word]
    raise ValueError("no literal")


def _key(node: ast.expr | None) -> str:
    match node:
        case ast.Constant(value=str() as key):
            return key
    raise ValueError("no string as key")
