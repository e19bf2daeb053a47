"""`pattern` and `format` of JSON schemas: which strings are let through. A pattern is ECMA-262's, found anywhere."""

import json

import pytest
from schema_pairs import suite

from engine.errors import RequestError
from engine.params.grammar import Grammar
from engine.plugin.specs import GrammarEngine

# As Node 20 has it with the flag u, or without where that does not take the expression: patterns, what they are found
# in, and what they are not found in.
PATTERNS: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("^a|b$", ("a", "ax", "b", "xb"), ("xa", "bx", "")),
    ("[a[b]c]", ("ac]", "xbc]y", "[c]"), ("ac", "abc", "a")),
    ("^[a&&b]$", ("a", "b", "&"), ("", "c", "ab")),
    ("^[^a&&b]$", ("c", "é", "日"), ("a", "b", "&")),
    ("^[+--]$", ("+", ",", "-"), (".", "*")),
    ("^[^--/]$", ("0", ","), ("-", ".", "/")),
    ("^[~~a]$", ("~", "a"), ("b",)),
    ("^[^[]$", ("a", "]"), ("[", "")),
    ("^[]$", (), ("", "a")),
    ("^[^]$", ("a", "\n", "😀"), ("", "ab")),
    ("^.$", ("a", "\x00", "\x85", "😀"), ("\n", "\r", "\u2028", "\u2029", "")),
    (r"^\s$", (" ", "\t", "\x0b", "\xa0", "\ufeff", "\u2028"), ("a", "\x85", "\u200b")),
    (r"^\S$", ("a", "\x85", "\u200b"), (" ", "\ufeff", "\n")),
    (r"^\d$", ("5",), ("٥", "a")),
    (r"^\w\W$", ("a-", "_é"), ("éa", "ab")),
    (r"^[\b]$", ("\b",), ("b",)),
    (r"^[\w-]+$", ("a-b", "_"), ("a b", "")),
    (r"^[\w-.]$", ("-", ".", "a"), (",",)),
    (r"^[^\W\d]$", ("a", "_"), ("1", "-")),
    (r"^\cJ\x41\u0042\u{43}\0$", ("\nABC\0",), ("JABC0",)),
    (r"^\uD83D\uDE00$", ("😀",), ("😁",)),
    (r"^\/\-\.\{\}$", ("/-.{}",), ("/--{}",)),
    (r"^\u{1F600}[\-a]$", ("😀-", "😀a"), ("😀b",)),
    (r"^\p{L}\P{Lu}\p{Script=Greek}$", ("éaα", "日1β"), ("1aα", "aAα", "aaa")),
    ("^(?<year>[0-9]{4})-(?:0[1-9]|1[0-2])$", ("2024-12",), ("2024-13", "x2024-12")),
    ("(^a|b)c(d|e$)", ("acd", "xbcdx", "bce"), ("xacd", "bcex")),
    ("a*^b", ("b", "bx"), ("ab", "xb")),
    ("^^a$$", ("a",), ("aa",)),
    ("x^y|z", ("z", "xz"), ("xy", "")),
    ("^a{2,3}?$", ("aa", "aaa"), ("a", "aaaa")),
    ("^a{,2}{$", ("a{,2}{",), ("aa{", "a")),
    ("", ("", "a\n"), ()),
    ("^$", ("",), ("a",)),
    ("(^|,)a(,|$)", ("a", "b,a", "a,b", "x,a,"), ("ba", "ab")),
    ("😀+$", ("😀", "x😀😀"), ("😀x",)),
]
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "date": (
        ("2024-02-29", "2000-02-29", "2023-12-31"),
        ("2023-02-29", "1900-02-29", "2024-04-31", "2024-2-29", "2024-13-01"),
    ),
    "time": (
        ("00:00:00Z", "23:59:59.5+23:59", "12:00:00z"),
        ("24:00:00Z", "12:00:00", "12:60:00Z", "23:59:60Z", "1:00:00Z"),
    ),
    "date-time": (
        ("2024-02-29T12:00:00Z", "2024-02-29t12:00:00.25-08:00"),
        ("2023-02-29T12:00:00Z", "2024-02-29 12:00:00Z"),
    ),
    "duration": (("P1Y2M3DT4H5M6S", "PT0S", "P4W"), ("P", "PT", "P1Y1D", "P1W2D", "PT1D", "P1")),
    "email": (
        ("a@b.c", "a.b+c@x-y.org", f"{'a' * 64}@b.c", "a@[127.0.0.1]"),
        ("a@", "@b", "a..b@c", ".a@b", f"{'a' * 65}@b.c", "a@b@c", "a@-b", f"a@{'b' * 64}.c", "a@[1.2.3]"),
    ),
    "hostname": (
        ("a", "a.b", "a-b.c", "x1.example", "a" * 63, ".".join(["a" * 63] * 3 + ["b" * 61])),
        ("", ".", "a.", "-a", "a-", "ab--c", "xn--a", "a_b", "a" * 64, ".".join(["a" * 63] * 4)),
    ),
    "ipv4": (("0.0.0.0", "255.10.1.99"), ("256.0.0.1", "01.2.3.4", "1.2.3", "1.2.3.4.5")),
    "ipv6": (
        ("::", "::1", "1:2:3:4:5:6:7:8", "::ffff:1.2.3.4", "1::8"),
        (":", "1:2:3:4:5:6:7", "1::2::3", "12345::", "::1.2.3"),
    ),
    "uuid": (
        ("12345678-1234-1234-1234-123456789aBc",),
        ("12345678123412341234123456789abc", "12345678-1234-1234-1234-12345678zzzz"),
    ),
    "uri": (("http://a", "urn:x:y", "ftp://u@[::1]:8/p?q#f"), ("//a", "a b:c", "http://[::1", "http://a b", r"a:\b")),
    "uri-reference": (("", "//a/b", "a?b", "#c", "x:y", "a:b"), ("a b", "\\", "#a\\")),
    "iri": (("http://é/ü?ñ#日",), ("/é", "é")),
    "iri-reference": (("é", "#ƒ"), ("#ƒ\\",)),
    "json-pointer": (("", "/a", "/~0~1", "/é/0"), ("a", "/~", "/~2")),
    "relative-json-pointer": (("0", "1#", "12/a"), ("01", "/a", "-1", "0##")),
    "uri-template": (("a/{b}", "{+x,y*}{?q:3}"), ("{", "a/{b", "{b:0}", "a b")),
    "colour": (("anything",), ()),
}


@pytest.fixture(scope="module")
def engine() -> GrammarEngine:
    pytest.importorskip("llguidance")
    made: GrammarEngine = suite.made("llguidance")
    return made


def taken(engine: GrammarEngine, schema: dict[str, object], text: str) -> bool:
    """Whether a reply may be the string `text`; of a schema that no string fits, none may."""
    try:
        compiled = engine.compile(Grammar("json_schema", json.dumps(schema)))
    except RequestError as error:
        assert "Unsatisfiable" in error.message, error
        return False
    found: bool = suite.follows(engine, compiled, json.dumps(text, ensure_ascii=False))
    return found


@pytest.mark.parametrize(("pattern", "found", "not_found"), PATTERNS, ids=str)
def test_what_a_pattern_is_found_in(
    engine: GrammarEngine, pattern: str, found: tuple[str, ...], not_found: tuple[str, ...]
) -> None:
    schema = {"type": "string", "pattern": pattern}
    assert [text for text in found if not taken(engine, schema, text)] == []
    assert [text for text in not_found if taken(engine, schema, text)] == []


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_of_a_format(engine: GrammarEngine, name: str) -> None:
    right, wrong = FORMATS[name]
    schema = {"type": "string", "format": name}
    assert [text for text in right if not taken(engine, schema, text)] == []
    assert [text for text in wrong if taken(engine, schema, text)] == []


def test_a_format_beside_a_pattern_and_a_length(engine: GrammarEngine) -> None:
    schema = {"type": "string", "format": "hostname", "pattern": "^b", "maxLength": 4}
    assert taken(engine, schema, "b.ab") and not taken(engine, schema, "a.ab") and not taken(engine, schema, "b.abc")


@pytest.mark.parametrize(
    "pattern",
    [
        r"\ba",
        r"a\B",
        "(?=a)b",
        "(?!a)b",
        "(?<=a)b",
        "(?<!a)b",
        r"(a)\1",
        r"(?<n>a)\k<n>",
        "(?i)a",
        "(?i:a)",
        "(?P<n>a)",
        "(?>a)",
        "a**",
        "a++",
        "*a",
        "^*",
        "a{3,1}",
        "{1}",
        "[z-a]",
        "(a",
        "a)",
        "[a",
        "\\",
        r"\a",
        r"\A",
        r"\Z",
        r"\z",
        r"\pL",
        r"\u12",
        r"\xg",
        r"\ud800",
        r"\u{110000}",
        "(^a)*",
        r"\01",
        "}😀*",
        r"\-\u{61}",
        r"[\w-.]\p{L}",
        "(?<n>a)(?<n>b)",
        "a{99999999999}",
        "(" * 200 + ")" * 200,
    ],
)
@pytest.mark.parametrize("where", ["pattern", "patternProperties"])
def test_what_is_not_ecma_or_cannot_be_held_to_is_refused(engine: GrammarEngine, pattern: str, where: str) -> None:
    schema = {"pattern": pattern} if where == "pattern" else {"patternProperties": {pattern: True}}
    with pytest.raises(RequestError, match="pattern '") as raised:
        engine.compile(Grammar("json_schema", json.dumps(schema)))
    assert raised.value.code in ("invalid_grammar", "unsupported_keyword")
    assert raised.value.message.endswith(("; leave it out", "; correct it"))
