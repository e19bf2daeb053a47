"""How much of the machine's memory a process of ours has taken, and may still take, without torch."""

import os
import resource
import sys
from pathlib import Path

CGROUP = "/sys/fs/cgroup/memory."


def free_memory() -> int:
    """Bytes that can be allocated now, by the kernel's estimate and within the limit of the cgroup."""
    free = _meminfo_available()
    limit, used = (_read_number(f"{CGROUP}{name}") for name in ("max", "current"))
    return free if limit is None or used is None else min(free, max(limit - used, 0))


def peak_memory() -> int:
    """The most bytes that this process has taken so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _meminfo_available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux: the whole of it


def _read_number(path: str) -> int | None:
    """The number in a cgroup file; None when there is no such file or no limit ("max")."""
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
