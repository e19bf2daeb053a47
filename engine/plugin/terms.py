"""What a configuration says, read by kind and range: the one place where a number of a file is believed or refused.

A configuration is a file from elsewhere: a size may be text, a count 0, a factor NaN. Whoever reads a term says what
it must be, and gets that or a ConfigError that names the term, its value and the bound. A term that is null counts as
one that is not there. What several terms must be together is left to who reads them.
"""

import math
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar, overload

from engine.errors import ConfigError, counted

MOST = 1 << 24  # of a size: no model has a dimension, a vocabulary or a window near it
MANY = 4096  # of what is built one by one, layers and experts
LONGEST = (1 << 31) - 1  # of a sequence: positions are 32-bit integers on some devices
REQUIRED: Any = object()
SHARED = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config", "architectures")  # with other parts

Default = TypeVar("Default", bound=None)


def language_terms(config: "Terms") -> "Terms":
    """What `config` says of the language model, where that is a part of the model: an older configuration says it
    without a section."""
    text = config.section("text_config")
    if not text:
        return config
    shared = {name: config[name] for name in SHARED if config.get(name) is not None}
    return Terms({**text, **shared}, text.source, text.within)


class Terms(dict[str, Any]):
    """The terms of a configuration. `source` names it in errors, `within` is what stands before a term's name there."""

    def __init__(
        self, terms: Mapping[str, Any] | None = None, source: str = "the model's configuration", within: str = ""
    ) -> None:
        super().__init__(terms or {})
        self.source = source
        self.within = within

    @classmethod
    def of(cls, terms: Mapping[str, Any]) -> "Terms":
        """`terms` themselves if they are Terms, else a copy that is."""
        return terms if isinstance(terms, cls) else cls(terms)

    # ── one term ─────────────────────────────────────────────────────────────────────────────

    @overload
    def integer(self, name: str, default: int = REQUIRED, *, low: int = 1, high: int = MOST) -> int: ...
    @overload
    def integer(self, name: str, default: None, *, low: int = 1, high: int = MOST) -> int | None: ...
    def integer(self, name: str, default: Any = REQUIRED, *, low: int = 1, high: int = MOST) -> Any:
        """An integer from `low` to `high`; `default` where there is none."""
        if (value := self._value(name, default)) is default:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"an integer from {low} to {high}")
        return value

    @overload
    def number(self, name: str, default: float = REQUIRED, *, above: float = 0.0, high: float = 1e12) -> float: ...
    @overload
    def number(self, name: str, default: None, *, above: float = 0.0, high: float = 1e12) -> float | None: ...
    def number(self, name: str, default: Any = REQUIRED, *, above: float = 0.0, high: float = 1e12) -> Any:
        """A number greater than `above` and at most `high`; `default` where there is none."""
        if (value := self._value(name, default)) is default:
            return default
        if type(value) not in (int, float) or not above < value <= high:  # which no NaN is
            raise self.wrong(name, f"a number above {above:g} and up to {high:g}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false; `default` where there is neither."""
        if (value := self._value(name, default)) is default:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    @overload
    def word(self, name: str, default: str = REQUIRED) -> str: ...
    @overload
    def word(self, name: str, default: None) -> str | None: ...
    def word(self, name: str, default: Any = REQUIRED) -> Any:
        """A string; `default` where there is none."""
        if (value := self._value(name, default)) is default:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    # ── several ──────────────────────────────────────────────────────────────────────────────

    def section(self, name: str) -> "Terms":
        """The terms that stand in the object `name`; none where there is no such object."""
        value = self._value(name, {})
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Terms(value, self.source, f"{self.within}{name}.")

    def words(self, name: str, count: int | None = None) -> tuple[str, ...]:
        """A list of strings, `count` of them if that is given; empty where there is none."""
        found = self._list(name, count)
        if not set(map(type, found)) <= {str}:  # without a line of Python for each: a vocabulary has 100,000
            raise self.wrong(name, "a list of strings")
        return found

    def integers(self, name: str, count: int | None = None, *, low: int = 0, high: int = MOST) -> tuple[int, ...]:
        """A list of integers from `low` to `high`, `count` of them if that is given; empty where there is none."""
        found = self._list(name, count)
        if not set(map(type, found)) <= {int} or (found and not low <= min(found) <= max(found) <= high):
            raise self.wrong(name, f"a list of integers from {low} to {high}")
        return found

    def numbers(self, name: str, count: int, *, above: float = 0.0) -> tuple[float, ...]:
        """A list of `count` finite numbers greater than `above`. Raises ConfigError where there is none."""
        found = self._list(name, count)
        if not all(type(each) in (int, float) and above < each < math.inf for each in found):
            raise self.wrong(name, f"a list of numbers above {above:g}")
        if not found:
            raise self._missing(name)
        return found

    # ── errors ───────────────────────────────────────────────────────────────────────────────

    def wrong(self, name: str, wanted: str) -> ConfigError:
        """The error of a term that is not `wanted`: to be raised."""
        shown = reprlib.repr(self.get(name))  # of a list of 100,000 a few
        return ConfigError(f"{self.within}{name} is {shown} in {self.source}; it must be {wanted}")

    def _missing(self, name: str) -> ConfigError:
        return ConfigError(f"{self.source} has no {self.within}{name}, which this kind of model needs")

    def _value(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise self._missing(name)
        return default

    def _list(self, name: str, count: int | None) -> tuple[Any, ...]:
        value = self._value(name, ())
        if not isinstance(value, list | tuple):
            raise self.wrong(name, "a list")
        if value and count is not None and len(value) != count:
            raise ConfigError(
                f"{self.within}{name} has {counted(len(value), 'entry', 'entries')} in {self.source}; it must have "
                f"{count}, one for each"
            )
        return tuple(value)
