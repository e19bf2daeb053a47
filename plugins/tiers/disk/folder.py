"""The folder of all segments: reading tables, making room, beginning a segment or going on with one.

Several processes work in it at once. What two must not do together is done under a lock: of a segment while it is
written, and of the folder while room is made. Left out: pages (store.py).
"""

import errno
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from engine.plugin.tiers import Manifest
from engine_plugins.tiers.disk.files import Files, Found, read_all, write_all
from engine_plugins.tiers.disk.index import Segment
from engine_plugins.tiers.disk.layout import BLOCK, ENTRY, Entry, Layout, entries_of

ENDING = ".kv"
DIRECT = getattr(os, "O_DIRECT", 0)


class Folder:
    """The segments of one manifest under `path`, which has `capacity` bytes for those of all manifests.

    `removed` is told which of them it has removed itself. With `direct`, pages bypass the page cache where they can."""

    def __init__(
        self, files: Files, path: str, layout: Layout, capacity: int, removed: Callable[[str], None], *, direct: bool
    ) -> None:
        self._files = files
        self.root = path
        self._path = os.path.join(path, layout.digest.hex())
        self._layout = layout
        self._capacity = capacity
        self._removed = removed
        self._direct = DIRECT if direct else 0
        self.evicted = 0  # segments

    def path_of(self, segment: Segment) -> str:
        return os.path.join(self._path, segment.name)

    @contextmanager
    def opened(self, path: str, flags: int) -> Iterator[int]:
        """A descriptor, and its end."""
        descriptor = self._files.open(path, flags)
        try:
            yield descriptor
        finally:
            self._files.close(descriptor)

    # ── looking ──────────────────────────────────────────────────────────────────────────────

    def listed(self) -> list[Found]:
        """The segments of this manifest; none before there is a folder."""
        return [found for found in self._in(self._path) if _is_name(found.name)]

    def _in(self, folder: str) -> list[Found]:
        """The segments in a folder, if it is there."""
        try:
            return self._files.files(folder, ENDING)
        except FileNotFoundError:
            return []

    def read(self, name: str) -> tuple[Segment, list[Entry]] | None:
        """A segment, and what its table says; None where there is no such, or not yet."""
        try:
            with self.opened(os.path.join(self._path, name), os.O_RDONLY) as descriptor:
                return self._read(name, descriptor)
        except FileNotFoundError:
            return None

    def _read(self, name: str, descriptor: int) -> tuple[Segment, list[Entry]] | None:
        head = bytearray(BLOCK)
        count = read_all(self._files, descriptor, memoryview(head), 0)
        layout = self._layout.of_head(bytes(head[:count]), bytes.fromhex(name.partition(".")[0]))
        if layout is None:
            return None
        segment, table = Segment(name, layout), bytearray(layout.pages * ENTRY.size)
        count = read_all(self._files, descriptor, memoryview(table), BLOCK)
        return segment, list(entries_of(segment.id, bytes(table[:count])))

    def entry(self, segment: Segment, number: int) -> Entry | None:
        """What the table says of one page now; nothing where the segment is gone."""
        data = bytearray(ENTRY.size)
        try:
            with self.opened(self.path_of(segment), os.O_RDONLY) as descriptor:
                count = read_all(self._files, descriptor, memoryview(data), segment.layout.entry_at(number))
        except FileNotFoundError:
            return None
        return next(entries_of(segment.id, bytes(data[:count]), number), None)

    def erase(self, segment: Segment, number: int) -> None:
        """Take one page out of the table, so that nobody else finds it."""
        with self.opened(self.path_of(segment), os.O_RDWR) as descriptor:
            write_all(self._files, descriptor, memoryview(bytes(ENTRY.size)), segment.layout.entry_at(number))

    # ── pages ────────────────────────────────────────────────────────────────────────────────

    def read_page(self, segment: Segment, number: int, into: memoryview) -> int:
        """Read a page into whole blocks; how many bytes there were."""
        try:
            with self.opened(self.path_of(segment), os.O_RDONLY | self._direct) as descriptor:
                return read_all(self._files, descriptor, into, segment.layout.page_at(number))
        except OSError as error:
            if not self._refused(error):
                raise
            return self.read_page(segment, number, into)

    def write_page(self, segment: Segment, number: int, data: memoryview) -> None:
        """Write whole blocks as a page."""
        try:
            with self.opened(self.path_of(segment), os.O_WRONLY | self._direct) as descriptor:
                write_all(self._files, descriptor, data, segment.layout.page_at(number))
        except OSError as error:
            if not self._refused(error):
                raise
            self.write_page(segment, number, data)

    def _refused(self, error: OSError) -> bool:
        """Whether the file system takes no O_DIRECT: it is not used from now on."""
        refused = bool(self._direct) and error.errno == errno.EINVAL
        if refused:
            self._direct = 0
        return refused

    # ── a segment to write ───────────────────────────────────────────────────────────────────

    def prepare(self, manifest: Manifest) -> None:
        """Make the folder, and say in it what it is for."""
        self._files.make_folder(self._path)
        said = json.dumps({**manifest, "page_bytes": self._layout.page_bytes}, indent=1, sort_keys=True)
        with self.opened(os.path.join(self._path, "manifest.json"), os.O_RDWR | os.O_CREAT | os.O_TRUNC) as descriptor:
            write_all(self._files, descriptor, memoryview(said.encode()), 0)

    def unfinished(self, full: Callable[[str], bool]) -> tuple[Segment, list[Entry], int] | None:
        """A segment that has room and no writer, what is in it, and its open file, whose lock is ours. Those that are
        known to be `full` are not opened, and one that the disk fails to give is left alone: there may be others, and
        who begins one is told whether the disk fails as a whole."""
        for found in sorted(self.listed(), key=lambda found: -found.used):
            if not full(found.name):
                with suppress(OSError):
                    if (taken := self._take(found.name)) is not None:
                        return taken
        return None

    def _take(self, name: str) -> tuple[Segment, list[Entry], int] | None:
        """As `unfinished`, of one segment."""
        descriptor = self._files.open(os.path.join(self._path, name), os.O_RDWR)
        taken = False
        try:
            if self._files.lock(descriptor, wait=False) and self._files.is_there(descriptor):
                read = self._read(name, descriptor)
                if read is not None and next_number(read[1]) < read[0].layout.pages:
                    taken = True
                    return *read, descriptor
        finally:
            if not taken:
                self._files.close(descriptor)
        return None

    def begin(self) -> tuple[Segment, int] | None:
        """A new segment and its open file, whose lock is ours; None where there is no room for it."""
        with self.opened(os.path.join(self.root, "lock"), os.O_RDWR | os.O_CREAT) as lock:
            self._files.lock(lock, wait=True)
            if not self._make_room():
                return None
            segment = Segment(secrets.token_hex(16) + ENDING, self._layout)
            path = self.path_of(segment)
            descriptor = self._files.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                self._files.lock(descriptor, wait=False)
                self._files.resize(descriptor, self._layout.size)
                write_all(self._files, descriptor, memoryview(self._layout.head(segment.id)), 0)
            except BaseException:
                self._files.close(descriptor)
                self._files.remove(path)
                raise
            return segment, descriptor

    # ── room ─────────────────────────────────────────────────────────────────────────────────

    def _make_room(self) -> bool:
        """Evict until a segment fits, of whatever manifest, the least recently used first. One that cannot be removed
        stays; where there is no room then, its OSError is raised."""
        there: list[tuple[int, int, str]] = []
        for name in self._files.folders(self.root):
            if _is_digest(name):
                folder = os.path.join(self.root, name)
                there += [(found.used, found.size, os.path.join(folder, found.name)) for found in self._in(folder)]
        excess = sum(size for _, size, _ in there) + self._layout.size - self._capacity
        refusal: OSError | None = None
        for _, size, path in sorted(there):
            if excess <= 0:
                break
            try:
                excess -= size if self._evict(path) else 0
            except OSError as error:
                refusal = refusal or error
        if excess > 0 and refusal is not None:
            raise refusal
        return excess <= 0

    def _evict(self, path: str) -> bool:
        """Remove a segment that nobody writes; whether it is gone."""
        try:
            with self.opened(path, os.O_RDWR) as descriptor:
                if not self._files.lock(descriptor, wait=False):
                    return False
                self._files.remove(path)
        except FileNotFoundError:
            return True
        self.evicted += 1
        self._removed(os.path.basename(path))
        return True

    def clear(self) -> None:
        """Remove all segments of this manifest, for good. Who writes one notices, and begins another. One that cannot
        be removed is emptied. Where that fails as well, the others are removed all the same, and OSError is raised."""
        refusal: OSError | None = None
        for found in self.listed():
            try:
                self._remove(os.path.join(self._path, found.name))
            except OSError as error:
                refusal = refusal or error
        with suppress(FileNotFoundError), self.opened(self._path, os.O_RDONLY) as descriptor:
            self._sync(descriptor)
        if refusal is not None:
            raise refusal

    def _remove(self, path: str) -> None:
        """Remove a file, or all that is in it."""
        try:
            return self._files.remove(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            try:
                with self.opened(path, os.O_RDWR) as descriptor:
                    self._files.resize(descriptor, 0)
                    self._sync(descriptor)
            except OSError:
                raise error from None

    def _sync(self, descriptor: int) -> None:
        """Some file systems do not know this, of folders above all."""
        try:
            self._files.sync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise


def next_number(entries: list[Entry]) -> int:
    """The first entry of a table behind which there is no other."""
    return 1 + max((entry.number for entry in entries), default=-1)


def _is_name(name: str) -> bool:
    return len(name) == 32 + len(ENDING) and _is_digest(name[:32])


def _is_digest(name: str) -> bool:
    return len(name) == 32 and all(letter in "0123456789abcdef" for letter in name)
