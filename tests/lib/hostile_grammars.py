"""Grammars that could do harm to who compiles or follows them, for test_fuzz: deep, wide, endless, cyclic, ambiguous,
of parts of wrong types. Plain values; most of them are refused, and none may do more than that."""

from typing import Any

HALF = "\ud800"  # of a surrogate pair, which is no character
NESTED = "(" * 120 + "a" + "+)" * 120


def nested(depth: int, leaf: Any, wrap: Any) -> Any:
    """`leaf`, wrapped as often."""
    for _ in range(depth):
        leaf = wrap(leaf)
    return leaf


WIDE = {f"p{number}": {"type": "string", "maxLength": 9} for number in range(1000)}
SCHEMAS: list[Any] = [
    nested(60, {"type": "integer"}, lambda inner: {"type": "object", "properties": {"a": inner}}),
    nested(90, {}, lambda inner: {"type": "array", "items": inner}),
    nested(400, {}, lambda inner: {"allOf": [inner]}),
    nested(12, {"type": "null"}, lambda inner: {"anyOf": [inner, {"type": "array", "items": inner}]}),
    {"type": "string", "minLength": 10**6, "maxLength": 10**7},
    {"type": "string", "maxLength": 2**63},
    {"type": "string", "minLength": 5, "maxLength": 4},
    {"type": "array", "items": {}, "minItems": 10**6, "maxItems": 10**9},
    {"type": "array", "items": {"type": "array", "items": {"type": "string"}, "maxItems": 999}, "minItems": 999},
    {"type": "integer", "minimum": -(10**40), "maximum": 10**40},
    {"type": "number", "minimum": 1e308, "multipleOf": 1e-300},
    {"type": "integer", "minimum": 3, "maximum": 2},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
    {"$ref": "#"},
    {"$ref": "http://127.0.0.1:1/s.json"},
    {"$ref": "#/" + "x/" * 500},
    {"properties": {"$ref": {"$ref": "#/properties/$ref"}}, "required": ["$ref"]},
    {"enum": [f"value {number}" for number in range(20_000)]},
    {"enum": ["x" * 100_000]},
    {"enum": [[{}, [{}]], {"a": [None] * 99}, 1e300, -0.0, True, "\x00\x7f\u2028\U0010ffff"]},
    {"enum": []},
    {"enum": {}},
    {"type": []},
    {"anyOf": []},
    {"oneOf": [{}, {}, {}]},
    {"type": "object", "properties": WIDE},
    {"type": "object", "properties": WIDE, "required": list(WIDE), "additionalProperties": False},
    {"type": "object", "required": [f"q{number}" for number in range(500)]},
    {"type": "object", "patternProperties": {"(a+)+": {}, "^a": {}, "(": {}}},
    {"type": "object", "properties": {'"': {}, "\\": {}, "\n\x00": {}, "é" * 99: {}}, "required": ['"', "\n\x00"]},
    {"type": "string", "pattern": NESTED},
    {"type": "string", "pattern": "^(a+)+$", "maxLength": 5000, "format": "email"},
    {"const": HALF},
    {"properties": {HALF: {}}},
    {"x-guidance": {"lenient": True, "whitespace_pattern": "(", "coerce_one_of": 3}, "not": {}},
    {"not": {"not": {"not": {}}}},
    {"if": {}, "then": False, "else": False},
]
EXPRESSIONS = [
    *("(a+)+b", "(((a*)*)*)*c", "(a|aa)+$", "(.*a){12}", "(a|b)*a(a|b){20}", "(x{0,500}){0,500}"),
    *(
        "a{1000}{1000}",
        "a{99999999999}",
        "a{3,1}",
        "(?i)(?x)a #",
        "[z-a]",
        "[^]",
        "[[:alpha:]]",
        "(?P<n>a)(?P<n>b)",
    ),
    *(
        "*",
        "a**",
        "(?:",
        "\\",
        r"\x{110000}",
        r"\u{d800}",
        r"\p{Nope}",
        "(?=a)(?!b)c",
        r"\Bx\b",
        "\0",
        HALF,
        NESTED,
    ),
]
CONST, PLAIN = {"type": "const_string", "value": "a"}, {"type": "any_text"}
TAG = {"type": "tag", "begin": "<a>", "content": PLAIN, "end": "</a>"}
FORMATS: list[Any] = [  # of structural tags
    {},
    {"type": ["tag"]},
    {"type": "nothing"},
    TAG | {"begin": ""},
    TAG | {"begin": "", "end": ""},
    TAG | {"begin": 3},
    TAG | {"end": []},
    TAG | {"end": ["", "b"]},
    TAG | {"content": 3},
    {"type": "triggered_tags", "triggers": [""], "tags": [TAG]},
    {"type": "triggered_tags", "triggers": ["<"], "tags": [TAG, TAG]},
    {"type": "triggered_tags", "triggers": [3], "tags": [3]},
    {"type": "triggered_tags", "triggers": [], "tags": []},
    {"type": "tags_with_separator", "tags": [TAG], "separator": ""},
    {"type": "tags_with_separator", "tags": [{**TAG, "content": CONST, "end": ""}], "separator": ""},
    {"type": "tags_with_separator", "tags": [3], "separator": 3},
    {"type": "sequence", "elements": [PLAIN, PLAIN]},
    {"type": "sequence", "elements": []},
    {"type": "or", "elements": []},
    {"type": "repeat", "min": 10**5, "max": 10**9, "content": CONST},
    {"type": "repeat", "min": -1, "max": True, "content": CONST},
    {"type": "star", "content": {"type": "const_string", "value": ""}},
    {"type": "token", "token": -1},
    {"type": "token", "token": True},
    {"type": "const_string", "value": HALF},
    {"type": "const_string", "value": "\x00\x7f<|end|>"},
    {"type": "grammar", "grammar": 'root ::= root "a" | root'},
    nested(90, CONST, lambda inner: {"type": "optional", "content": inner}),
    nested(300, CONST, lambda inner: {"type": "star", "content": inner}),
]
SOURCES = [  # EBNF and Lark
    'root ::= root "a" | "b"',  # left recursion
    "root ::= a\na ::= b\nb ::= a",
    'root ::= ("a" | "")* ("" | "b")+',
    'root ::= root root root | "a" |',
    'root ::= "\t\x7f" [^] [z-a]',
    'root ::= start\nstart ::= "a"',
    'root ::= a-b a_b\na-b ::= "a"\na_b ::= "b"',
    "root ::= " + "(" * 150 + '"a"' + ")*" * 150,
    "root ::= " + " | ".join(f'"{number}"' for number in range(3000)),
    f'root ::= "{HALF}"',
    'root ::= "a"{99999}{99999}',
    "",
    "start: start",
    "start: s s\ns: s s | s s s | /[a-z]/ | /[ -~]/",
    'start: "a" | %json {"type": "strange"}',
    'start: %json {"not": {}}',
    "%llguidance {bad}\nstart: /a/",
    '%llguidance {"no_forcing": 3}\nstart: /a/',
    "start: @nested",
    "start: <[99999999]> <end>",
    "start: /(a+)+b/ /a{1000}{1000}/",
    "start: A\nA: A",
    "root ::= [0-9]+",
    'start: "a" | "b" start',
    "root ::= root",
    "root ::= x",
    "::=",
    "start: /[/",
    'root ::= "a"{1,99999}',
]
