"""Hundreds of connections at once to two fronts, half of them dropped: bench/http/soak.py in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")
def test_nothing_leaks_from_connections_that_are_dropped(tmp_path: Path) -> None:
    found = tmp_path / "soak.json"
    options = ["--connections", "300", "--fronts", "2", "--rounds", "2", "--json", str(found)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.http.soak", *options], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = json.loads(found.read_text())["rounds"]
    for each in (first, second):
        assert each["outcomes"] == {"whole": 150, "dropped": 150}
    fronts = [name for name in second["processes"] if "front" in name]
    assert len(fronts) == 2
