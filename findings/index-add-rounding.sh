#!/bin/sh
# index_add_ of bfloat16 has two ways to add on a CPU, and what chooses between them says nothing of precision. Rows by an
# int64 index are summed in float32 and rounded once. The same rows by an int32 index, or with an alpha, or along the second
# of three dimensions, or a vector in place of rows, are rounded after every addition: a thousand ones make 256.
# index_put_(accumulate=True) always rounds every time, and scatter_add_ once. index_reduce_ of the mean has it the other way
# round: 1 for a vector of ones, 0.256 for rows of ones. This is how a reference combines experts or pools
# embeddings: a routing table kept as int32 costs the low bits of every sum in silence, and tests of short sums pass.
#
# Seen: torch 2.13.0 (CPU), Python 3.11, x86-64 (AVX-512 and ATEN_CPU_CAPABILITY=default alike), 2026-11-30.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch

COUNT = 1000


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


def ones(*shape):
    return torch.ones(shape, dtype=torch.bfloat16)


wide = torch.zeros(COUNT, dtype=torch.int64)  # all are added to place 0 of two
narrow, spread = wide.to(torch.int32), wide[:, None].expand(COUNT, 8)
sums = {
    "index_add_, rows, int64": (zeros(2, 8).index_add_(0, wide, ones(COUNT, 8)), 1000),
    "index_add_, rows, int32": (zeros(2, 8).index_add_(0, narrow, ones(COUNT, 8)), 256),
    "index_add_, rows, alpha": (zeros(2, 8).index_add_(0, wide, ones(COUNT, 8) * 2, alpha=0.5), 256),
    "index_add_, second of three": (zeros(3, 2, 8).index_add_(1, wide, ones(3, COUNT, 8)), 256),
    "index_add_, a vector": (zeros(2).index_add_(0, wide, ones(COUNT)), 256),
    "index_put_, rows": (zeros(2, 8).index_put_((wide,), ones(COUNT, 8), accumulate=True), 256),
    "index_put_, a vector": (zeros(2).index_put_((wide,), ones(COUNT), accumulate=True), 256),
    "scatter_add_, rows": (zeros(2, 8).scatter_add_(0, spread, ones(COUNT, 8)), 1000),
    "scatter_add_, a vector": (zeros(2).scatter_add_(0, wide, ones(COUNT)), 1000),
    "index_reduce_, mean of rows": (zeros(2, 8).index_reduce_(0, wide, ones(COUNT, 8), "mean"), 0.255859375),
    "index_reduce_, mean of a vector": (zeros(2).index_reduce_(0, wide, ones(COUNT), "mean"), 1),
}
for name, (made, expected) in sums.items():
    print(f"{name:34}{float(made.flatten()[0]):g}")
    assert made.flatten()[0] == expected, name
PYTHON
