"""How often a model's experts are chosen: routers count on the device, while they are told to; here they are read.

To read waits for the steps that are launched. A step that was launched before the start is not counted. Where the same
step is replayed as a CUDA graph, its padding is left out.
"""

import re

import torch

from engine.layers.model import Model
from engine.layers.moe import Router
from engine.messages import CountExperts, ExpertCounts

NONE = "the model has no experts to choose from; ask a server with a mixture of experts"


@torch.inference_mode()
def count_experts(model: Model, message: CountExperts) -> ExpertCounts:
    """Does what `message` says, and tells the counts."""
    routers = {path: layer for path, layer in model.named_modules() if isinstance(layer, Router)}
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
