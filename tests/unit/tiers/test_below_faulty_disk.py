"""The scheduler over a faulty disk: replies are right, nothing leaks, and what a disk refuses it is given later."""

import errno
import random
from pathlib import Path

import pytest
from disk_below import DiskBelow
from faulty_disk import Faults, FaultyFiles, damage
from simulated_device import VOCABULARY
from test_batcher import request
from test_moves import LONG, TierBench, run

KINDS = (
    *({"errors": {"write": errno.ENOSPC}}, {"errors": {"open": errno.EROFS}}, {"errors": {"read": errno.EIO}}),
    *({"room": 0}, {"room": 300}, {"flips": 0.3}, {"short": True}, {"stall": frozenset(["read"]), "seconds": 0.3}),
)


@pytest.mark.parametrize("seed", range(2))
def test_replies_are_right_whatever_a_disk_does(tmp_path: Path, seed: int) -> None:
    """Faults come and go, files are damaged, and lives of the engine end, some of them with a power failure."""
    draw = random.Random(seed)
    files = FaultyFiles()
    bench = TierBench(20, pages=12, slots=3, max_step_tokens=9)
    bench.below = below = DiskBelow(bench.device, 20, tmp_path, files)
    histories: list[list[int]] = [[] for _ in range(6)]
    for turn in range(120):
        files.faults = Faults(**draw.choice(KINDS), seed=turn) if turn % 4 == 3 else Faults()
        if turn % 8 == 5 and any(tmp_path.rglob("*.kv")):
            damage(tmp_path, draw)
        if turn % 20 == 19:
            bench.lose()
            below.disk.close()
            if turn % 40 == 39:
                files.lose()
            files = FaultyFiles(files.faults)
            below.start(files)
        number = draw.randrange(6)
        histories[number] = [*histories[number][:28], *(draw.randrange(VOCABULARY) for _ in range(5))]
        bench.admit(request(f"r{turn}", histories[number], max_new=draw.randint(1, 3)))
        while bench.live and draw.random() < 0.95:
            bench.step()
        bench.scheduler.check_integrity()
    files.faults = Faults()
    counts = bench.moves.stats()
    bench.drain()
    assert below.disk.held().pages == 0
    below.disk.close()
    assert counts.from_store > 3 and counts.kept > 10 and counts.failed > 10, counts


@pytest.mark.parametrize(
    "faults", [Faults(room=0), Faults(errors={"write": errno.EROFS}), Faults(errors={"make_folder": errno.EACCES})]
)
def test_what_a_disk_could_not_take_it_is_given_once_it_can(tmp_path: Path, faults: Faults) -> None:
    files = FaultyFiles(faults)
    bench = TierBench(40, pages=11)
    bench.pace = 0.0  # no pause ends by itself
    bench.below = below = DiskBelow(bench.device, 40, tmp_path, files)
    assert run(bench, "a", LONG) == (0, 33)
    assert run(bench, "b", [3] * 20) == (0, 20)
    failed = bench.moves.stats().failed
    assert below.disk.held().pages == 0 and failed == 8  # the others came while nothing was offered
    files.calls.clear()
    faults.room = None
    faults.errors.clear()
    for now, kept in ((14.9, 0), (15.0, 13)):
        assert bench.moves.tick(now) == (now == 15.0)
        bench.go_on()
        while bench.below.moving:
            bench.finish()
        assert below.disk.held().pages == kept and bool(files.calls) == bool(kept)
    assert bench.moves.stats().failed == failed
    bench.lose()
    assert run(bench, "c", LONG) == (32, 1)
    bench.scheduler.check_integrity()
    below.disk.close()
