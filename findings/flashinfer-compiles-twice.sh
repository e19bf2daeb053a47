#!/bin/sh
# FlashInfer's `build_jit_specs` compiles several modules at once, ahead of their use, and `build_and_load` of one of
# them then compiles it again. Both run ninja over the same build file and the same objects, but in different folders,
# and ninja keeps its record of what it has built in the folder that it runs in. Without a record ninja takes objects
# that are newer than their sources for out of date. On an H200 the second time took 79 s after the first one's 84 s (FA3, head
# sizes 192 and 128, 16 processors). `spec.build(False)` of each, in threads, leaves the record where a load looks.
#
# Here a compiler that writes an empty file and notes the call stands for nvcc, so neither CUDA nor a GPU is needed.
#
# Seen: flashinfer-python 0.6.14, ninja 1.13.0, Python 3.11, x86-64, 2026-11-30.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 ninja==1.13.0 filelock tqdm \
    requests numpy packaging einops click tabulate nvidia-ml-py 'apache-tvm-ffi==0.1.10'
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps flashinfer-python==0.6.14
PATH="$folder/venv/bin:$PATH" FOLDER="$folder" "$folder/venv/bin/python" - <<'PYTHON'
import os
import sys
from pathlib import Path

folder = Path(os.environ["FOLDER"])
calls, compiler = folder / "calls", folder / "cuda" / "bin" / "nvcc"
compiler.parent.mkdir(parents=True)
compiler.write_text(
    f"""#!{sys.executable}
import sys
from pathlib import Path
given = sys.argv[1:]
if given == ["--version"]:
    sys.exit(print("Cuda compilation tools, release 13.0, V13.0.48"))
Path(given[given.index("-o") + 1]).write_bytes(b"")
if "-MF" in given:
    Path(given[given.index("-MF") + 1]).write_text("")
with open({str(calls)!r}, "a") as noted:
    noted.write(given[given.index("-o") + 1] + "\\n")
"""
)
compiler.chmod(0o755)
os.environ |= {
    "CXX": str(compiler),
    "FLASHINFER_NVCC": str(compiler),
    "CUDA_HOME": str(folder / "cuda"),
    "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
    "FLASHINFER_WORKSPACE_BASE": str(folder),
}
from flashinfer.jit import core

source = folder / "kernel.cu"
source.write_text("")


def spec(name):
    return core.gen_jit_spec(name, [source])


def compiled():
    noted = calls.read_text().count("kernel.cuda.o") if calls.exists() else 0
    calls.unlink(missing_ok=True)
    return noted


found = {}
ahead = spec("ahead")
core.build_jit_specs([ahead])
found["build_jit_specs"] = compiled()
ahead.build(False)  # what build_and_load does before it loads
found["build_and_load after it"] = compiled()
ahead.build(False)
found["build_and_load once more"] = compiled()
alone = spec("alone")
alone.build(False)
found["build of another"] = compiled()
alone.build(False)
found["build_and_load after that"] = compiled()
for name, count in found.items():
    print(f"{name:28}{count} compilations")
assert list(found.values()) == [1, 1, 0, 1, 0], found
PYTHON
