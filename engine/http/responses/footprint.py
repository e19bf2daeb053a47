"""How much memory a value holds, so that a store of what clients send can be bounded by bytes.

The count never understates: what two values share counts for each, and a text that is not ASCII counts with the UTF-8
that it keeps once it has been sent. Left out: what the allocator adds to each object.
"""

from sys import getsizeof
from typing import Any

from msgspec import Struct
from msgspec.structs import astuple

UTF8_BYTES = 4  # of a character, at most


def footprint(value: Any) -> int:
    """The bytes of `value` and of all that it holds: JSON values, tuples, structs."""
    total = 0
    parts = [value]
    for part in parts:  # which grows meanwhile
        total += getsizeof(part)
        kind = type(part)
        if kind is str:
            if not part.isascii():
                total += UTF8_BYTES * len(part) + 1  # and the zero that ends it
        elif kind is dict:
            parts += part.keys()
            parts += part.values()
        elif kind is list or kind is tuple:
            parts += part
        elif isinstance(part, Struct):
            parts += astuple(part)
    return total
