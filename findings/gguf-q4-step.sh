#!/bin/sh
# Q4_0 of GGUF looks symmetric, a scale and no offset, so the guess is an error of half a step at most. It is a whole step.
# The scale is the entry of the largest magnitude divided by -8, so that entry is exact, and its opposite would need +8 where
# +7 is the last code: a weight of the same magnitude and the other sign comes back 12.5 % short. Which of 1 and -1 suffers is
# decided by which comes first in the block of 32. Q5_0 does the same with 16 steps (6.25 %), Q8_0 and Q4_1 do not. So a
# tolerance of half a step refuses right results, and a ternary matrix {-1, 0, 1} is not exact in Q4_0 though it has 16 codes.
#
# Seen: gguf 0.19.0, numpy 2.4.6, Python 3.11, 2026-11-30.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize


def back(block, type):
    return dequantize(quantize(np.array(block, np.float32), type), type)


for first in (1.0, -1.0):
    ternary = [first, -first, 0.0, first] * 8
    for type in (Type.Q4_0, Type.Q5_0, Type.Q4_1, Type.Q8_0):
        print(f"{type.name} of {ternary[:4]}: {[round(float(each), 4) for each in back(ternary, type)[:4]]}")
    for type, short in ((Type.Q4_0, 0.875), (Type.Q5_0, 0.9375)):
        assert back(ternary, type)[:4].tolist() == [first, -first * short, 0, first]
    assert np.allclose(back(ternary, Type.Q8_0), ternary, atol=1e-3)

blocks = np.random.default_rng(0).standard_normal((20_000, 32), np.float32)
largest = np.abs(blocks).max(1, keepdims=True)
for type, steps, worst in ((Type.Q4_0, 8, 1.0), (Type.Q5_0, 16, 1.0), (Type.Q8_0, 127, 0.5)):
    error = np.abs(back(blocks, type) - blocks) * steps / largest
    beyond = (error.max(1) > 0.6).mean()  # the scale, in float16, adds its own rounding
    print(f"{type.name} of normal weights: largest error {error.max():.2f} steps, above 0.6 in {beyond:.0%} of blocks")
    assert abs(error.max() - worst) < 0.1
    assert (beyond > 0.02) == (worst == 1)
PYTHON
