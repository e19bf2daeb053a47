#!/bin/sh
# NumPy sums float16 with care: a thousand ones are 1000. The same call on bfloat16 of ml_dtypes, which is how NumPy and JAX
# read such weights, adds one by one in bfloat16 and stops at 256, where adding 1 changes nothing; E4M3 stops at 16. `mean`
# and `cumsum` inherit it (the mean of ones is 0.256); `dot` of bfloat16 does not. No warning says so. And NaN is not last
# in a sort, as NumPy promises: it stays where it is and parts the array, so a sort with a NaN is not sorted, and a median
# or a quantile taken from one is wrong. Cast to float32 first.
#
# Seen: numpy 2.4.6, ml_dtypes 0.6.0, Python 3.11, x86-64, 2026-11-30.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/python" - <<'PYTHON'
import math

import ml_dtypes
import numpy as np

for dtype, stops in ((np.float16, None), (ml_dtypes.bfloat16, 256), (ml_dtypes.float8_e4m3fn, 16)):
    ones = np.ones(1000, dtype)
    found = [float(each) for each in (ones.sum(), ones.mean(), ones.cumsum()[-1])]
    print(f"{np.dtype(dtype).name:14} sum {found[0]:g}, mean {found[1]:.3g}, cumsum {found[2]:g}")
    if stops is None:
        assert found[:2] == [1000, 1]
    else:
        assert found[0] == found[2] == stops
        assert math.isclose(found[1], stops / 1000, rel_tol=0.1)
ones = np.ones(1000, ml_dtypes.bfloat16)
print(f"dot of bfloat16 {float(np.dot(ones, ones)):g}")
assert np.dot(ones, ones) == 1000

values = [3, math.nan, 2, 1, 0]
for dtype in (np.float16, ml_dtypes.bfloat16):
    print(f"{np.dtype(dtype).name:14} sorted {np.sort(np.array(values, dtype)).tolist()}")
assert np.sort(np.array(values, np.float16))[:4].tolist() == [0, 1, 2, 3]
seen = np.sort(np.array(values, ml_dtypes.bfloat16)).astype(np.float32)
assert seen[0] == 3 and np.isnan(seen[1]) and seen[2:].tolist() == [0, 1, 2]
PYTHON
