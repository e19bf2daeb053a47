#!/bin/sh
# safetensors writes a tensor of four-bit floats from torch and says that it has twice the numbers: [4, 4] pairs become F4
# of [4, 8]. load_file and get_tensor give the pairs back. Every slice of it fails, the one of everything too, because
# the bytes are to have the shape that the header says; and `load`, which reads the same bytes from memory, knows no F4.
# So a loader that takes its part of a matrix by get_slice, as tensor parallelism does, cannot read what save_file
# wrote, and get_slice(...).get_shape() is not the shape of get_tensor(...). A cut through the packed bytes has to be
# reckoned in pairs from a whole get_tensor.
#
# Seen: safetensors 0.8.0, torch 2.13.0 (CPU), Python 3.11, x86-64, 2026-11-30.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy safetensors==0.8.0
"$folder/venv/bin/python" -W ignore - "$folder/four.safetensors" <<'PYTHON'
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

path = Path(sys.argv[1])
pairs = torch.arange(16, dtype=torch.uint8).view(4, 4)
save_file({"weight": pairs.view(torch.float4_e2m1fn_x2)}, path)


def told(name, read):
    try:
        found = read()
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    print(f"{name:28}{found}")
    return found


with safe_open(path, "pt") as file:
    part = file.get_slice("weight")
    assert told("what the header says", lambda: (part.get_dtype(), part.get_shape())) == ("F4", [4, 8])
    assert told("get_tensor", lambda: tuple(file.get_tensor("weight").shape)) == (4, 4)
    assert torch.equal(file.get_tensor("weight").view(torch.uint8), pairs)
    for name, index in {"[:]": slice(None), "[0:2]": slice(0, 2)}.items():
        expected = "RuntimeError: shape '[4, 8]' is invalid for input of size 16"
        assert told(f"get_slice {name}", lambda index=index: part[index]) == expected
assert told("load_file", lambda: tuple(load_file(path)["weight"].shape)) == (4, 4)
assert told("load, of the same bytes", lambda: load(path.read_bytes())) == "KeyError: 'F4'"
PYTHON
