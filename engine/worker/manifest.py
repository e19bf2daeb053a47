"""What the bytes of a KV page depend on, beside its tokens: stores keep pages of unlike manifests apart.

Weights are known by what they are, not by where they come from: two sums over all their bits, of which one weighs each
by its place. So a checkpoint that was changed in its place is another model, and one that was moved is not. What is
computed with them follows from config.json too, such as the angles of positions, so all that it says counts.
"""

import json
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.layers.model import Model
from engine.parallel.mesh import Mesh
from engine.plugin.tiers import Manifest

FORMAT = 1  # of what pages hold; whoever changes a layout without another sign of it raises this
PIECE = 1 << 24  # numbers that are summed at a time


def manifest_of(
    model: Model, mesh: Mesh, *, terms: Mapping[str, Any], attention: str, dtype: torch.dtype, max_model_len: int
) -> Manifest:
    """That of this rank, whose model is made by the `terms` of config.json. Reads all its weights."""
    said = json.dumps(terms, sort_keys=True, default=str)
    spec, place = model.kv_spec(), mesh.coordinates
    layout = [[group.layers, list(group.shape), group.dtype] for group in spec.groups]
    layout += [[group.layers, list(group.shape), group.dtype] for group in spec.states]
    return {
        "format": FORMAT,
        "model": type(model).__name__,
        "weights": fingerprint(model),
        "config": blake2b(said.encode(), digest_size=16).hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "layout": msgspec.json.encode(layout).decode(),
        "page_size": spec.page_size,
        "max_model_len": max_model_len,  # which angles of positions may follow from
        "parallel": [mesh.extent("attention_tp"), mesh.extent("expert_tp"), mesh.pp],
        "rank": [place["attention_tp"], place["pp"]],
    }


@torch.inference_mode()
def fingerprint(model: Model) -> str:
    """A hash of all weights and buffers of `model`, and of their names."""
    named = sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0])
    digest = blake2b(digest_size=16)
    sums: list[Tensor] = []
    for name, weight in named:
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)};".encode())
        sums += _sums(weight)
    for device in {each.device for each in sums}:
        digest.update(torch.stack([each for each in sums if each.device == device]).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums(weight: Tensor) -> Iterator[Tensor]:
    """Two for each piece of `weight`, int64."""
    if not weight.numel():
        return
    flat = weight.contiguous().reshape(-1).view(torch.uint8)
    wide = flat.view(torch.int32) if len(flat) % 4 == 0 and flat.data_ptr() % 4 == 0 else flat
    for piece in wide.split(PIECE):
        numbers = piece.to(torch.int64)
        yield numbers.sum()
        yield numbers.mul_(torch.arange(1, 2 * len(piece), 2, device=piece.device)).sum()
