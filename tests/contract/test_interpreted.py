"""Triton's kernels where there is no GPU: in Triton's interpreter, against their definitions in torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
LIB = Path(__file__).parents[1] / "lib"
FILES = (
    "interpreted_attention.py",
    "interpreted_latent.py",
    "triton_collectives.py",
    "triton_delta.py",
    "triton_fp8.py",
    "triton_logits.py",
    "triton_mixtures.py",
    "triton_ops.py",
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FILES)
def test_the_kernels_interpreted_do_what_they_are_defined_as(name: str) -> None:
    """Each file in a process of its own: the interpreter is chosen when triton is imported, for all that follows."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-p",
            "quick_interpreter",
            str(LIB / name),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(LIB),
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stdout + done.stderr
