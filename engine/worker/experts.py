"""How often each expert is chosen.

Routers count on the device, while they are told to: in tensors of their own, at the addresses that CUDA graphs know.
Here the counts are read, which waits for the steps launched before.
"""

import re

import torch

from engine.layers.model import Model
from engine.layers.moe import Router
from engine.messages.control import CountExperts, ExpertCounts

NONE = "the model has no experts to choose from; ask a server with a mixture of experts"


def routers_of(model: Model) -> dict[str, Router]:
    """By their paths, in order."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, Router)}


@torch.inference_mode()
def count_experts(model: Model, message: CountExperts) -> ExpertCounts:
    """Does what `message` says, and tells the counts."""
    routers = routers_of(model)
    if not routers:
        return ExpertCounts(message.number, cause=NONE)
    recorders = [router.recorder for router in routers.values()]
    if message.action == "start":
        for recorder in recorders:
            recorder.counts.zero_()
    if message.action != "look":
        for recorder in recorders:
            recorder.on.fill_(message.action == "start")
    counts = torch.stack([recorder.counts for recorder in recorders]).cpu()
    counting = bool(recorders[0].on.item())
    return ExpertCounts(message.number, counting, _layers(list(routers)), counts.numpy().astype("<i8").tobytes())


def _layers(paths: list[str]) -> tuple[int, ...]:
    """The number in each path, as in model.layers.3.mlp.gate; or which router of the model it is."""
    found = [re.search(r"\.(\d+)\.", path) for path in paths]
    return tuple(index if match is None else int(match[1]) for index, match in enumerate(found))
