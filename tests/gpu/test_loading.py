"""Weights on their way to a GPU: the same bits, whatever shape, share or type they have."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.layers import model as layers_model
from engine.layers.model import copy_weight
from engine_plugins.checkpoints.safetensors.checkpoint import SafetensorsCheckpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.mark.parametrize("piece", [1, 1000, 32 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_copied_is_what_was_stored(
    tmp_path: Path, piece: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_model, "PIECE_BYTES", piece)
    stored = {"matrix": torch.randn(301, 64).bfloat16(), "vector": torch.randn(77), "one": torch.randn(())}
    save_file(stored, tmp_path / "model.safetensors")
    tensors = dict(SafetensorsCheckpoint(tmp_path).tensors())
    for name, index in (
        ("matrix", (slice(None),)),
        ("matrix", (slice(10, 200),)),
        ("matrix", (slice(None), slice(16, 48))),
        ("vector", (slice(None),)),
    ):
        wanted = stored[name][index]
        target = torch.zeros(wanted.shape, dtype=dtype, device="cuda")
        copy_weight(name, target, tensors[name], tuple(stored[name].shape), index)
        assert torch.equal(target.cpu(), wanted.to(dtype)), (name, index)
