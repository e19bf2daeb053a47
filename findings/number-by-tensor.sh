#!/bin/sh
# In torch a number divided by a tensor is no division. `21 / t` is `t.reciprocal() * 21`, which rounds twice, so 21 / 7 is
# 3.0000002 and 41 / 41 is 0.99999994, for tensors of integers too: ceil says four pages for three, and int says 0 for 1.
# torch.div(21, t), a tensor of no dimensions in place of the number, and NumPy divide, and so does `t / 7` on a CPU. In
# float16 the reciprocal has to be a float16 as well: below 1.53e-5 it is infinite, where 0.5 / 1e-5 is 49920, and above
# 16384 it is subnormal, so 127 / amax, the scale of an int8 quantizer, is wrong by up to four units in the last place. A
# formula such as 448 / amax, written as it stands, gives another scale than a kernel that divides for a quarter of all
# rows in float32, and a test of equal bits fails though both compute the same formula.
#
# Seen: torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64, 2026-12-01.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import torch

WAYS = {
    "number / tensor": lambda number, tensor: number / tensor,
    "torch.div(number, tensor)": torch.div,
    "0-d tensor / tensor": lambda number, tensor: torch.tensor(float(number)) / tensor,
    "number / numpy": lambda number, tensor: torch.from_numpy(np.asarray(number / tensor.numpy())),
}


def told(number, tensor):
    """What each way says, as Python floats."""
    found = [way(number, tensor).item() for way in WAYS.values()]
    dtype = str(tensor.dtype).removeprefix("torch.")
    print(f"{number} / {tensor.item():g} of {dtype}: ", ", ".join(f"{name} {each:.9g}" for name, each in zip(WAYS, found)))
    return found


for dtype in (torch.float32, torch.int64):
    assert told(21, torch.tensor([7], dtype=dtype)) == [3.000000238418579, 3, 3, 3]
    assert told(41, torch.tensor([41], dtype=dtype)) == [0.9999999403953552, 1, 1, 1]
seven, fortyone = torch.tensor([7]), torch.tensor([41])
assert (21 / seven).ceil().item() == 4 and int(41 / fortyone) == 0 and -(-21 // seven).item() == 3
assert (torch.tensor([21.0]) / 7).item() == 3 and (torch.tensor([41.0]) / 41).item() == 1  # the other way round
assert told(0.5, torch.tensor([1e-5], dtype=torch.float16)) == [torch.inf, 49920, 49920, 49920]
assert told(60_000, torch.tensor([60_000], dtype=torch.float16)) == [1.0009765625, 1, 1, 1]

every = torch.arange(1, 0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16)  # all positive finite ones
scale, right = 127 / every, torch.div(127, every)
finite = scale.isfinite()
units = (scale.view(torch.int16).int() - right.view(torch.int16).int())[finite].abs()
print(f"127 / each of {len(every)} in float16: {(scale != right).sum()} differ, by up to {units.max()} units")
assert torch.equal(right, torch.div(127, every.double()).half())
assert (scale != right).sum() == 7193 and units.max() == 4

amax = torch.arange(1, 1 << 20) / 7
scale, right = 448 / amax, torch.div(448, amax)
part = (scale != right).float().mean().item()
print(f"448 / amax in float32: {part:.1%} differ; the largest entry becomes {(amax * scale).max():.5f}")
assert torch.equal(right, torch.from_numpy(np.float32(448) / amax.numpy())) and 0.27 < part < 0.28
PYTHON
