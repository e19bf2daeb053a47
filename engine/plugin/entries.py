"""An entry of a registry from what a manifest passed to `register`. An error names the field and says how to write it.

Left out: whether the target can be imported, which is known where it is used.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo

from engine.errors import PluginError, did_you_mean
from engine.plugin.hookspecs import Entry

TARGET = re.compile(r"[\w.]+:[\w.]+")

AnyEntry = TypeVar("AnyEntry", bound=Entry)


def entry_of(kind: type[AnyEntry], given: Mapping[str, Any], said: str) -> AnyEntry:
    """The entry of `kind` that has the fields `given`. Raises PluginError that begins with `said` and names the field,
    what it is, and what it may be."""
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for name in given:
        if name not in fields:
            raise PluginError(f"{said} has no field {name!r}{did_you_mean(name, fields)}; fields: {', '.join(fields)}")
    for name, field in fields.items():
        if name in given:
            _check(field, given[name], said)
        elif field.required:
            raise PluginError(f"{said} lacks {name!r}, which must be {_shown(field.type)}")
    entry = msgspec.convert(given, kind)
    if not TARGET.fullmatch(entry.target):
        raise PluginError(f"{said}: the target must be 'module:attribute', not {entry.target!r}")
    return entry


def _check(field: FieldInfo, value: Any, said: str) -> None:
    """A required list that is empty is refused as well: what it is for would never be chosen."""
    try:
        if msgspec.convert(value, field.type) or not field.required:
            return
    except msgspec.ValidationError:
        pass
    raise PluginError(f"{said}: {field.name} is {value!r}, and must be {_shown(field.type)}")


def _shown(kind: Any) -> str:
    """A type, for people."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, inner))
    if get_origin(kind) is tuple:
        what = _shown(inner[0])
        return f"a tuple of texts such as ({'a'!r}, {'b'!r})" if what == "a text" else f"a tuple of {what}"
    return {str: "a text", int: "a whole number", bool: "True or False"}.get(kind, str(kind))
