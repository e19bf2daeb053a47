"""How many processors there are for us: those that this process may run on, within what its cgroups grant.

A container often sees all processors of its machine and may use the time of a few: threads beyond that are stopped
together, in the middle of a step. Left out: cgroups of version 1, where their limit is not at the root of the mount.
"""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")


def processors() -> int:
    """Processors that this process may use, hyper-threads counted each; at least one."""
    return _granted(len(_allowed()))


def cores() -> int:
    """As `processors`, hyper-threads counted once: those of one core share its matrix units."""
    found = set()
    for cpu in _allowed():
        siblings = TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list"
        found.add(siblings.read_text() if siblings.exists() else cpu)
    return _granted(len(found))


def _allowed() -> set[int]:
    """The numbers of the processors that the scheduler may put this process on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _granted(count: int) -> int:
    """`count`, or fewer where a cgroup grants less time than that of so many."""
    return max(1, int(min([count, *_quotas()])))


def _quotas() -> Iterator[float]:
    """Processors' worth of time that the cgroups of this process grant: its own, and each above it."""
    for folder in _cgroups():
        quota, period = _numbers(folder / "cpu.max")
        if quota is not None and period:
            yield quota / period
    for name in ("cpu", "cpu,cpuacct"):  # version 1
        (quota, *_), (period, *_) = (_numbers(CGROUPS / name / f"cpu.cfs_{what}_us") for what in ("quota", "period"))
        if quota is not None and period:
            yield quota / period


def _cgroups() -> Iterator[Path]:
    """The folders of this process's cgroup (version 2) and of those above it, up to the root that it sees."""
    place = Path("/")
    if MEMBERSHIP.exists():
        for line in MEMBERSHIP.read_text().splitlines():
            if line.startswith("0::/"):
                place = Path(line.removeprefix("0::"))
    for path in (place, *place.parents):
        yield CGROUPS / path.relative_to("/")


def _numbers(file: Path) -> tuple[int | None, int | None]:
    """The first two numbers in a cgroup's file; None for one that is not there, or no limit ("max", -1)."""
    try:
        words = file.read_text().split()
    except OSError:  # no such cgroup, or not for us to read
        words = []
    first, second, *_ = [*(int(word) if word.isdigit() else None for word in words), None, None]
    return first, second
