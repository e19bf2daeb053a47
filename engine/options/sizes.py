"""Sizes in bytes, as people say them: 64GiB, 1.5TiB, 500MiB, 4096. An option in bytes is a `Size`, with any bounds."""

import re
from fractions import Fraction
from typing import Annotated

from msgspec import Meta

from engine.errors import ConfigError

IN_BYTES = Meta(extra={"unit": "bytes"})  # tells option.py to read it by `size_of`
Size = Annotated[int, IN_BYTES]
EXPECTED = "a size (64MiB, or a number of bytes)"

UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SHOWN = ("B", "KiB", "MiB", "GiB", "TiB")
SIZE = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([a-z]*)\s*", re.IGNORECASE)


def size_of(text: str) -> int:
    """The bytes that `text` says. Raises ValueError where it says no size."""
    found = SIZE.fullmatch(text)
    if found is None or (unit := UNITS.get(found[2].upper())) is None:
        raise ValueError(f"{text!r} is no size")
    return int(Fraction(found[1]) * unit)


def read_size(text: str, origin: str) -> int:
    """As `size_of`, one at least. Raises ConfigError that names `origin`, a part of an option."""
    try:
        size = size_of(text)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"{origin} is {text!r}, but takes {EXPECTED}, at least 1B")
    return size


def show_size(count: int) -> str:
    """`count` bytes, for people: four digits at most."""
    power = min(max(count.bit_length() - 1, 0) // 10, len(SHOWN) - 1)
    return f"{count / 1024**power:.4g} {SHOWN[power]}"


def spell_size(count: int) -> str:
    """`count` bytes exactly, as an option takes them: 64MiB, 1000B."""
    power = next(power for power in reversed(range(len(SHOWN))) if count % 1024**power == 0) if count else 0
    return f"{count >> 10 * power}{SHOWN[power]}"
