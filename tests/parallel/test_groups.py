"""Joining the other ranks: alone there is nothing to join, and who does not find the others says so."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from engine.parallel.collectives import all_reduce
from engine.parallel.groups import Groups, join
from engine.parallel.mesh import Mesh

ALONE_PROGRAM = """
import sys
import torch
before = set(sys.modules)
from engine.parallel.collectives import all_gather, all_reduce, broadcast, reduce_scatter
from engine.parallel.groups import join
from engine.parallel.mesh import ALONE, AXES
groups = join(ALONE, "nowhere")
tensor = torch.ones(2, 3)
for axis in AXES:
    for each in (all_reduce, all_gather, reduce_scatter, broadcast):
        assert each(tensor, groups.along(axis)) is tensor
groups.leave()
sys.exit(any(name.startswith("torch.distributed") for name in set(sys.modules) - before))
"""


def test_alone_a_rank_does_nothing_and_imports_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE_PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr or "torch.distributed was imported"


def test_ranks_that_have_not_joined_cannot_talk() -> None:
    with pytest.raises(AssertionError, match="have not joined"):
        all_reduce(torch.ones(2), Groups.apart(Mesh(0, tp=2)).along("tp"))


@pytest.mark.parametrize("rendezvous", ["file://{folder}/ranks", "nowhere://here"])
def test_who_does_not_find_the_others_says_so(rendezvous: str, tmp_path: Path) -> None:
    where = rendezvous.format(folder=tmp_path)
    with pytest.raises(ConfigError, match=f"rank 1 of 2 cannot join the others at {where}"):
        join(Mesh(1, tp=2), where, seconds=0.5)


MEETING = """
import os
import sys
import torch
from engine.parallel.collectives import all_reduce
from engine.parallel.groups import join
from engine.parallel.mesh import Mesh
groups = join(Mesh(int(sys.argv[1]), tp=2), sys.argv[2], seconds=60)
assert all_reduce(torch.ones(2), groups.along("tp")).tolist() == [2, 2]
groups.leave()
os._exit(0)
"""


def test_a_file_to_meet_at_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "a b#c?d"
    folder.mkdir()
    run = [sys.executable, "-W", "error::FutureWarning", "-c", MEETING]
    ranks = [subprocess.Popen([*run, str(rank), f"file://{folder}/ranks"], stderr=subprocess.PIPE) for rank in (0, 1)]
    said = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
