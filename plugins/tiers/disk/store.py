"""The store on a disk: calls of `put` and `get` become works for a few threads, one a page.

What goes wrong with the disk is counted, said once in the log for each kind, and ends in False; it is never raised.
A page that turns out wrong is taken out of its table, so that nobody else reads it. Left out: what is in the files (the
package's docstring), and the threads' patience (threads.py).
"""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from engine.plugin import ConfigError
from engine.plugin.tiers import KEY_BYTES, Held, Manifest
from engine_plugins.tiers.disk.files import Files
from engine_plugins.tiers.disk.folder import Folder
from engine_plugins.tiers.disk.index import Index, Place, Segment
from engine_plugins.tiers.disk.layout import MOST_PAGES, Entry, Layout, digest_of, page_checksum
from engine_plugins.tiers.disk.threads import PAUSE_SECONDS, Threads, Ticket, Work
from engine_plugins.tiers.disk.writer import Writer

log = logging.getLogger("engine.tiers.disk")

SEGMENT_BYTES = 256 << 20  # of a segment, about, where the bound is much more
LEAST_SEGMENTS = 8  # that fit the bound, so that eviction takes little at a time
READERS, WRITERS = 8, 2
PATIENCE_SECONDS = 1.0  # a call may take so long, and what its bytes take at the slowest pace that is worth it
SLOWEST_BYTES = 100e6  # a second
REFRESH_SECONDS = 1.0  # how old what is known of others' segments may be
DIRECT_BYTES = 64 << 10  # a page of so many bypasses the page cache
CLEAR_PATIENCE = 25.0  # times as long as for others: many files are removed, and a user waits 30 s
TOUCH_SECONDS = 10.0  # how often a segment in use is said to be


class DiskStore:
    """An `engine.plugin.tiers.Store` in the folder `argument`, which has `capacity_bytes` for all manifests together.

    Raises ConfigError where that is less than two segments of a page each, and for nothing else: a disk that fails
    keeps nothing."""

    def __init__(
        self,
        *,
        capacity_bytes: int,
        page_bytes: int,
        manifest: Manifest,
        argument: str,
        files: Files | None = None,
        patience: float = PATIENCE_SECONDS,
        pause: float = PAUSE_SECONDS,
        refresh: float = REFRESH_SECONDS,
        direct: bool | None = None,
    ) -> None:
        path, self._manifest = os.path.abspath(argument), manifest
        self._layout = layout_for(path, capacity_bytes, page_bytes, manifest)
        self._capacity, self._patience, self._pause, self._refresh_seconds = capacity_bytes, patience, pause, refresh
        self._files = files = files or Files()
        self._index = Index()
        self._lock = threading.Lock()  # of the index, the counts and the times below
        direct = page_bytes >= DIRECT_BYTES if direct is None else direct
        self._folder = Folder(files, path, self._layout, capacity_bytes, self._removed, direct=direct)
        self._counts: Counter[str] = Counter()
        self._said: set[str] = set()
        self._writer = Writer(files, self._folder, self._is_full, self._adopted)
        self._prepared = False
        # What came to be put before the last flush is not kept, and until the disk has done it nothing is found.
        self._flushes = self._flushes_done = 0
        self._why = ""  # the disk does not take writes, as it was said last
        self._refreshed = -refresh
        self._no_writes_until = 0.0
        size = self._layout.stride
        self._reading = Threads("kv-disk-read", READERS, size, pause)
        self._looking = Threads("kv-disk-look", 1, 0, 0.0)
        self._writing = Threads("kv-disk-write", WRITERS, size, pause)
        self._clearing = Threads("kv-disk-clear", 1, 0, 0.0)
        self._look()

    # ── the store ────────────────────────────────────────────────────────────────────────────

    def put(self, keys: Sequence[bytes], pages: Sequence[memoryview], /) -> list[bool]:
        """As Store.put. A page that is there already is not written again."""
        if not self._is_cleared():
            return [False] * len(keys)
        flush = self._flushes
        works = [self._guarded("write", partial(self._put, flush, *each)) for each in self._checked(keys, pages)]
        return self._run(self._writing, works)

    def get(self, keys: Sequence[bytes], into: Sequence[memoryview], /) -> list[bool]:
        """As Store.get."""
        if not self._is_cleared():
            return [False] * len(keys)
        works = [self._guarded("read", partial(self._get, *each)) for each in self._checked(keys, into)]
        return self._run(self._reading, works)

    def _checked(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> list[tuple[bytes, memoryview]]:
        pairs = list(zip(keys, pages, strict=True))
        for key, page in pairs:
            assert len(key) == KEY_BYTES and page.nbytes == self._layout.page_bytes, "a page of another size or key"
        return pairs

    def has(self, keys: Sequence[bytes], /) -> list[bool]:
        """As Store.has; what others did less than a second ago may not be seen."""
        if self._reading.passed_over or not self._is_cleared():
            return [False] * len(keys)
        if time.monotonic() - self._refreshed >= self._refresh_seconds:
            self._look()
        with self._lock:
            return [self._index.get(key) is not None for key in keys]

    def drop(self, keys: Sequence[bytes], /) -> None:
        """As Store.drop, for all who share the folder."""
        with self._lock:
            places = [(key, place) for key in keys if (place := self._index.forget(key)) is not None]
        self._run(self._writing, [self._guarded("write", partial(self._erase, *each)) for each in places])

    def held(self) -> Held:
        """The pages of this manifest; the bound is that of all."""
        with self._lock:
            pages = len(self._index)
        return Held(pages, pages * self._layout.page_bytes, self._capacity, self.counts())

    def clear(self) -> str:
        """As Store.clear, for all who share the folder. Until the disk has done it, nothing is found here, and nothing
        is written. Many segments take it long, which is no stall."""
        with self._lock:
            self._flushes += 1
        return "" if self._clear_all(waits=True) else f"the disk {self._folder.root} {self._why}"

    def _clear_all(self, *, waits: bool = False) -> bool:
        """Whether the disk has forgotten what it had at the last flush. If it still removes what it had at one before,
        that is not known, unless this `waits` for it."""
        self._why = "does not answer"
        seconds = CLEAR_PATIENCE * self._patience
        self._clearing.run([self._guarded("write", self._clear)], seconds, waits=waits)
        return self._flushes_done == self._flushes

    def _is_cleared(self) -> bool:
        """Whether all is gone that was to be; what the disk has refused to remove is tried again after its pause."""
        if self._flushes_done == self._flushes:
            return True
        return time.monotonic() >= self._no_writes_until and self._clear_all()

    def close(self) -> None:
        """As Store.close."""
        for threads in (self._looking, self._reading, self._writing, self._clearing):
            threads.close()
        if not self._writing.passed_over:
            with suppress(OSError):
                self._writer.close()

    def counts(self) -> dict[str, int]:
        """What this process did so far: `pages_read`, `bytes_read`, `pages_written`, `bytes_written`; pages that were
        `corrupt` or `refused` for want of room; `errors` of the system; calls that came too late (`stalls`); segments
        `evicted`."""
        with self._lock:
            counts = dict(self._counts)
        names = ("pages_read", "bytes_read", "pages_written", "bytes_written", "corrupt", "refused", "errors")
        return {name: counts.get(name, 0) for name in names} | {
            "stalls": self._reading.stalls + self._writing.stalls,
            "evicted": self._folder.evicted,
        }

    # ── calls ────────────────────────────────────────────────────────────────────────────────

    def _run(self, threads: Threads, works: Sequence[Work]) -> list[bool]:
        """What the works return, in time."""
        stalls = threads.stalls
        seconds = self._patience + len(works) * self._layout.page_bytes / SLOWEST_BYTES
        results = threads.run(works, seconds)
        if threads.stalls > stalls:
            self._say("stall", f"does not answer within {seconds:.1f} s, and is passed over for {self._pause:.0f} s")
        return results

    def _guarded(self, kind: str, work: Callable[[Ticket], bool]) -> Work:
        """`work`, in which errors of the system are counted, said and False."""

        def run(ticket: Ticket) -> bool:
            try:
                return work(ticket)
            except OSError as error:
                self._count("errors")
                if kind == "write":
                    self._no_writes_until = time.monotonic() + self._pause
                    self._prepared = False  # somebody may have removed the folder
                cause = f"fails to {kind}: {error.strerror or type(error).__name__}"
                if kind == "write":
                    self._why = cause
                self._say(f"{kind} {error.errno}", f"{cause}; pages are computed again")
                return False

        return run

    def _say(self, kind: str, said: str) -> None:
        with self._lock:
            if kind in self._said:
                return
            self._said.add(kind)
        log.warning("the KV cache's disk %s %s (said once)", self._folder.root, said)

    def _count(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._counts[name] += count

    # ── works ────────────────────────────────────────────────────────────────────────────────

    def _put(self, flush: int, key: bytes, page: memoryview, ticket: Ticket) -> bool:
        with self._lock:
            place = self._index.get(key)
        if place is not None:
            self._touch(place.segment)
            return True
        if time.monotonic() < self._no_writes_until:
            return False
        if not ticket.copy(ticket.buffer[: page.nbytes], page):
            return False
        self._prepare()
        with self._writer.entry() as free:
            if free is None:
                self._count("refused")
                self._no_writes_until = time.monotonic() + self._pause
                self._say("full", "has no room: all that could leave is being written by others")
                return False
            active, number = free
            segment = active.segment
            entry = Entry(number, key, page_checksum(segment.id, number, key, ticket.buffer[: page.nbytes]))
            self._folder.write_page(segment, number, ticket.buffer)
            if flush != self._flushes:  # it took so long that the page was to be forgotten meanwhile
                return False
            self._writer.write_entry(active, entry)
        with self._lock:
            self._counts["pages_written"] += 1
            self._counts["bytes_written"] += page.nbytes
            self._index.written(segment, entry)
        return True

    def _get(self, key: bytes, into: memoryview, ticket: Ticket) -> bool:
        size = self._layout.page_bytes
        with self._lock:
            place = self._index.get(key)
        if place is None:
            return False
        segment = place.segment
        try:
            count = self._folder.read_page(segment, place.number, ticket.buffer)
        except FileNotFoundError:  # evicted by somebody else
            self._removed(segment.name)
            return False
        except OSError:
            with self._lock:
                self._index.forget(key)
            raise
        page = ticket.buffer[:size]
        if count < size or page_checksum(segment.id, place.number, key, page) != place.checksum:
            self._wrong(key, place)
            return False
        if not ticket.copy(into, page):
            return False
        with self._lock:
            self._counts["pages_read"] += 1
            self._counts["bytes_read"] += size
        self._touch(segment)
        return True

    def _wrong(self, key: bytes, place: Place) -> None:
        """A page is not what was written."""
        with self._lock:
            if self._index.get(key) == place:
                self._index.forget(key)
        if not self._is_in_table(key, place):
            return  # erased by somebody else
        self._count("corrupt")
        self._say("corrupt", f"has a page whose checksum is wrong, in {place.segment.name}; it is computed again")
        self._folder.erase(place.segment, place.number)

    def _is_in_table(self, key: bytes, place: Place) -> bool:
        entry = self._folder.entry(place.segment, place.number)
        return entry is not None and entry.key == key

    def _erase(self, key: bytes, place: Place, ticket: Ticket) -> bool:
        if self._is_in_table(key, place):
            self._folder.erase(place.segment, place.number)
        return True

    def _clear(self, ticket: Ticket) -> bool:
        flush = self._flushes  # what comes from now on may leave something behind
        self._folder.clear()
        self._refresh(ticket)
        with self._lock:
            self._flushes_done = max(self._flushes_done, flush)
        return True

    def _touch(self, segment: Segment) -> None:
        """A segment is in use: it leaves later. Where that cannot be noted, as on a disk that is read only, the page is
        no worse for it."""
        now = time.monotonic()
        if now - segment.touched > TOUCH_SECONDS:
            segment.touched = now
            with suppress(OSError):
                self._files.touch(self._folder.path_of(segment))

    def _prepare(self) -> None:
        if not self._prepared:
            self._folder.prepare(self._manifest)
            self._prepared = True

    # ── segments of others ───────────────────────────────────────────────────────────────────

    def _look(self) -> None:
        """See what others have written, or a life before this one. If it takes long, it goes on after this returns, and
        nobody looks again meanwhile."""
        self._refreshed = time.monotonic()
        self._looking.run([self._guarded("read", self._refresh)], self._patience)

    def _refresh(self, ticket: Ticket) -> bool:
        """Read the tables that have changed. One that cannot be read raises OSError once all others are."""
        listed = self._folder.listed()
        with self._lock:
            gone = self._index.segments.keys() - {found.name for found in listed}
        for name in gone:
            self._removed(name)
        with self._lock:
            known = {name: segment.seen for name, segment in self._index.segments.items()}
        refusal: OSError | None = None
        for found in listed:
            if known.get(found.name) == found.used:
                continue
            try:
                read = self._folder.read(found.name)
            except OSError as error:
                refusal = refusal or error
                continue
            if read is not None:
                self._adopted(*read).seen = found.used
            else:
                self._removed(found.name)  # emptied
        if refusal is not None:
            raise refusal
        return True

    def _removed(self, name: str) -> None:
        """The segment `name` is gone."""
        with self._lock:
            self._index.forget_segment(name)

    def _is_full(self, name: str) -> bool:
        with self._lock:
            segment = self._index.segments.get(name)
            return segment is not None and segment.full

    def _adopted(self, segment: Segment, entries: list[Entry]) -> Segment:
        """The segment as it is known from now on, with what its table says."""
        with self._lock:
            segment = self._index.segments.get(segment.name, segment)
            self._index.add(segment, entries)
        return segment


def layout_for(path: str, capacity: int, page_bytes: int, manifest: Manifest) -> Layout:
    """How the segments are that a store writes. Raises ConfigError where two do not fit `capacity`."""
    layout = Layout(digest_of(manifest, page_bytes), page_bytes, MOST_PAGES)
    wanted = min(SEGMENT_BYTES, capacity // LEAST_SEGMENTS)
    layout = layout._replace(pages=max(1, min(MOST_PAGES, wanted // layout.stride)))
    while layout.pages > 1 and layout.size > capacity // 2:
        layout = layout._replace(pages=layout.pages - 1)
    if layout.size > capacity // 2:
        raise ConfigError(
            f"the disk tier {path} has {capacity} bytes, and two segments of one page take {2 * layout.size}; give it "
            "more room"
        )
    return layout
