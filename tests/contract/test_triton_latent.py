"""What the Triton backend of latent attention refuses; its kernels are checked in test_interpreted.py and tests/gpu."""

import pytest
import torch

from engine.errors import ConfigError
from engine.layers import LatentShape
from engine_plugins.attention.triton.mla import TritonLatentAttention

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("terms", "device", "dtype", "said"),
    [
        ({}, "cpu", torch.float32, "runs on GPUs, not on cpu"),
        ({"latent_dim": 384}, "cuda", torch.bfloat16, "dimensions of 16, 32, … 512, not .384,"),
        ({"latent_dim": 1024}, "cuda", torch.bfloat16, "not .1024,"),
        ({}, "cuda", torch.float64, "not torch.float64"),
        ({"kv_dtype": torch.float8_e5m2}, "cuda", torch.bfloat16, "not torch.float8_e5m2 for torch.bfloat16"),
    ],
)
def test_what_it_cannot_serve_is_refused(terms: dict, device: str, dtype: torch.dtype, said: str) -> None:
    usual = {"layers": 1, "query_heads": 4, "latent_dim": 512, "rope_dim": 64, "key_dim": 128, "value_dim": 128}
    with pytest.raises(ConfigError, match=said):
        TritonLatentAttention(LatentShape(**{**usual, "scale": 1.0, **terms}), 16, torch.device(device), dtype)
