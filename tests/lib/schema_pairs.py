"""Made-up JSON schemas and instances for a second judge: keywords that engines take, some that they refuse, and many
that say nothing; instances that are near to what a schema asks for. And `suite`: bench/grammars/schema_suite.py."""

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any


def loaded(path: Path) -> Any:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


suite = loaded(Path(__file__).parents[2] / "bench" / "grammars" / "schema_suite.py")

NAMES = ("a", "b", "ab", "é", "x y")
WORDS = (
    "",
    "a",
    "ab",
    "abc",
    "b",
    "1",
    "é",
    "\n",
    '"\\',
    "2024-02-29",
    "2023-02-29",
    "a@b.c",
    "12:30:00Z",
    "日本",
    "&",
)
NUMBERS = (0, 1, -1, 2, 3, 7, 10, 100, 0.5, 1.5, -2.5, 0.1, 1e-3, 2**53 - 1, 2**53 + 1, 10**20)
PATTERNS = (
    "^a",
    "b$",
    "^a|b$",
    "^[a-c]{1,2}$",
    "[a&&b]",
    "^[^a&&b]$",
    "^[+--]$",
    r"^\s$",
    r"^\S+$",
    ".",
    "^.$",
    r"\d",
    r"^\w*$",
    r"^[\w-]+$",
    "^(a|bc)*$",
    "",
    "^$",
    "^[a[]$",
    r"^\x61\u0062",
    r"\p{L}",
    r"^\P{L}$",
    "(^a|b)c?$",
    r"^[^\d\s]{2}$",
    "^a.c$",
    r"\ba",
    "a(?=b)",
    "^a+?b?$",
)
FORMATS = ("date", "email", "time", "ipv4", "uuid", "hostname", "date-time", "uri", "ipv6", "colour")
TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")


class Maker:
    """Draws from `random`, so that a seed says what is made."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def _some(self, *choices: Any) -> Any:
        return self._random.choice(choices)

    def _perhaps(self, share: float) -> bool:
        return self._random.random() < share

    def schema(self, depth: int = 2) -> Any:
        """Of objects and arrays at most `depth` deep."""
        if self._perhaps(0.04):
            return self._some(True, {}, True, False)
        draw = self._random.random()
        if depth and draw < 0.12:
            keyword = self._some("anyOf", "anyOf", "allOf", "oneOf")
            return self._idle({keyword: [self.schema(depth - 1) for _ in range(self._some(1, 2, 2, 3))]}, depth)
        if draw < 0.2:
            return self._idle({"enum": [self.value(1) for _ in range(self._some(1, 2, 4))]}, depth)
        if draw < 0.25:
            return {"const": self.value(1)}
        kinds = TYPES if depth else TYPES[:5]
        return self._idle(getattr(self, f"_{self._some(*kinds)}")(depth), depth)

    def _idle(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        """With keywords that mostly say nothing here."""
        for keyword, values in {
            "uniqueItems": (False,),
            "propertyNames": (True, {"type": "string"}, {"enum": ["a", "b"]}, {"pattern": "^a"}),
            "dependentRequired": ({}, {"a": []}, {"a": ["b"]}),
            "minContains": (0, 1),
            "maxContains": (2,),
            "contains": (True, {}),
            "if": ({}, True, False),
            "then": ({}, {"type": "string"}),
            "else": (True, False),
            "not": (False, {}, {"type": "null"}, {"not": {"type": "integer"}}, {"type": "integer"}),
            "unevaluatedProperties": (True, False),
            "unevaluatedItems": (True, False),
            "minItems": (0,),
            "title": ("t",),
            "minProperties": (0, 1),
            "contentMediaType": ("text/plain",),
            "default": (3,),
            "additionalItems": (False,),
        }.items():
            if self._perhaps(0.03):
                schema.setdefault(keyword, self._some(*values))
        return schema

    def _string(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string"}
        if self._perhaps(0.3):
            schema["pattern"] = self._some(*PATTERNS)
        if self._perhaps(0.2):
            schema["format"] = self._some(*FORMATS)
        if self._perhaps(0.3):
            schema[self._some("minLength", "maxLength")] = self._some(0, 1, 2, 3.0)
        return schema

    def _integer(self, depth: int) -> dict[str, Any]:
        return self._number(depth) | {"type": "integer"}

    def _number(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "number"}
        for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if self._perhaps(0.25):
                schema[keyword] = self._some(*NUMBERS)
        if self._perhaps(0.15):
            schema["multipleOf"] = self._some(1, 2, 7, 0.5, 0.1)
        return schema

    def _boolean(self, depth: int) -> dict[str, Any]:
        return {"type": "boolean"}

    def _null(self, depth: int) -> dict[str, Any]:
        return {"type": self._some("null", ["null", "string"], ["integer", "boolean"], ["number", "array"])}

    def _array(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "array"}
        if self._perhaps(0.2):
            schema["prefixItems"] = [self.schema(depth - 1) for _ in range(self._some(1, 2))]
        if self._perhaps(0.7):
            schema["items"] = self._some(self.schema(depth - 1), self.schema(depth - 1), False)
        for keyword in ("minItems", "maxItems"):
            if self._perhaps(0.2):
                schema[keyword] = self._some(0, 1, 2)
        if self._perhaps(0.1):
            schema["uniqueItems"] = self._some(True, False)
        return schema

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(NAMES, self._some(0, 1, 2, 3))
        schema: dict[str, Any] = {"type": "object"}
        if names or self._perhaps(0.5):
            schema["properties"] = {name: self.schema(depth - 1) for name in names}
        if self._perhaps(0.5):
            schema["required"] = [name for name in names if self._perhaps(0.7)]
        if self._perhaps(0.4):
            schema["additionalProperties"] = self._some(False, False, True, self.schema(depth - 1))
        if self._perhaps(0.1):
            schema["patternProperties"] = {self._some(*PATTERNS): self.schema(depth - 1)}
        if self._perhaps(0.1):
            schema[self._some("minProperties", "maxProperties")] = self._some(0, 1, 2, 5)
        return schema

    def value(self, depth: int = 2) -> Any:
        """Any JSON value."""
        kind = self._some("word", "word", "number", "number", "other", *(("list", "object") if depth else ()))
        if kind == "word":
            return self._some(*WORDS)
        if kind == "number":
            return self._some(*NUMBERS)
        if kind == "list":
            return [self.value(depth - 1) for _ in range(self._some(0, 1, 2, 3))]
        if kind == "object":
            return {name: self.value(depth - 1) for name in self._random.sample(NAMES, self._some(0, 1, 2))}
        return self._some(True, False, None)

    def near(self, schema: Any, depth: int = 3) -> Any:
        """A value that looks at some of `schema`, and may be valid."""
        if not isinstance(schema, dict) or self._perhaps(0.1) or not depth:
            return self.value(min(depth, 2))
        for keyword in ("anyOf", "oneOf", "allOf"):
            if keyword in schema:
                return self.near(self._some(*schema[keyword]), depth)
        if "enum" in schema:
            return self._some(*schema["enum"])
        if "const" in schema:
            return schema["const"]
        kind = schema.get("type", "null")
        kind = self._some(*kind) if isinstance(kind, list) else kind
        if kind == "object":
            properties = schema.get("properties", {})
            chosen = {name: self.near(each, depth - 1) for name, each in properties.items() if self._perhaps(0.8)}
            return chosen | ({self._some(*NAMES): self.value(0)} if self._perhaps(0.3) else {})
        if kind == "array":
            first = [self.near(each, depth - 1) for each in schema.get("prefixItems", ())]
            return first + [self.near(schema.get("items"), depth - 1) for _ in range(self._some(0, 1, 2))]
        if kind == "string":
            return self._some(*WORDS)
        if kind in ("integer", "number"):
            return self._some(*NUMBERS[:8]) + self._some(0, 0, 1, 0.5)
        return self._some(True, False) if kind == "boolean" else None
