#!/bin/sh
# torch.Generator takes 64-bit seeds and gives them back from initial_seed(). On a CPU the stream depends on their low 32 bits
# alone: 7 and 7 + 2**32 draw the same numbers, and so do -1 and 2**32 - 1. On a CUDA device all 64 bits count (seen once by
# hand: torch 2.11, H200). So a seed made as (request << 32) + choice gives every request the same stream on a CPU, and
# looks fine on a GPU; and of 80,000 requests whose seeds are 64-bit hashes, two are likely to draw the same.
#
# Seen: torch 2.13.0 (CPU), Python 3.11, x86-64, 2026-11-30.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def draws(seed):
    generator = torch.Generator().manual_seed(seed)
    assert generator.initial_seed() == seed % 2**64
    ways = torch.rand, torch.randn, lambda size, generator: torch.randperm(size, generator=generator).float()
    uniform, normal, order = (way(1000, generator=generator) for way in ways)
    return torch.stack([uniform, normal, order, torch.empty(1000).exponential_(generator=generator)])


for first, second in ((7, 7 + 2**31), (7, 7 + 2**32), (7, 7 + 2**63), (-1, 2**32 - 1), (0, 5 << 32)):
    same = torch.equal(draws(first), draws(second))
    print(f"seeds {first:2} and {second:>20}: {'the same' if same else 'other'} numbers")
    assert same == ((first - second) % 2**32 == 0)
PYTHON
