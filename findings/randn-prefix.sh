#!/bin/sh
# With one seed, a longer torch.rand begins with the shorter one. torch.randn on a CPU does not: up to 15 values it draws them
# one by one, from 16 on in blocks of 16, and where the size is no multiple of 16 it draws the last 16 again, from further
# on in the stream. So 15 and 16 values have nothing in common, and the 17th changes 15 of the 16 before it. bfloat16 does
# the same. Tiny seeded weights or noise so change with their sizes, and a padded tensor does not begin with the plain one.
# On a CUDA device randn keeps its prefix (seen once by hand: torch 2.11, H200).
#
# Seen: torch 2.13.0 (CPU), Python 3.11, x86-64, 2026-11-30.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def stay(way, size, dtype):
    """How many of `size` values are as before when one more is drawn."""
    shorter, longer = (way(each, dtype=dtype, generator=torch.Generator().manual_seed(0)) for each in (size, size + 1))
    return int((longer[:size] == shorter).sum())


print("values that stay when one more is drawn:")
for size in (8, 14, 15, 16, 32, 64):
    kept = [stay(way, size, dtype) for way in (torch.rand, torch.randn) for dtype in (torch.float32, torch.bfloat16)]
    print(f"  of {size:2}: rand {kept[0]:2}, in bfloat16 {kept[1]:2}; randn {kept[2]:2}, in bfloat16 {kept[3]:2}")
    assert kept[:2] == [size, size]
    least = size if size < 15 else 0 if size == 15 else size - 15
    assert all(least <= each <= least + 2 for each in kept[2:])  # two by chance, in bfloat16 above all
PYTHON
