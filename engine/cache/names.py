"""Names of pages: what tells a page apart wherever it lies, on the device, in the host's memory or on a disk.

    salt ──> root ── page 0 ──> name 0 ── page 1 ──> name 1 …      a hash over the one before and the page's keys

So a name stands for all tokens up to the page's end, and equal names mean equal keys and values, as far as the model is
the same: a worker adds its manifest before a store sees them. One page takes about a microsecond, so a text is named
once, and only where there are tiers. Pages of a state at the end of a text (sched/states.py) are numbered in the last
bytes of its name.
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b

from engine.messages.tiers import NAME_BYTES

NUMBER = 3  # bytes of the name of a state's page that number it


def state_names(name: bytes, pages: int) -> list[bytes]:
    """Those of the `pages` of the state at the end of the page of that `name`."""
    return [name[:-NUMBER] + index.to_bytes(NUMBER) for index in range(pages)]


def first_of_state(name: bytes) -> bytes:
    """The first of `state_names`."""
    return name[:-NUMBER] + bytes(NUMBER)


class PageNames:
    """The names of the leading pages of one text, which grows; of some they are `known`. `key` gives what the tree
    knows its tokens by."""

    __slots__ = ("_key", "_page_size", "_salt", "names")

    def __init__(
        self, salt: bytes, page_size: int, key: Callable[[int, int], bytes], known: Sequence[bytes] = ()
    ) -> None:
        self.names = list(known)
        self._salt = salt
        self._page_size = page_size
        self._key = key

    def upto(self, pages: int) -> list[bytes]:
        """The names of all pages known so far: of the first `pages` at least, whose tokens are known."""
        names = self.names
        if pages > (known := len(names)):
            key = self._key(known * self._page_size, pages * self._page_size)
            stride = 4 * self._page_size
            name = names[-1] if names else blake2b(self._salt, digest_size=NAME_BYTES, person=b"pages").digest()
            for at in range(0, len(key), stride):
                name = blake2b(name + key[at : at + stride], digest_size=NAME_BYTES).digest()
                names.append(name)
        return names
