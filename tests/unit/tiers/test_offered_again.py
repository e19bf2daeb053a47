"""A disk that can be written again is given, after a pause, what it could not take: a scheduler over a faulty disk."""

import errno
import struct
from pathlib import Path
from typing import Any

import pytest
from faulty_disk import Faults, FaultyFiles
from simulated_tiers import SimulatedTiers
from test_moves import LONG, TierBench, run

from engine.messages.tiers import Move
from engine_plugins.tiers.disk.store import DiskStore

PAGE = struct.Struct("<4q")  # the hashes of a simulated page


class DiskBelow(SimulatedTiers):
    """As SimulatedTiers, but its store is a disk."""

    disk: DiskStore

    def _do(self, move: Move, place: int, slots: list[int], pages: list[int], names: list[bytes]) -> bool:
        match move.way:
            case "keep":
                page = memoryview(bytearray(PAGE.pack(*self._read(self.pool, slots[place]))))
                return self.disk.put([names[place]], [page])[0]
            case "fetch":
                page = memoryview(bytearray(PAGE.size))
                if not self.disk.get([names[place]], [page])[0]:
                    return False
                self._write(self.pool, slots[place], list(PAGE.unpack(page)))
                return True
            case "find":
                return self.disk.has([names[place]])[0]
        return super()._do(move, place, slots, pages, names)


@pytest.mark.parametrize(
    "faults", [Faults(room=0), Faults(errors={"write": errno.EROFS}), Faults(errors={"make_folder": errno.EACCES})]
)
def test_what_a_disk_could_not_take_it_is_given_once_it_can(tmp_path: Path, faults: Faults) -> None:
    files = FaultyFiles(faults)
    terms: dict[str, Any] = {"capacity_bytes": 1 << 20, "page_bytes": PAGE.size, "manifest": {}, "refresh": 0.0}
    bench = TierBench(40, pages=11)
    bench.pace = 0.0  # no pause ends by itself
    bench.below = DiskBelow(bench.device, 40)
    bench.below.disk = DiskStore(argument=str(tmp_path), files=files, pause=0.0, **terms)
    assert run(bench, "a", LONG) == (0, 33)
    assert run(bench, "b", [3] * 20) == (0, 20)
    failed = bench.moves.stats().failed
    assert bench.below.disk.held().pages == 0 and failed == 8  # the others came while nothing was offered
    files.calls.clear()
    faults.room = None
    faults.errors.clear()
    for now, kept in ((14.9, 0), (15.0, 13)):
        assert bench.moves.tick(now) == (now == 15.0)
        bench.go_on()
        while bench.below.moving:
            bench.finish()
        assert bench.below.disk.held().pages == kept and bool(files.calls) == bool(kept)
    assert bench.moves.stats().failed == failed
    bench.lose()
    assert run(bench, "c", LONG) == (32, 1)
    bench.scheduler.check_integrity()
    bench.below.disk.close()
