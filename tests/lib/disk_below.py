"""SimulatedTiers whose store is the disk tier, over a disk with faults: pages are the hashes that the device wrote."""

import struct
from pathlib import Path
from typing import Any

from faulty_disk import FaultyFiles
from simulated_device import SimulatedDevice
from simulated_tiers import SimulatedTiers

from engine.messages.tiers import Move
from engine_plugins.tiers.disk.store import DiskStore


class DiskBelow(SimulatedTiers):
    """In `folder`, by the calls of `files`. Faults are over as soon as a test says so: the store does not pause."""

    def __init__(self, device: SimulatedDevice, host: int, folder: Path, files: FaultyFiles) -> None:
        super().__init__(device, host)
        self._page = struct.Struct(f"<{device.page_size}q")
        self._folder = folder
        self.start(files)

    def start(self, files: FaultyFiles) -> None:
        """Another process opens the store, which finds what the one before has left."""
        terms: dict[str, Any] = {"capacity_bytes": 1 << 20, "page_bytes": self._page.size, "manifest": {}}
        options: dict[str, Any] = {"patience": 0.1, "pause": 0.0, "refresh": 0.0}
        self.disk = DiskStore(argument=str(self._folder), files=files, **terms, **options)

    def _do(self, move: Move, place: int, slots: list[int], pages: list[int], names: list[bytes]) -> bool:
        match move.way:
            case "keep":
                page = memoryview(bytearray(self._page.pack(*self._read(self.pool, slots[place]))))
                return self.disk.put([names[place]], [page])[0]
            case "fetch":
                page = memoryview(bytearray(self._page.size))
                if not self.disk.get([names[place]], [page])[0]:
                    return False
                self._write(self.pool, slots[place], list(self._page.unpack(page)))
                return True
            case "find":
                return self.disk.has([names[place]])[0]
            case "clear":
                return not self.disk.clear()
        return super()._do(move, place, slots, pages, names)
