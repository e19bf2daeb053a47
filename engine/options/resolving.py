"""Where the values of options come from: what was given, then the environment, then a file; else the defaults."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from msgspec import Struct

from engine.errors import ConfigError, did_you_mean
from engine.options.option import options_of

NOTHING: Mapping[str, Any] = MappingProxyType({})


def said(
    struct: type[Struct], given: Mapping[str, Any], environ: Mapping[str, str], file: Mapping[str, Any] = NOTHING
) -> dict[str, Any]:
    """The values that are said of the fields of `struct`. Raises ConfigError for one that its option does not take."""
    values = {}
    for option in options_of(struct):
        if option.name in given:
            values[option.name] = option.read(given[option.name], option.flag)
        elif option.variable in environ:
            values[option.name] = option.read(environ[option.variable], option.variable)
        elif option.name in file:
            values[option.name] = file[option.name]
    return values


def refuse_unknown(given: Iterable[str], environ: Iterable[str], structs: Iterable[type[Struct]]) -> None:
    """A name that is no option of `structs` stops the start. Of the environment, where ENGINE_ is not ours alone, only
    a near miss does: it is a misspelling, and ignoring it would be worse."""
    known = [option for struct in structs for option in options_of(struct)]
    names = [option.name for option in known]
    for name in given:
        if name not in names:
            raise ConfigError(f"there is no option {name!r} (docs/options.md lists them){did_you_mean(name, names)}")
    variables = [option.variable for option in known]
    for name in environ:
        misspelt = name.startswith("ENGINE_") and name not in variables
        hint = did_you_mean(name, variables, cutoff=0.87) if misspelt else ""
        if hint:
            raise ConfigError(f"the environment sets {name}, which is no option{hint}")
