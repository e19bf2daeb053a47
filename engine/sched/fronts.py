"""Which front a request is of: the key that it goes by inside says so, and so does the number of a question.

A front counts its requests and its questions in steps of STEP from a start of its own, so whoever routes an answer
needs no table.
"""

import itertools
from collections.abc import Iterator

STEP = 256
LIFE = 1 << 40  # numbers that a process may use, before those of the next process of its front


def numbers_of(front: int, life: int) -> Iterator[int]:
    """The numbers that the `life`th process of `front` gives."""
    return itertools.count(life * LIFE + front, STEP)


def front_of(key: str) -> int:
    """The front whose request has this key, its number in hexadecimal digits."""
    return int(key[-2:], 16)


def front_of_number(number: int) -> int:
    """The front that has asked with this number."""
    return number % STEP
