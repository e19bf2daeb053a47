"""Sizes in bytes, as people say them: 64GiB, 1.5TiB, 500MiB, 4096."""

import re

from engine.errors import ConfigError

UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SHOWN = ("B", "KiB", "MiB", "GiB", "TiB")
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def read_size(text: str, origin: str) -> int:
    """The bytes that `text` says, one at least. Raises ConfigError that names `origin`, an option."""
    found = SIZE.fullmatch(text)
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or (size := int(float(found[1]) * unit)) < 1:
        raise ConfigError(f"{origin} is {text!r}, but takes a size such as 64GiB, 500MiB or a number of bytes")
    return size


def show_size(count: int) -> str:
    """`count` bytes, for people: four digits at most."""
    power = min(max(count.bit_length() - 1, 0) // 10, len(SHOWN) - 1)
    return f"{count / 1024**power:.4g} {SHOWN[power]}"
