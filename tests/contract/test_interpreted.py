"""Triton's kernels where there is no GPU: in Triton's interpreter, against their definitions in torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
LIB = Path(__file__).parents[1] / "lib"
FILES = (
    "interpreted_attention.py interpreted_latent.py",
    "triton_delta.py triton_logits.py triton_ops.py",
    "triton_collectives.py triton_fp8.py triton_mixtures.py",
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("names", FILES)
def test_the_kernels_interpreted_do_what_they_are_defined_as(names: str) -> None:
    """In processes of their own: the interpreter is chosen when triton is imported, for all that follows. A start takes
    seconds, so files share one."""
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
            *(str(LIB / name) for name in names.split()),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(LIB),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # plugins are half of a start
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stdout + done.stderr
