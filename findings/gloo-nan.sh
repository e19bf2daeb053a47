#!/bin/sh
# An all-reduce of the largest (or the least) loses NaN in Gloo. Of a single number, such as an FP8 scale, only a NaN of rank 0
# survives: where any other rank has it, all ranks get the largest of the finite numbers. A larger tensor is cut into one
# part for each rank, and a rank's NaN survives in its own part alone, a quarter of the places with four ranks. torch.maximum and
# amax, whose counterpart this is, pass every NaN on, and so does an all-reduce of the sum. So a check for NaN by
# all_reduce(x.amax(), MAX) passes on the ranks' word of rank 0, and a scale taken so hides that one rank's weights are
# broken. Reduce `isnan` as an integer, or a sum.
#
# Seen: torch 2.13.0 (CPU, gloo), Python 3.11, 2026-11-30.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import math
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as processes


def kept(operation, size, rank, ranks):
    """For each rank that has NaN in every place, where the others have 1, 2, …: the share of places that are NaN after."""
    shares = []
    for holder in range(ranks):
        values = torch.full((size,), math.nan if rank == holder else rank + 1.0)
        dist.all_reduce(values, operation)
        shares.append(float(values.isnan().float().mean()))
    return shares


def rank_main(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{ranks}", rank=rank, world_size=ranks)
    for name in ("MAX", "MIN", "SUM"):
        for size in (1, 4096):
            shares = kept(getattr(dist.ReduceOp, name), size, rank, ranks)
            if rank == 0:
                print(f"{ranks} ranks, {name} of {size:4}: NaN kept in {shares}, by the rank that has it", flush=True)
            one = [float(holder == 0) for holder in range(ranks)]
            expected = [1.0] * ranks if name == "SUM" else one if size == 1 else [1 / ranks] * ranks
            assert shares == expected, shares
    dist.destroy_process_group()


assert torch.maximum(torch.tensor(1.0), torch.tensor(math.nan)).isnan()
assert torch.tensor([1.0, math.nan]).amax().isnan()
for ranks in (2, 4):
    processes.start_processes(rank_main, (ranks, sys.argv[1]), nprocs=ranks, start_method="fork")
PYTHON
