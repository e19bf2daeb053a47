"""How many processors there are for us: by affinity, and by what cgroups grant."""

from pathlib import Path

import pytest

from engine.runtime import processors as module
from engine.runtime.processors import cores, processors


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight processors, of which this process may run on six: two threads a core. Its cgroup is /a/b."""
    monkeypatch.setattr(module, "_allowed", lambda: set(range(6)))
    for name in ("CGROUPS", "TOPOLOGY"):
        monkeypatch.setattr(module, name, tmp_path)
    membership = tmp_path / "membership"
    membership.write_text("1:cpu:/other\n0::/a/b\n")
    monkeypatch.setattr(module, "MEMBERSHIP", membership)
    for cpu in range(8):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    return tmp_path


def test_affinity_counts_and_threads_of_one_core_count_once(machine: Path) -> None:
    assert (processors(), cores()) == (6, 3)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a/b/cpu.max": "max 100000"}, (6, 3)),
        ({"a/b/cpu.max": "400000 100000"}, (4, 3)),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, (2, 2)),
        ({"a/b/cpu.max": "50000 100000"}, (1, 1)),
        ({"cpu.max": "100000 100000"}, (1, 1)),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, (2, 2)),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, (6, 3)),
        ({"a/b/cpu.max": "what is this"}, (6, 3)),
    ],
)
def test_the_least_that_a_cgroup_grants_is_what_there_is(
    files: dict[str, str], expected: tuple[int, int], machine: Path
) -> None:
    for name, text in files.items():
        file = machine / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert (processors(), cores()) == expected


def test_a_machine_without_any_of_this_has_processors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CGROUPS", "TOPOLOGY", "MEMBERSHIP"):
        monkeypatch.setattr(module, name, tmp_path / "nowhere")
    monkeypatch.setattr(module.os, "sched_getaffinity", None, raising=False)
    monkeypatch.delattr(module.os, "sched_getaffinity")
    monkeypatch.setattr(module.os, "cpu_count", lambda: None)
    assert (processors(), cores()) == (1, 1)
