"""Pages of the KV cache in files, which outlive the engine and which engines of one host share.

    PATH/lock                       held while room is made: one engine at a time counts and evicts
    PATH/<digest of a manifest>/    pages of one model, dtype, layout, page size and parallel shape, and no others
        manifest.json               what that is, for people
        <id>.kv                     a segment: up to 4096 pages

A segment has its full size from the start, so the bound is kept by adding sizes; what was not written takes no room.

    0                4096                                                     stride: a page, to a whole block
    ┌────────────────┬──────────────────────────┬───────────┬───────────┬─ ─
    │ head           │ a table: an entry a page │ page 0    │ page 1    │
    └────────────────┴──────────────────────────┴───────────┴───────────┴─ ─
    head     magic, digest, id, bytes of a page, entries; CRC-32 of these
    entry    key, CRC-32 of page and place; CRC-32 of these and of the place

The place is the segment's id and the number of the entry, so neither an old block of the file system nor a page that
went elsewhere is ever taken for this one. A page is written before its entry. Neither is synced: whatever a crash has
lost or torn, a checksum does not fit, and there is no such page. So recovery is to read heads and tables. That segments
were removed for a user is synced.

- One writer a segment: it holds the file's lock (flock), and the kernel takes that from a process that dies. A segment
  that has room and no writer is gone on with. All read all segments, and see new ones within a second.
- The bound is that of PATH, whoever wrote there: ranks and engines that share it name the same. Whole segments leave,
  the least recently used first: the time of a file is that of its last use. None that is written leaves.
- A few threads use the disk. A call that is not answered in time returns False, and for some seconds nothing is asked
  again. What the threads read and write is memory of their own, so a disk that answers later harms no caller.
- Pages of 64 KiB and more bypass the page cache (O_DIRECT) where the file system lets them: that is as fast as the
  disk, or nearly, and takes no memory from the host's tier (`python -m bench.engine.disk_tier`).

Left out: copying hot pages forward out of a segment that leaves; compression; pages of several sizes in one manifest.
"""

from engine_plugins.tiers.disk.store import DiskStore

__all__ = ["DiskStore"]
