"""What a reply must be, as one `Grammar`, made and checked once: where a request comes in.

HTTP clients ask for one in many fields (`GrammarFields`, with a table of each API's own), programs and the command line
in the keywords of `GrammarKeywords`. JSON is decoded and walked once. Whether a grammar compiles is found out where it
is compiled.
"""

from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, StructMeta

from engine.errors import RequestError, Words, shown
from engine.params.lengths import check_unicode

MAX_GRAMMAR = 1 << 19  # characters
MAX_CHOICES = 1024
MAX_NESTING = 200  # JSON that nests deeper cannot be walked everywhere: Python bounds recursion
GrammarKind = Literal["json_object", "json_schema", "regex", "ebnf", "lark", "choice", "structural_tag"]
JSON_KINDS = ("json_schema", "choice", "structural_tag")


class Grammar(Struct, frozen=True, array_like=True):
    """What a reply must be. Two that are equal are compiled once, so `source` is text whatever the kind: JSON for a
    schema, a structural tag and a choice (a list of strings), nothing for json_object.

    With `after` the reply is free until that text has come (the end of the reasoning), and the grammar begins behind
    it. `strict`, of a schema: no property and no item that it does not name. `beside` is the client's own grammar
    where this one combines it with a tool grammar, so that an error can name the right field. `tools` are their
    names, in the order of their schemas in `source`.
    """

    kind: GrammarKind
    source: str = ""
    after: str = ""
    strict: bool = True
    beside: "Grammar | None" = None
    tools: tuple[str, ...] = ()


class GrammarKeywords(Struct, frozen=True, kw_only=True):
    """The keywords and flags that ask for a grammar, one at most; each is named as its kind."""

    json_object: Annotated[bool, Meta(description="the reply is a JSON object")] = False
    json_schema: Annotated[str | None, Meta(description="the reply is JSON of this JSON schema")] = None
    regex: Annotated[str | None, Meta(description="the reply matches this regular expression, from end to end")] = None
    ebnf: Annotated[str | None, Meta(description="the reply is of this grammar, in EBNF (GBNF), from `root`")] = None
    lark: Annotated[str | None, Meta(description="the reply is of this grammar, in Lark's syntax, from `start`")] = None
    choice: Annotated[tuple[str, ...], Meta(description="a text that the reply may be; it is one of them")] = ()
    structural_tag: Annotated[str | None, Meta(description="which parts of the reply have a grammar, as JSON")] = None
    strict_schema: Annotated[
        bool, Meta(description="the reply has no property that the JSON schema does not name, though it may allow them")
    ] = True


KINDS: tuple[GrammarKind, ...] = (
    "json_object",
    "json_schema",
    "regex",
    "ebnf",
    "lark",
    "choice",
    "structural_tag",
)


# ── one grammar ──────────────────────────────────────────────────────────────────────────────


def made(kind: GrammarKind, value: Any, *, strict: bool = True) -> Grammar:
    """The grammar of `kind` whose source is `value`: text, or for the kinds that are JSON its decoded value too.

    Raises RequestError, which names the field by its kind, for what text alone shows to be wrong."""
    if kind == "json_object":
        return Grammar(kind)
    if kind == "choice":
        return Grammar(kind, _choice(value))
    if kind in JSON_KINDS:
        return Grammar(kind, _json(kind, value), strict=strict)
    _check_text(kind, value)
    return Grammar(kind, value, strict=strict)


def from_keywords(options: Mapping[str, Any]) -> Grammar | None:
    """The grammar that keywords of GrammarKeywords ask for. Raises RequestError, for two of them as well."""
    given = [kind for kind in KINDS if options.get(kind) not in (None, False, ())]
    for switch in ("json_object", "strict_schema"):
        if not isinstance(value := options.get(switch, True), bool):
            message = f"{{{switch}}} is {{given}}; it must be true or false (leave it out for the default)"
            raise RequestError(message, param=switch, facts={"given": shown(value)})
    if not given:
        return None
    if len(given) > 1:
        raise RequestError(_only_one([f"{{{kind}}}" for kind in given]), param=given[1], facts={})
    kind = given[0]
    if kind not in ("json_object", "choice") and not isinstance(options[kind], str):
        message = f"{{{kind}}} is a {{type}}; send it as text (json.dumps(...))"
        raise RequestError(message, param=kind, facts={"type": type(options[kind]).__name__})
    return made(kind, options[kind], strict=options.get("strict_schema", True))


KEYWORDS = frozenset(GrammarKeywords.__struct_fields__)


class TakesGrammar(StructMeta):
    """Of a struct with a field `grammar`: lets it take the keywords of GrammarKeywords in its place."""

    def __call__(cls, **fields: Any) -> Any:
        if KEYWORDS.isdisjoint(fields):
            return super().__call__(**fields)
        options = {name: fields.pop(name) for name in KEYWORDS & fields.keys()}
        if (grammar := from_keywords(options)) is not None:
            if fields.get("grammar") is not None:
                message = f"grammar and {{{grammar.kind}}} are given, and a reply can be only one of them"
                raise RequestError(message, param=grammar.kind, facts={})
            fields["grammar"] = grammar
        return super().__call__(**fields)


def keywords_of(grammar: Grammar | None) -> dict[str, Any]:
    """The keywords of GrammarKeywords that ask for `grammar`, one that `from_keywords` made."""
    if grammar is None:
        return {}
    strict = {} if grammar.strict else {"strict_schema": False}
    match grammar.kind:
        case "json_object":
            return {"json_object": True}
        case "choice":
            return {"choice": msgspec.json.decode(grammar.source, type=tuple[str, ...])}
    return {grammar.kind: grammar.source, **strict}


def _choice(texts: Any) -> str:
    """The source of a reply that is one of `texts`."""
    if isinstance(texts, list | tuple) and not texts:
        raise RequestError("{choice} is empty; offer at least one text, or leave it out", param="choice", facts={})
    if not isinstance(texts, list | tuple) or len(texts) > MAX_CHOICES:
        message = "{choice} must be a list of 1 to {most} strings"
        raise RequestError(message, param="choice", facts={"most": MAX_CHOICES})
    if not all(isinstance(text, str) and text for text in texts):
        raise RequestError("{choice} must hold strings, none of them empty", param="choice", facts={})
    for text in texts:
        check_unicode(text, "choice")
    source = msgspec.json.encode(list(texts)).decode()
    _check_size("choice", source)
    return source


def _json(kind: GrammarKind, value: Any) -> str:
    """The source of a schema or a structural tag. It is decoded, if it comes as text, and walked once."""
    source, decoded = "", value
    if isinstance(value, str):
        source = value
        _check_size(kind, source)
        try:
            decoded = msgspec.json.decode(source)
        except UnicodeEncodeError:
            check_unicode(source, kind)
        except (msgspec.DecodeError, RecursionError) as error:
            message = f"{{{kind}}} is no JSON: {{error}}; correct it"
            raise RequestError(message, param=kind, facts={"error": str(error)}) from None
    if nests_deeply(decoded):
        message = f"{{{kind}}} nests deeper than {MAX_NESTING} levels; flatten it"
        raise RequestError(message, param=kind, facts={})
    if not source:
        source = msgspec.json.encode(decoded).decode()
        _check_size(kind, source)
    wanted = dict | bool if kind == "json_schema" else dict
    if not isinstance(decoded, wanted):
        takes = (
            "a JSON schema is an object, true or false" if kind == "json_schema" else "a structural tag is an object"
        )
        raise RequestError(f"{{{kind}}} is {{given}}; {takes}", param=kind, facts={"given": source[:80]})
    return source


def _check_text(kind: GrammarKind, source: str) -> None:
    _check_size(kind, source)
    check_unicode(source, kind)


def _check_size(kind: GrammarKind, source: str) -> None:
    if len(source) > MAX_GRAMMAR:
        message = f"{{{kind}}} has {{size}} characters, and at most {MAX_GRAMMAR} are taken; send less"
        raise RequestError(message, param=kind, facts={"size": len(source)})


def check_nesting(value: Any, name: str) -> None:
    """Raise RequestError when JSON that the client calls `name` nests too deeply."""
    if nests_deeply(value):
        raise RequestError(f"{name} nests deeper than {MAX_NESTING} levels; flatten it", param=name)


def nests_deeply(value: Any) -> bool:
    """Whether JSON nests deeper than MAX_NESTING levels."""
    level = [value]
    for _ in range(MAX_NESTING):
        lists = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [inner for each in lists for inner in each]
        if not level:
            return False
    return True


# ── from the fields of an API ────────────────────────────────────────────────────────────────


class Ask(Struct, frozen=True):
    """How a value asks for a grammar: of which `kind`, and what `source` and `strict` find in the value. Without
    `source` the value is it; a `kind` that depends on the value is a function of it. `place` is where in the value an
    error about the source points."""

    kind: GrammarKind | Callable[[Any], GrammarKind]
    source: Callable[[Any], Any] | None = None
    strict: Callable[[Any], bool | None] | None = None
    place: str = ""


Asking = Ask | Mapping[Any, Ask]  # by the type of the value, or by the name of a field inside it


class GrammarFields:
    """The fields of one API's bodies that may ask for a grammar: each with how it asks, by its name."""

    def __init__(self, fields: Mapping[str, Asking]) -> None:
        self._fields = fields
        get = attrgetter(*fields)
        self._values = get if len(fields) > 1 else lambda body: (get(body),)

    def asked(self, body: Any, path: str = "") -> tuple[Grammar | None, str]:
        """The grammar that `body` asks for, and what its client, who has the body under `path`, calls it.

        Raises RequestError for one that is wrong, and where two are given that differ."""
        values = self._values(body)
        if values.count(None) == len(values):
            return None, ""
        given = list(self._given(values, path))
        if not given:
            return None, ""
        name, kind, value, strict, place = given[0]
        if any(not _same(given[0], other) for other in given[1:]):
            raise RequestError(_only_one([one[0] for one in given]), param=given[1][0])
        if (strictly := getattr(body, "strict_schema", None)) is not None:
            strict = strictly
        try:
            return made(kind, value, strict=strict), name
        except RequestError as error:
            raise error.worded(Words({kind: name + place})) from None

    def _given(self, values: tuple[Any, ...], path: str) -> Iterator["Given"]:
        for (name, asking), value in zip(self._fields.items(), values, strict=True):
            if value is not None:
                yield from _read(asking, value, path + name)


# What the client calls it, its kind, its source, whether it is strict, and where in it the source stands.
Given = tuple[str, GrammarKind, Any, bool, str]


def _read(asking: Asking, value: Any, name: str) -> Iterator[Given]:
    match asking:
        case Ask(kind, source, strict, place):
            kind = kind if isinstance(kind, str) else kind(value)
            found = value if source is None else source(value)
            if kind != "json_object" or found is not False:
                yield name, kind, found, strict is None or strict(value) is not False, place
        case Mapping() if (ask := asking.get(type(value))) is not None:
            yield from _read(ask, value, name)
        case Mapping():
            for inner, ask in asking.items():
                if isinstance(inner, str) and (each := getattr(value, inner)) is not None:
                    yield from _read(ask, each, f"{name}.{inner}")


def _same(one: Given, other: Given) -> bool:
    """Whether two fields ask for the same; a schema is the same however it is written."""
    if (one[1], one[3]) != (other[1], other[3]):
        return False
    return bool(one[2] == other[2]) or (one[1] in JSON_KINDS and _decoded(one[2]) == _decoded(other[2]) is not None)


def _decoded(source: Any) -> Any:
    try:
        return msgspec.json.decode(source) if isinstance(source, str) else source
    except (msgspec.DecodeError, RecursionError):  # it is refused later, by its name
        return None


def _only_one(names: list[str]) -> str:
    return f"{' and '.join(names)} are given, and a reply can be only one of them"
