#!/bin/sh
# An all-reduce in Gloo adds booleans as bytes and keeps the byte: True of two ranks is a True whose byte is 2. Everything
# shows it as True, and torch.equal finds it equal to any other. But the byte goes into the next all-reduce and wraps at
# 256, so a flag that is set and reduced in place, step by step, as one asks whether any rank has to stop, is False again
# after the eighth time on two ranks, the fourth on four and the second on sixteen. And `2 & 1` is 0: whether any rank of a
# node is ready (SUM), asked of all nodes (BAND), is False where one node has two that are ready and the other has one. By
# torch's source a sum of booleans is the largest under NCCL, so the same program is right there. MAX, or BOR, is right on both.
#
# Seen: torch 2.13.0 (CPU, gloo), Python 3.11, 2026-12-01.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.distributed import ReduceOp


def byte(flag):
    return flag.view(torch.uint8).item()


def lost_after(operation, times=20):
    """How often a flag that all ranks have set can be reduced in place until it is False; None if it stays True."""
    flag = torch.tensor([True])
    for time in range(1, times + 1):
        dist.all_reduce(flag, operation)
        if not flag.item():
            return time
    return None


def ready(rank, within, across):
    """Any rank of a node, asked of all nodes: ranks 0, 1 and 2 of two nodes of two are ready."""
    nodes = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    peers = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    flag = torch.tensor([rank < 3])
    dist.all_reduce(flag, within, nodes[rank // 2])
    dist.all_reduce(flag, across, peers[rank % 2])
    return flag.item()


def rank_main(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{ranks}", rank=rank, world_size=ranks)
    say = print if rank == 0 else lambda *_: None
    flag, plain = torch.tensor([True]), torch.tensor([True])
    dist.all_reduce(flag)
    say(f"{ranks} ranks: {flag}, byte {byte(flag)}, equal to a plain True: {torch.equal(flag, plain)}")
    assert byte(flag) == ranks and flag.item() and torch.equal(flag, plain)
    assert flag.numpy().tobytes() != plain.numpy().tobytes()
    lost = {name: lost_after(getattr(ReduceOp, name)) for name in ("SUM", "MAX", "BOR")}
    say(f"{ranks} ranks: a flag reduced in place again and again is False after", lost)
    assert lost == {"SUM": {2: 8, 4: 4, 16: 2}[ranks], "MAX": None, "BOR": None}
    if ranks == 4:
        for within, expected in (("SUM", False), ("MAX", True)):
            found = ready(rank, getattr(ReduceOp, within), ReduceOp.BAND)
            say(f"both nodes have a rank that is ready: {within} within them, BAND across: {found}")
            assert found is expected
    sys.stdout.flush()
    dist.destroy_process_group()


for ranks in (2, 4, 16):
    processes.start_processes(rank_main, (ranks, sys.argv[1]), nprocs=ranks, start_method="fork")
PYTHON
