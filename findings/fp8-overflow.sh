#!/bin/sh
# What a cast to FP8 does beyond the largest finite value depends on the library and on the format. torch 2.13 on a CPU
# saturates in E4M3, infinity included: it becomes 448, so a product that has overflowed looks like a large finite number.
# The same torch overflows to infinity in E5M2. ml_dtypes, which JAX and NumPy use, makes NaN in E4M3. So weights that were
# quantized by one library and checked by the other differ exactly where a check would look: clamp before the cast.
#
# Seen: torch 2.13.0 (CPU), ml_dtypes 0.6.0, Python 3.11, x86-64, 2026-11-29.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 ml_dtypes==0.6.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import math

import ml_dtypes
import numpy as np
import torch

values = [448.0, 464.0, 465.0, 1e6, math.inf, -math.inf]


def of_torch(dtype):
    return torch.tensor(values).to(dtype).float().tolist()


def of_ml_dtypes(dtype):
    return np.array(values, np.float32).astype(dtype).astype(np.float32).tolist()


rows = {
    "torch float8_e4m3fn": of_torch(torch.float8_e4m3fn),
    "ml_dtypes float8_e4m3fn": of_ml_dtypes(ml_dtypes.float8_e4m3fn),
    "torch float8_e5m2": of_torch(torch.float8_e5m2),
    "ml_dtypes float8_e5m2": of_ml_dtypes(ml_dtypes.float8_e5m2),
}
print(f"{'':24}" + "".join(f"{value:>10g}" for value in values))
for name, row in rows.items():
    print(f"{name:24}" + "".join(f"{value:>10g}" for value in row))
assert rows["torch float8_e4m3fn"] == [448, 448, 448, 448, 448, -448]
assert rows["ml_dtypes float8_e4m3fn"][:2] == [448, 448]
assert all(math.isnan(value) for value in rows["ml_dtypes float8_e4m3fn"][2:])
assert rows["torch float8_e5m2"] == rows["ml_dtypes float8_e5m2"] == [448, 448, 448, math.inf, math.inf, -math.inf]
PYTHON
