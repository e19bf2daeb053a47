"""Triton's kernels where there is no GPU: in Triton's interpreter, each file in a process of its own, because the
interpreter is chosen when triton is imported, for all that follows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FILES = (
    "interpreted_attention",
    "interpreted_latent",
    "triton_fp8",
    "triton_logits",
    "triton_mixtures",
    "triton_ops",
)


@pytest.mark.parametrize("name", FILES)
def test_the_kernels_interpreted_do_what_they_are_defined_as(name: str) -> None:
    file = Path(__file__).with_name(f"{name}.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
