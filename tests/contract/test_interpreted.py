"""Triton's kernels where there is no GPU: in Triton's interpreter, against their definitions in torch."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = (  # those that take the longest first
    "triton_mixtures.py",
    "interpreted_attention.py",
    "triton_logits.py",
    "interpreted_latent.py",
    "triton_ops.py",
    "triton_fp8.py",
)
Run = subprocess.CompletedProcess[str]


def interpreted(name: str) -> Run:
    """In a process of its own: the interpreter is chosen when triton is imported, for all that follows."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__).with_name(name))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=290,
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, "Future[Run]"]]:
    """Those that are asked for, two at a time: each keeps one core busy."""
    asked = [str(item.callspec.params["name"]) for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(2) as threads:
        yield {name: threads.submit(interpreted, name) for name in asked}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FILES)
def test_the_kernels_interpreted_do_what_they_are_defined_as(name: str, runs: dict[str, "Future[Run]"]) -> None:
    done = runs[name].result()
    assert done.returncode == 0, done.stdout + done.stderr
