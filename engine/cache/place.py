"""One page of the host's memory. Pure. Left out: which gives way when (host.py, doubles.py)."""

from msgspec import Struct


class Place(Struct, eq=False, gc=False):
    """A page's place in the host's memory. `pins` are the moves under way that read or write it.

    There are as many as pages, so Python's garbage collector visits none: they refer to nothing that it could free."""

    name: bytes
    slot: int
    pins: int = 1
    there: bool = False  # its bytes are
    hit: bool = False
    double: bool = False
    used: int = 0  # when it was, as a double (doubles.py)
    awaited: bool = False  # by a store, which is to be given it; ends as it is pinned for that, or forgotten
    stored: bool = False  # a store has it, or is given it now
    offers: int = 0  # to a store, which has refused it
    fetched: bool = False  # a store has given it
    known: bool = True  # under its name; one that is not is freed with its last pin
