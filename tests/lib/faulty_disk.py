"""A disk with faults under the disk tier: calls that fail, stall, do half, or lie; and what a power failure leaves.

As a plugin (`--plugins tests/lib/faulty_disk.py`) it is the tier `faulty`, whose argument is a path and the faults:

    /path?errors=read:EIO,write:ENOSPC&flips=0.1&room=1000000&short=1&stall=read,write&seconds=2&seed=1
"""

import errno
import os
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from engine.plugin import hookimpl
from engine.plugin.tiers import Manifest, Store
from engine_plugins.tiers.disk.files import Files
from engine_plugins.tiers.disk.store import DiskStore

API = 1
SECTOR = 512
CALLS = (
    *("make_folder", "folders", "files", "open", "close", "read", "write", "resize", "lock", "is_there", "touch"),
    *("remove", "sync"),
)


@dataclass
class Faults:
    """What goes wrong from now on; a test may change it at any time."""

    errors: dict[str, int] = field(default_factory=dict)  # by call: the errno it fails with
    room: int | None = None  # bytes that may still be written
    short: bool = False  # reads and writes do about half of what is asked
    flips: float = 0.0  # how often what is read has one bit that is wrong
    stall: frozenset[str] = frozenset()  # calls that wait until `resumed` is set, or for `seconds`
    seconds: float | None = None
    seed: int = 0
    resumed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)


class FaultyFiles(Files):
    """The calls of the operating system, with `faults`; they remember what was written and removed."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.calls: list[str] = []
        self._paths: dict[int, str] = {}
        self._written: list[tuple[str, int, bytes]] = []  # path, place, and what was there before
        self._removed: list[tuple[str, bytes]] = []  # path, and what was in it
        for call in CALLS:
            setattr(self, call, self._with_faults(call, getattr(self, call)))

    def _with_faults(self, call: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            self.calls.append(call)
            if call in self.faults.stall:
                self.faults.resumed.wait(self.faults.seconds)
            # Descriptors are closed all the same, or a test would leak them.
            result = do(*given, **named) if call == "close" or call not in self.faults.errors else None
            if (number := self.faults.errors.get(call)) is not None:
                raise OSError(number, os.strerror(number))
            return result

        return run

    def open(self, path: str, flags: int) -> int:
        descriptor = super().open(path, flags)
        self._paths[descriptor] = path
        return descriptor

    def read(self, descriptor: int, into: memoryview, at: int) -> int:
        if self.faults.short and len(into) > 1:
            into = into[: len(into) // 2]
        count = super().read(descriptor, into, at)
        if count and self.faults.random.random() < self.faults.flips:
            into[self.faults.random.randrange(count)] ^= 1 << self.faults.random.randrange(8)
        return count

    def write(self, descriptor: int, data: Sequence[memoryview | bytes], at: int) -> int:
        whole = b"".join(bytes(each) for each in data)
        if self.faults.short and len(whole) > 1:
            whole = whole[: len(whole) // 2]
        if self.faults.room is not None:
            if not self.faults.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            whole = whole[: self.faults.room]
            self.faults.room -= len(whole)
        path = self._paths[descriptor]
        with open(path, "rb") as file:
            file.seek(at)
            self._written.append((path, at, file.read(len(whole)).ljust(len(whole), b"\0")))
        return super().write(descriptor, [whole], at)

    def remove(self, path: str) -> None:
        data = Path(path).read_bytes() if os.path.exists(path) else b""
        super().remove(path)
        self._removed.append((path, data))

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        self._removed = [each for each in self._removed if os.path.dirname(each[0]) != self._paths[descriptor]]

    def lose(self) -> None:
        """The power fails: of what was ever written, each sector is on the disk or is as it was before. Files may be
        shorter, or not there. What was removed is there again, unless its folder was synced."""
        choose = self.faults.random
        for path, data in self._removed:
            Path(path).write_bytes(data)
        self._removed.clear()
        for path, at, before in reversed(self._written):
            if not os.path.exists(path):
                continue
            with open(path, "r+b") as file:
                for start in range(0, len(before), SECTOR):
                    if choose.random() < 0.3:
                        file.seek(at + start)
                        file.write(before[start : start + SECTOR])
        for path in {path for path, _, _ in self._written if path.endswith(".kv") and os.path.exists(path)}:
            match choose.randrange(8):
                case 0:
                    os.unlink(path)
                case 1:
                    os.truncate(path, choose.randrange(os.path.getsize(path) + 1))
        self._written.clear()


def damage(folder: Path, choose: random.Random) -> None:
    """Do something bad to one of the files in `folder`: a bit, a block, or its end."""
    path = choose.choice(sorted(folder.rglob("*.kv")))
    size = path.stat().st_size
    with path.open("r+b") as file:
        match choose.randrange(4):
            case 0:
                os.truncate(path, choose.randrange(size))
            case 1:
                file.seek(choose.randrange(size) // SECTOR * SECTOR)
                file.write(bytes(SECTOR))
            case 2:
                data = path.read_bytes()
                start = choose.randrange(size) // SECTOR * SECTOR
                file.seek(choose.randrange(size) // SECTOR * SECTOR)
                file.write(data[start : start + SECTOR])  # a sector that went elsewhere
            case _:
                at = choose.randrange(size)
                file.seek(at)
                (byte,) = file.read(1)
                file.seek(at)
                file.write(bytes([byte ^ 1 << choose.randrange(8)]))


def faults_of(text: str) -> Faults:
    """The faults that an argument of the tier names."""
    given = dict(parse_qsl(text, strict_parsing=True)) if text else {}
    errors = [pair.split(":") for pair in given.get("errors", "").split(",") if pair]
    return Faults(
        errors={call: getattr(errno, name) for call, name in errors},
        room=int(given["room"]) if "room" in given else None,
        short=given.get("short") == "1",
        flips=float(given.get("flips", 0)),
        stall=frozenset(filter(None, given.get("stall", "").split(","))),
        seconds=float(given["seconds"]) if "seconds" in given else None,
        seed=int(given.get("seed", 0)),
    )


def build(*, capacity_bytes: int, page_bytes: int, manifest: Manifest, argument: str) -> Store:
    """The disk tier over a disk with the faults that `argument` names."""
    path, _, text = argument.partition("?")
    return DiskStore(
        capacity_bytes=capacity_bytes,
        page_bytes=page_bytes,
        manifest=manifest,
        argument=path,
        files=FaultyFiles(faults_of(text)),
    )


@hookimpl
def register_tiers(register: Callable[..., None]) -> None:
    register("faulty", "faulty_disk:build", kind="store")
