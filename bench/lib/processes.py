"""What the system says of a server's processes: which there are, their CPU time, memory and descriptors.

For Linux: all is read from /proc.
"""

import os
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
FRONT = "front"  # in the name of the module that a front process runs


def children(parent: int) -> dict[int, str]:
    """Process id to the module that it runs (`engine.worker`), of all Python processes below `parent`."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            owner = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has gone meanwhile
            continue
        if owner == parent and b"-m" in words:
            pid = int(entry.name)
            found |= {pid: words[words.index(b"-m") + 1].decode(), **children(pid)}
    return found


def fronts(server: int) -> list[int]:
    """The processes of `server` that serve HTTP: its front processes, or itself where it has none."""
    return [pid for pid, module in children(server).items() if FRONT in module] or [server]


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process, its children apart."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident_bytes(pid: int) -> int:
    """Bytes in memory; 0 for a process that has gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def resident(pid: int) -> int:
    """MiB in memory; 0 for a process that has gone."""
    return resident_bytes(pid) >> 20


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))
