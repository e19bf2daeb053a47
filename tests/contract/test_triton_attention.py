"""What the Triton backend of attention refuses; its kernels are checked in test_interpreted.py and tests/gpu."""

import pytest
import torch

from engine.errors import ConfigError
from engine.layers import AttentionShape
from engine_plugins.attention.triton.mha import TritonAttention

pytest.importorskip("triton")


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
