"""The bytes of a segment: see the package's docstring. Pure.

Left out: files (files.py), and which segments there are (folder.py).
"""

import json
import struct
from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple
from zlib import crc32

from engine.plugin.tiers import Manifest

BLOCK = 4096  # what O_DIRECT reads and writes whole
MOST_PAGES = 4096  # of a segment
MAGIC = b"KVPAGES1"  # its last digit is the version of the format
HEAD = struct.Struct("<8s16s16sQII")
ENTRY = struct.Struct("<32sII")


class Entry(NamedTuple):
    """A page: its number in the segment, its key, and its checksum."""

    number: int
    key: bytes
    checksum: int


class Layout(NamedTuple):
    """Segments of `pages` pages of `page_bytes`, all of the manifest with this `digest` (16 bytes)."""

    digest: bytes
    page_bytes: int
    pages: int

    @property
    def stride(self) -> int:
        """Bytes from one page to the next."""
        return whole_blocks(self.page_bytes)

    @property
    def table_bytes(self) -> int:
        return whole_blocks(self.pages * ENTRY.size)

    @property
    def size(self) -> int:
        """Bytes of a segment."""
        return self.page_at(self.pages)

    def entry_at(self, number: int) -> int:
        return BLOCK + number * ENTRY.size

    def page_at(self, number: int) -> int:
        return BLOCK + self.table_bytes + number * self.stride

    def head(self, id: bytes) -> bytes:
        """The first bytes of the segment `id` (16 bytes)."""
        head = HEAD.pack(MAGIC, self.digest, id, self.page_bytes, self.pages, 0)[:-4]
        return head + crc32(head).to_bytes(4, "little")

    def of_head(self, head: bytes, id: bytes) -> "Layout | None":
        """The layout of the segment `id` that begins so; None for what is no such head, or not of this manifest."""
        if len(head) < HEAD.size:
            return None
        magic, digest, its_id, page_bytes, pages, check = HEAD.unpack(head[: HEAD.size])
        known = (magic, digest, its_id, page_bytes) == (MAGIC, self.digest, id, self.page_bytes)
        if not known or crc32(head[: HEAD.size - 4]) != check:
            return None
        return self._replace(pages=pages) if 0 < pages <= MOST_PAGES else None


def whole_blocks(size: int) -> int:
    """The least number of bytes that are whole blocks and hold `size`."""
    return -(-size // BLOCK) * BLOCK


def digest_of(manifest: Manifest, page_bytes: int) -> bytes:
    """What stands for a manifest, whatever the order of its names."""
    said = json.dumps({**manifest, "page_bytes": page_bytes}, sort_keys=True)
    return blake2b(MAGIC + said.encode(), digest_size=16).digest()


def _place(id: bytes, number: int) -> int:
    """What checksums begin with, so that they fit one place only."""
    return crc32(id) ^ number


def page_checksum(id: bytes, number: int, key: bytes, page: memoryview) -> int:
    """The checksum of a page, whose key is `key`, as number `number` of the segment `id`."""
    return crc32(page, crc32(key, _place(id, number)))


def entry_bytes(id: bytes, entry: Entry) -> bytes:
    """An entry of the table of the segment `id`."""
    said = entry.key + entry.checksum.to_bytes(4, "little")
    return said + crc32(said, _place(id, entry.number)).to_bytes(4, "little")


def entries_of(id: bytes, table: bytes, first: int = 0) -> Iterator[Entry]:
    """All entries in a table, or in a part of it, which begins with number `first`."""
    place = crc32(id)
    whole = len(table) // ENTRY.size * ENTRY.size
    for number, (key, checksum, check) in enumerate(ENTRY.iter_unpack(table[:whole]), first):
        start = (number - first) * ENTRY.size
        if check and crc32(table[start : start + ENTRY.size - 4], place ^ number) == check:
            yield Entry(number, key, checksum)
