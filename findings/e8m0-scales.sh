#!/bin/sh
# E8M0, the eight-bit scale of MX formats, has neither a sign nor a zero, and each library fills the gap in its own way. To
# torch -3 becomes 4 and 0 becomes 5.9e-39, without a word; in ml_dtypes both become NaN. So the scale of a block of zeros,
# amax / 448, leaves the block as it is in torch, and makes it NaN where NumPy made the scales. `zeros` fills with the byte 0
# in both libraries, which is 5.9e-39; `full` of 0 is NaN in NumPy, and in torch an error, but for a tensor of one element,
# which takes it. What pads or sums an array in NumPy starts from 0, so from NaN: the sum of two ones is NaN. And a NaN among
# scales is hard to find in torch, whose isfinite says True for it. isnan tells.
#
# Seen: torch 2.13.0 (CPU), ml_dtypes 0.6.0, numpy 2.4.6, Python 3.11, 2026-12-01.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 ml_dtypes==0.6.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import math

import numpy as np
import torch
from ml_dtypes import float8_e8m0fnu as theirs

ours = torch.float8_e8m0fnu
LEAST = 2.0**-127


def same(found, expected):
    return all(a == b or math.isnan(a) and math.isnan(b) for a, b in zip(found, expected, strict=True))


values = [1.0, 1.5, 6.0, 0.0, -0.0, -1.0, -3.0, math.inf]
by_torch = torch.tensor(values).to(ours).float().tolist()
by_numpy = np.array(values, np.float32).astype(theirs).astype(np.float32).tolist()
for name, row in (("of", values), ("torch", by_torch), ("ml_dtypes", by_numpy)):
    print(f"{name:10}", *(f"{each:9.4g}" for each in row))
assert same(by_torch, [1, 2, 8, LEAST, LEAST, 1, 4, math.nan])
assert same(by_numpy, [1, 2, 8, math.nan, math.nan, math.nan, math.nan, math.nan])
assert torch.full((1,), 0.0, dtype=ours).item() == LEAST
try:
    torch.full((2,), 0.0, dtype=ours)
    refused = "no error"
except RuntimeError as error:
    refused = str(error)
print("torch: full of 0, one element: no error; two:", refused)
assert "without overflow" in refused

block = np.zeros(32, np.float32)
scale = np.abs(block).max(keepdims=True) / 448
for name, made in (
    ("torch", torch.from_numpy(scale).to(ours).float().numpy()),
    ("ml_dtypes", scale.astype(theirs).astype(np.float32)),
):
    restored = np.clip(block / made, -448, 448) * made
    print(f"a block of zeros by the scale of {name}: {restored[0]}")
    assert np.isnan(restored).all() == (name == "ml_dtypes") and (restored == 0).all() == (name == "torch")

zeros, full, ones = np.zeros(2, theirs), np.full(2, 0, theirs), np.ones(2, theirs)
print("ml_dtypes: zeros", zeros, "full of 0", full, "pad of ones", np.pad(ones, 1), "sum of ones", ones.sum())
print("torch: zeros", torch.zeros(2, dtype=ours).tolist())
assert same(zeros.astype(float), [LEAST] * 2) and np.isnan(full.astype(float)).all()
assert same(np.pad(ones, 1).astype(float), [math.nan, 1, 1, math.nan]) and np.isnan(float(ones.sum()))
assert torch.zeros(2, dtype=ours).tolist() == [LEAST] * 2

scales = torch.tensor([1.0, math.nan]).to(ours)
print("torch: 1 and NaN: isfinite", scales.isfinite().tolist(), "isnan", scales.isnan().tolist())
assert scales.isfinite().all() and scales.isnan().tolist() == [False, True]
assert scales.float().isfinite().tolist() == np.isfinite(np.array([1, math.nan], theirs)).tolist() == [True, False]
PYTHON
