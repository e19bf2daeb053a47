"""The calls of the operating system that the store makes: all of them, so that tests can make each of them fail.

Left out: what the files hold.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from typing import NamedTuple


class Found(NamedTuple):
    """A file: its name, its bytes, and when it was last used, in nanoseconds."""

    name: str
    size: int
    used: int


class Files:
    """Every method may raise OSError."""

    def make_folder(self, path: str) -> None:
        os.makedirs(path, mode=0o700, exist_ok=True)

    def folders(self, path: str) -> list[str]:
        """The names of the folders in `path`."""
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]

    def files(self, path: str, ending: str) -> list[Found]:
        """The files in `path` whose names end so."""
        found = []
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.endswith(ending):
                    continue
                try:
                    about = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # somebody else's eviction
                    continue
                if stat.S_ISREG(about.st_mode):
                    found.append(Found(entry.name, about.st_size, about.st_mtime_ns))
        return found

    def open(self, path: str, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def read(self, descriptor: int, into: memoryview, at: int) -> int:
        """How many bytes of the file were read, from `at` on; fewer than asked for where the file ends."""
        return os.preadv(descriptor, [into], at)

    def write(self, descriptor: int, data: Sequence[memoryview | bytes], at: int) -> int:
        """How many bytes were written from `at` on."""
        return os.pwritev(descriptor, data, at)

    def resize(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def lock(self, descriptor: int, *, wait: bool) -> bool:
        """Take the lock of an open file; False if another has it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def is_there(self, descriptor: int) -> bool:
        """Whether an open file has been neither removed nor emptied."""
        about = os.fstat(descriptor)
        return about.st_nlink > 0 and about.st_size > 0

    def touch(self, path: str) -> None:
        """`path` is used now."""
        os.utime(path)

    def remove(self, path: str) -> None:
        os.unlink(path)

    def sync(self, descriptor: int) -> None:
        """What was done to a file, or to the names in a folder, outlives a power failure."""
        os.fsync(descriptor)


def read_all(files: Files, descriptor: int, into: memoryview, at: int) -> int:
    """As Files.read, until `into` is full or the file ends."""
    done = 0
    while done < len(into) and (count := files.read(descriptor, into[done:], at + done)):
        done += count
    return done


def write_all(files: Files, descriptor: int, data: memoryview, at: int) -> None:
    """Write all of `data`. A disk that is full raises OSError at once or after a part of it."""
    done = 0
    while done < len(data):
        count = files.write(descriptor, [data[done:]], at + done)
        if not count:
            raise OSError(errno.EIO, "nothing was written, and no error was given")
        done += count
