"""Translates structural tags, as XGrammar defines them, into a grammar in llguidance's Lark.

A tag describes the text between two marks, and a trigger is the text that begins a tag; text outside of tags is free.
Free text is one lazy lexeme that ends with the first trigger. A special token, which no text can spell, is written by
its id wherever its name stands in a literal. Left out, and refused by name: styles other than JSON, dispatch, counts
of tokens or characters.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from engine.plugin import RequestError
from engine_plugins.grammars.llguidance.refusals import ASCII

ANY = "(?s:.*)"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Of EBNF: comments and classes, in which a quote begins nothing, and literals.
EBNF_PARTS = re.compile(r'#[^\r\n]*|\[(?:[^\]\\]|\\.)*\]|"(?:[^"\\]|\\.)*"', re.DOTALL)

# Of those, one character.
EBNF_CHARACTER = re.compile(
    r"\\(?:x(?P<two>[0-9a-fA-F]{2})|u(?P<four>[0-9a-fA-F]{4})|U(?P<eight>[0-9a-fA-F]{8})|.)|.", re.DOTALL
)
EBNF_ESCAPED = '"\\[]-^/'  # each stands for itself behind a backslash


def to_lark(tag: Mapping[str, Any], special: Mapping[str, int], schema: Callable[[Any], str]) -> str:
    """`tag` is {"type": "structural_tag", "format": ...}; `special` are the special tokens' ids by name, `schema`
    writes a JSON schema.

    Raises RequestError for a tag that is malformed or cannot be expressed."""
    if tag.get("type") != "structural_tag" or not isinstance(tag.get("format"), dict):
        raise _refuse('it must be {"type": "structural_tag", "format": {...}}')
    writer = _Writer(special, schema)
    start = writer.expression(tag["format"])
    return "\n".join([f"start: {start}", *writer.rules])


def _refuse(why: str) -> RequestError:
    return RequestError(f"the structural_tag cannot be used: {why}; correct it", code="invalid_grammar")


def _beyond(why: str) -> RequestError:
    """The refusal of a tag that another engine may take."""
    message = f"the structural_tag cannot be used: {why}; write it otherwise, or pip install xgrammar"
    return RequestError(message, code="unsupported_grammar")


class _Writer:
    """Rules as they are needed; `expression` is what stands for a format in the rule around it."""

    def __init__(self, special: Mapping[str, int], schema: Callable[[Any], str]) -> None:
        self.rules: list[str] = []
        self._write_schema = schema
        self._special = special
        names = sorted(special, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names))) if names else None
        self._kinds: dict[str, Callable[[Mapping[str, Any]], str]] = {
            "const_string": lambda format: self.literal(self._field(format, "value", str)),
            "json_schema": self._schema,
            "any_text": self._text,
            "grammar": self._grammar,
            "regex": lambda format: self._lexeme(regex_to_lark(self._field(format, "pattern", str), ASCII)),
            "token": lambda format: self._token(format.get("token")),
            "sequence": lambda format: self._sequence(self._field(format, "elements", list)),
            "or": self._or,
            "tag": lambda format: self._tag(format),
            "optional": lambda format: f"({self.expression(self._field(format, 'content', dict))})?",
            "plus": lambda format: f"({self.expression(self._field(format, 'content', dict))})+",
            "star": lambda format: f"({self.expression(self._field(format, 'content', dict))})*",
            "repeat": self._repeat,
            "triggered_tags": self._triggered,
            "tags_with_separator": self._separated,
        }

    # ── pieces ───────────────────────────────────────────────────────────────────────────────

    def expression(self, format: Any) -> str:
        kind = format.get("type") if isinstance(format, dict) else None
        if not isinstance(kind, str) or kind not in self._kinds:
            raise _beyond(f"a format has the type {kind!r}; of these, llguidance takes {', '.join(self._kinds)}")
        return self._kinds[kind](format)

    def literal(self, text: str) -> str:
        """`text`, with the special tokens in it by their ids."""
        parts: list[str] = []
        at = 0
        for found in self._names.finditer(text) if self._names else ():
            parts += [quoted(text[at : found.start()]), f"<[{self._special[found[0]]}]>"]
            at = found.end()
        parts.append(quoted(text[at:]))
        return " ".join(part for part in parts if part) or '""'

    def rule(self, body: str, attribute: str = "") -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{attribute}: {body}")
        return name

    def _lexeme(self, pattern: str) -> str:
        return self.rule(f"/{pattern}/")

    def _until(self, ends: list[str]) -> str:
        """Free text up to and with the first of `ends`."""
        specials = [end for end in ends if end in self._special]
        if specials and len(specials) == len(ends):
            return f"({self._lexeme(ANY)} ({' | '.join(map(self.literal, ends))}))"
        if specials or any(self._names and self._names.search(end) for end in ends):
            raise _beyond(f"free text is to end with {ends}, which holds a special token beside text; end it with one")
        if not all(ends):
            raise _refuse("free text is to end with an empty text, and so would be none")
        return self.rule(f"/{ANY}({'|'.join(map(_escaped, ends))})/", "[lazy]")

    def _field(self, format: Mapping[str, Any], name: str, kind: Any) -> Any:
        value = format.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _refuse(f"{name} of a {format.get('type')} is {json.dumps(value)[:80]}, not a {_called(kind)}")
        return value

    def _list(self, format: Mapping[str, Any], name: str, kind: Any) -> list[Any]:
        """A list that is not empty, of one kind."""
        values: list[Any] = self._field(format, name, list)
        if not values or not all(isinstance(value, kind) for value in values):
            shown = json.dumps(values)[:80]
            raise _refuse(f"{name} of a {format['type']} is {shown}; it is a list of {_called(kind)}s, one at least")
        return values

    # ── formats ──────────────────────────────────────────────────────────────────────────────

    def _schema(self, format: Mapping[str, Any]) -> str:
        if format.get("style", "json") != "json":
            raise _beyond(f"the style {format['style']!r} of a json_schema is not supported; only json is")
        schema = format.get("json_schema", True)
        if not isinstance(schema, dict | bool):
            raise _refuse(f"json_schema is {json.dumps(schema)[:80]}, not a schema")
        return self.rule(self._write_schema(schema))

    def _text(self, format: Mapping[str, Any]) -> str:
        for name in ("excludes", "max_tokens", "max_chars"):
            if format.get(name):
                raise _beyond(f"{name} of an any_text cannot be enforced")
        return self._lexeme(ANY)

    def _grammar(self, format: Mapping[str, Any]) -> str:
        source = self._field(format, "grammar", str)
        try:
            return self.rule(f"%lark {{\n{ebnf_to_lark(source)}\n}}")
        except Exception as error:  # it raises bare ones
            raise _beyond(f"its grammar: {error}") from None

    def _token(self, token: Any) -> str:
        id = self._special.get(token, -1) if isinstance(token, str) else token
        if not isinstance(id, int) or isinstance(id, bool) or id < 0:
            raise _refuse(f"{token!r} is no special token of this model")
        return f"<[{id}]>"

    def _or(self, format: Mapping[str, Any]) -> str:
        return "(" + " | ".join(map(self.expression, self._list(format, "elements", dict))) + ")"

    def _repeat(self, format: Mapping[str, Any]) -> str:
        least, most = self._field(format, "min", int), self._field(format, "max", int)
        content = self.expression(self._field(format, "content", dict))
        return f"({content}){{{least},{'' if most < 0 else most}}}"

    def _sequence(self, elements: list[Any]) -> str:
        """Free text inside of a sequence ends with the literal that follows it."""
        parts: list[str] = []
        rest = list(elements)
        while rest:
            element = rest.pop(0)
            if rest and isinstance(element, dict) and element.get("type") == "any_text":
                after = rest.pop(0)
                if not isinstance(after, dict) or after.get("type") != "const_string":
                    raise _beyond("an any_text inside of a sequence must be followed by a const_string, which ends it")
                parts.append(self._until([self._field(after, "value", str)]))
            else:
                parts.append(self.expression(element))
        return "(" + " ".join(parts or ['""']) + ")"

    def _tag(self, format: Mapping[str, Any], skip: int = 0) -> str:
        """All of a tag but the first `skip` characters of its begin."""
        begin, end = format.get("begin"), format.get("end", "")
        opening = self.literal(begin[skip:]) if isinstance(begin, str) else self.expression(begin)
        content = self._field(format, "content", dict)
        ends = self._list(format, "end", str | dict) if isinstance(end, list) else [end]
        if content.get("type") == "any_text" and all(isinstance(each, str) for each in ends):
            return f"({opening} {self._until(ends)})"
        closing = " | ".join(self.literal(each) if isinstance(each, str) else self.expression(each) for each in ends)
        return f"({opening} {self.expression(content)} ({closing}))"

    def _triggered(self, format: Mapping[str, Any]) -> str:
        """( free text, trigger, rest of one of its tags )*, free text."""
        if format.get("excludes"):
            raise _beyond("excludes of triggered_tags cannot be enforced")
        triggers, tags = self._list(format, "triggers", str), self._list(format, "tags", dict)
        groups: list[str] = []
        whole: list[str] = []
        for trigger in triggers:
            mine = [tag for tag in tags if str(tag.get("begin", "")).startswith(trigger)]
            if mine:
                rests = " | ".join(self._tag(tag, len(trigger)) for tag in mine)
                groups.append(f"{self._until([trigger])} ({rests})")
                whole += [self._tag(tag) for tag in mine]
        if len(whole) != len(tags):
            raise _refuse(f"each of triggered_tags' {len(tags)} tags must begin with exactly one trigger")
        called, text, one = self.rule(" | ".join(groups)), self._lexeme(ANY), f"({' | '.join(whole)})"
        if format.get("stop_after_first"):
            return one if format.get("at_least_one") else f"({called} | {text})"
        return f"({one + ' ' if format.get('at_least_one') else ''}{called}* {text})"

    def _separated(self, format: Mapping[str, Any]) -> str:
        tag = self.rule(" | ".join(map(self._tag, self._list(format, "tags", dict))))
        separator = self.literal(self._field(format, "separator", str))
        several = tag if format.get("stop_after_first") else f"{tag} ({separator} {tag})*"
        return f"({several})" if format.get("at_least_one") else f"({several})?"


def _called(kind: Any) -> str:
    """What JSON calls it."""
    return {str: "string", list: "list", int: "whole number", dict: "object"}.get(kind, "text or object")


def quoted(text: str) -> str:
    """`text` as a literal."""
    return _plain(json.dumps(text, ensure_ascii=False)) if text else ""


def ebnf_to_lark(source: str) -> str:
    """A grammar in GBNF. Raises a bare Exception, as the library does.

    The library confuses some escapes, and reads a class as Rust's, where `&&`, `--` and `~~` mean something. So each
    character is written in the one way that every reader understands alike."""

    def plain(found: re.Match[str]) -> str:
        part = found[0]
        if part.startswith("#"):
            return part
        return f'"{EBNF_CHARACTER.sub(_in_literal, part[1:-1])}"' if part.startswith('"') else _class(part)

    lark: str = gbnf_to_lark(EBNF_PARTS.sub(plain, source))
    return lark


def _character(found: re.Match[str]) -> str | None:
    """The value of one character of a GBNF text; None for an invalid escape, which the library refuses."""
    text = found[0]
    if number := found["two"] or found["four"] or found["eight"]:
        code = int(number, 16)
        return chr(code) if code < 0xD800 or 0xE000 <= code <= 0x10FFFF else None
    if text.startswith("\\"):
        return {"n": "\n", "r": "\r", "t": "\t"}.get(text[1:], text[1:] if text[1:] in EBNF_ESCAPED else None)
    return text


def _in_literal(found: re.Match[str]) -> str:
    character = _character(found)
    if character is None:
        return found[0]
    return f"\\{character}" if character in '"\\' else _plain(character)


def _class(text: str) -> str:
    """A class of characters, as the library and Rust read it."""
    negated = text.startswith("[^")
    parts = list(EBNF_CHARACTER.finditer(text[2 if negated else 1 : -1]))
    written: list[str] = []
    at = 0
    while at < len(parts):
        ends = [at]
        if at + 2 < len(parts) and parts[at + 1][0] == "-":
            ends.append(at + 2)
        written.append("-".join(_in_class(parts[end]) for end in ends))
        at = ends[-1] + 1
    return f"[{'^' if negated else ''}{''.join(written)}]"


def _in_class(found: re.Match[str]) -> str:
    character = _character(found)
    if character is None:
        return found[0]
    if character in "\\[]":
        return f"\\{character}"
    return f"\\x{ord(character):02x}" if character in "^-&~" else _plain(character)


def _plain(literal: str) -> str:
    """A literal with control characters written as such, which Lark takes in no other way."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", literal)


def _escaped(text: str) -> str:
    """`text` inside of /.../, to be taken as it is."""
    return (
        re.sub(r"([\\.+*?()|\[\]{}^$/])", r"\\\1", text).replace("\n", r"\n").replace("\t", r"\t").replace("\r", r"\r")
    )
