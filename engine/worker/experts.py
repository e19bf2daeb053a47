"""What a worker does about mixtures of experts: padding chooses none, and how often each is chosen can be asked for.

The padding of a captured step would choose experts like any token: their weights would be read for nothing, and counted
as choices. So a batch says how many of its tokens are real, and the routers are told before each forward pass.

Routers count on the device, while they are told to; here the counts are read, which waits for the steps launched
before.
"""

import re
from typing import Any

import torch

from engine.errors import RequestError
from engine.layers.batch import Batch
from engine.layers.model import Model
from engine.layers.moe import Router
from engine.messages.questions import CountAction, ExpertCounts

NONE = "the model has no experts to choose from; ask a server with a mixture of experts"


class Herald:
    """A hook before the forward pass, which tells `routers` how many tokens of the batch are real."""

    def __init__(self, routers: list[Router]) -> None:
        self.routers = routers

    def __call__(self, model: Model, inputs: tuple[Any, ...]) -> None:
        (batch,) = inputs
        assert isinstance(batch, Batch)
        for router in self.routers:
            router.real = batch.real


def heed_padding(model: Model) -> bool:
    """Whether it matters to `model` how many tokens of a batch are real: then its routers will be told."""
    routers = list(routers_of(model).values())
    if routers and not any(isinstance(hook, Herald) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(Herald(routers))
    return bool(routers)


def routers_of(model: Model) -> dict[str, Router]:
    """By their paths, in order."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, Router)}


@torch.inference_mode()
def count_experts(model: Model, action: CountAction) -> ExpertCounts:
    """Does `action`, and tells the counts. Raises RequestError for a model without experts."""
    routers = routers_of(model)
    if not routers:
        raise RequestError(NONE)
    recorders = [router.recorder for router in routers.values()]
    if action == "start":
        for recorder in recorders:
            recorder.counts.zero_()
    if action != "look":
        for recorder in recorders:
            recorder.on.fill_(action == "start")
    counts = torch.stack([recorder.counts for recorder in recorders]).cpu()
    counting = bool(recorders[0].on.item())
    return ExpertCounts(counting, _layers(list(routers)), counts.numpy().astype("<i8").tobytes())


def _layers(paths: list[str]) -> tuple[int, ...]:
    """The number in each path, as in model.layers.3.mlp.gate; or which router of the model it is."""
    found = [re.search(r"\.(\d+)\.", path) for path in paths]
    return tuple(index if match is None else int(match[1]) for index, match in enumerate(found))
