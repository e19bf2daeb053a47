"""The Triton attention backend where there is no GPU: what it refuses, and its kernels in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from engine.layers import AttentionShape
from engine_plugins.attention.triton import TritonAttention

pytest.importorskip("triton")


def test_the_kernels_interpreted_do_what_attention_is() -> None:
    """In a process of its own: the interpreter is chosen when triton is imported, for all that follows."""
    file = Path(__file__).with_name("interpreted_attention.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("terms", "device", "dtype", "said"),
    [
        ({}, "cpu", torch.float32, "runs on GPUs, not on cpu"),
        ({"head_dim": 72}, "cuda", torch.bfloat16, "head sizes of 16, 32, … 256, not 72"),
        ({"head_dim": 512}, "cuda", torch.bfloat16, "not 512"),
        ({}, "cuda", torch.float64, "not torch.float64"),
        ({"kv_dtype": torch.float8_e5m2}, "cuda", torch.bfloat16, "not torch.float8_e5m2 for torch.bfloat16"),
    ],
)
def test_what_it_cannot_serve_is_refused(terms: dict, device: str, dtype: torch.dtype, said: str) -> None:
    shape = AttentionShape(**{"layers": 1, "query_heads": 4, "kv_heads": 2, "head_dim": 64, "scale": 1.0, **terms})
    with pytest.raises(ConfigError, match=said):
        TritonAttention(shape, 16, torch.device(device), dtype)
