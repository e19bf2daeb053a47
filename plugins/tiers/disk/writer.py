"""The segment that a store writes: its file, its lock, and the next free entry of its table.

Several threads write pages of it at once. It is closed, and its lock given back, once it is full and the last of them
is done. Left out: what a page is (store.py).
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine_plugins.tiers.disk.files import Files, write_all
from engine_plugins.tiers.disk.folder import Folder, next_number
from engine_plugins.tiers.disk.index import Segment
from engine_plugins.tiers.disk.layout import Entry, entry_bytes


class Active:
    """A segment whose lock is ours; entries from `next` on are free."""

    def __init__(self, segment: Segment, descriptor: int, next: int) -> None:
        self.segment = segment
        self.descriptor = descriptor
        self.next = next
        self.writing = 0  # pages
        self.ended = False

    @property
    def full(self) -> bool:
        return self.next >= self.segment.layout.pages


class Writer:
    """Hands out entries of one segment after the other. `full` says which are known to have none left, and `adopt` is
    told what is in one that was begun before."""

    def __init__(
        self,
        files: Files,
        folder: Folder,
        full: Callable[[str], bool],
        adopt: Callable[[Segment, list[Entry]], Segment],
    ) -> None:
        self._files = files
        self._folder = folder
        self._full = full
        self._adopt = adopt
        self._lock = threading.Lock()
        self._active: Active | None = None

    @contextmanager
    def entry(self) -> Iterator[tuple[Active, int] | None]:
        """A free entry, to be written meanwhile; None where there is no room for a segment. Raises OSError."""
        with self._lock:
            active = self._ready()
            if active is not None:
                number = active.next
                active.next += 1
                active.writing += 1
        if active is None:
            yield None
            return
        try:
            yield active, number
        finally:
            with self._lock:
                active.writing -= 1
                self._close_if_done(active)

    def write_entry(self, active: Active, entry: Entry) -> None:
        """Say in the table that a page is there."""
        data = memoryview(entry_bytes(active.segment.id, entry))
        write_all(self._files, active.descriptor, data, active.segment.layout.entry_at(entry.number))

    def _ready(self) -> Active | None:
        """A segment with a free entry; the lock is held."""
        active = self._active
        if active is not None and not active.full and self._files.is_there(active.descriptor):
            return active
        self._end()
        found = self._folder.unfinished(self._full)
        if found is not None:
            segment, entries, descriptor = found
            self._active = Active(self._adopt(segment, entries), descriptor, next_number(entries))
        elif (begun := self._folder.begin()) is not None:
            segment, descriptor = begun
            self._active = Active(self._adopt(segment, []), descriptor, 0)
        return self._active

    def _end(self) -> None:
        """Write no more into the segment; the lock is held."""
        active, self._active = self._active, None  # first: its number is another file's once it is closed, or fails to
        if active is not None:
            active.ended = True
            self._close_if_done(active)

    def _close_if_done(self, active: Active) -> None:
        if active.ended and not active.writing:
            self._files.close(active.descriptor)

    def close(self) -> None:
        """Give the lock back, once what is being written is."""
        with self._lock:
            self._end()
