#!/bin/sh
# An all-reduce adds the same numbers in an order that depends on where in the tensor they stand. Gloo cuts the tensor into one
# part for each rank, and part k is added up around the ring: rank k-1 first, then k-2, and so on, rank k last. Rows that are
# equal on every rank so come out different from each other, and a row's bits depend on which row of the batch it is and on
# how many there are: tensor parallelism is not batch invariant even where all its kernels are. What holds: all ranks
# get the same bits, and two ranks are safe, because a sum of two does not depend on their order. In bfloat16 each hop rounds.
#
# Seen: torch 2.13.0 (CPU, gloo), Python 3.11, 2026-11-30.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from functools import reduce
from operator import add

import torch
import torch.distributed as dist
import torch.multiprocessing as processes


def row_of(rank, dtype):
    return torch.randn(64, generator=torch.Generator().manual_seed(rank)).to(dtype)


def rank_main(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{ranks}", rank=rank, world_size=ranks)
    for dtype in (torch.float32, torch.bfloat16):
        batch = row_of(rank, dtype).repeat(ranks, 1)  # the same row `ranks` times
        dist.all_reduce(batch)
        copies = [torch.empty_like(batch) for _ in range(ranks)]
        dist.all_gather(copies, batch)
        assert all(torch.equal(copy, batch) for copy in copies), "ranks differ"
        orders = [[(part - 1 - hop) % ranks for hop in range(ranks)] for part in range(ranks)]
        for row, order in zip(batch, orders, strict=True):
            assert torch.equal(row, reduce(add, [row_of(each, dtype) for each in order])), order
        distinct = len({tuple(row.tolist()) for row in batch})
        if rank == 0:
            print(f"{ranks} ranks, {dtype}: {ranks} equal rows became {distinct}; orders of ranks {orders}", flush=True)
        assert distinct == (1 if ranks == 2 else ranks)
    dist.destroy_process_group()


for ranks in (2, 3, 4):
    processes.start_processes(rank_main, (ranks, sys.argv[1]), nprocs=ranks, start_method="fork")
PYTHON
