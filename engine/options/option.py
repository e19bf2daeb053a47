"""A field of an options struct, as people meet it: its names, what it takes in words, and a text read as its value.

All of it derives from the field's annotation: its type, the bounds and the description of its Meta. Which structs there
are, and which source of values overrules which, is for those who declare them: engine/config.py for the engine,
engine/client/options.py for clients.
"""

import math
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Meta, Struct

from engine.errors import ConfigError, did_you_mean
from engine.options.sizes import EXPECTED, IN_BYTES, size_of, spell_size

Positive = Annotated[int, Meta(ge=1)]  # a bound on a value that may also be None belongs on the number


class Option(Struct, frozen=True):
    """One field of an options struct, as people meet it.

    `annotation` is the field's declared type, `kind` the bare type in it without None and bounds. Its variable begins
    with `prefix`, which is what the struct declares as `variables`. `in_bytes`: it is a `Size`, so takes units."""

    name: str
    annotation: Any
    default: Any
    kind: Any
    bounds: str
    description: str
    prefix: str = "ENGINE_"
    in_bytes: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return self.prefix + self.name.upper()

    @property
    def choices(self) -> tuple[str, ...]:
        """The only values it takes, where they are a fixed list."""
        return tuple(map(str, get_args(self.kind))) if get_origin(self.kind) is Literal else ()

    @property
    def listed(self) -> bool:
        """Whether it holds several values."""
        return get_origin(self.kind) is tuple

    @property
    def expects(self) -> str:
        """What a value must be, in words: "an integer from 1 to 256"."""
        if self.choices:
            return ", ".join(self.choices[:-1]) + " or " + self.choices[-1]
        if self.listed:
            item = get_args(self.kind)[0]
            if get_origin(item) is Literal:
                return "a comma-separated list of " + " or ".join(get_args(item))
            return "a comma-separated list" if item is str else "a list of integers"
        if get_origin(self.kind) is dict:
            return "a JSON object"
        if self.in_bytes:
            return EXPECTED + self.bounds
        return {bool: "true or false", int: "an integer", float: "a number", str: "text"}[self.kind] + self.bounds

    @property
    def said_default(self) -> str:
        """What a command line would say for its default; nothing where there is none."""
        if self.default in (None, (), NODEFAULT):
            return ""
        return spell_size(self.default) if self.in_bytes else str(self.default).lower()

    @property
    def help(self) -> str:
        """What a command line says of it."""
        return self.description + (f" (default: {self.said_default})" if self.said_default else "")

    def read(self, value: Any, origin: str) -> Any:
        """`value`, text or already of the right type, as the field's type.

        Raises ConfigError naming `origin` (a flag or a variable), the value and what is taken."""
        given = value
        if self.listed and isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        try:
            if get_origin(self.kind) is dict and isinstance(value, str):
                return msgspec.json.decode(value, type=self.annotation)
            if self.in_bytes and isinstance(value, str):
                value = size_of(value)
            converted = msgspec.convert(value, self.annotation, strict=False)
            if isinstance(converted, float) and not math.isfinite(converted):
                raise msgspec.ValidationError("not finite")
            if isinstance(converted, int) and converted.bit_length() > 64:
                raise msgspec.ValidationError("more than goes into a message between processes")
            return converted
        except (msgspec.DecodeError, ValueError):  # a ValidationError is a DecodeError
            hint = did_you_mean(str(value), self.choices)
            raise ConfigError(f"{origin} is {given!r}, but takes {self.expects}{hint}") from None


def options_of(struct: type[Struct]) -> tuple[Option, ...]:
    """The fields of `struct` as options, in order."""
    options, prefix = [], getattr(struct, "variables", "ENGINE_")
    for field in msgspec.structs.fields(struct):
        kind, metas = _unwrap(field.type)
        description = next((meta.description for meta in metas if meta.description), "")
        in_bytes = IN_BYTES in metas
        bounds = _bounds(metas, spell_size if in_bytes else str)
        options.append(Option(field.name, field.type, field.default, kind, bounds, description, prefix, in_bytes))
    return tuple(options)


def _unwrap(annotation: Any) -> tuple[Any, list[Meta]]:
    """The bare type under `Annotated` and `| None`, and every Meta met on the way."""
    metas: list[Meta] = []
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *found = get_args(annotation)
            metas += (mark for mark in found if isinstance(mark, Meta))
        elif get_origin(annotation) in (Union, UnionType):
            (annotation,) = (member for member in get_args(annotation) if member is not NoneType)
        else:
            return annotation, metas


def _bounds(metas: list[Meta], said: Callable[[Any], str]) -> str:
    """Bounds in words, each as `said`: " from 1 to 256", " above 0, at most 1", or nothing."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = {key: said(getattr(meta, key)) for meta in metas for key in words if getattr(meta, key) is not None}
    if found.keys() == {"ge", "le"}:
        return f" from {found['ge']} to {found['le']}"
    return "".join(f", {words[key]} {bound}" for key, bound in found.items())
