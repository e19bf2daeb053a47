"""How often each expert is chosen.

Routers count on the device, while they are told to: in tensors of their own, at the addresses that CUDA graphs know.
Here the counts are read, which waits for the steps launched before.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from engine.errors import RequestError
from engine.layers.model import Model
from engine.layers.moe import Router
from engine.messages.questions import CountAction, ExpertCounts

NONE = "the model has no experts to choose from; ask a server with a mixture of experts"


def routers_of(model: Model) -> dict[str, Router]:
    """By their paths, in order."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, Router)}


def alone(own: object) -> list[Any]:
    """What each stage gives, where there is one."""
    return [own]


@torch.inference_mode()
def count_experts(model: Model, action: CountAction, gathered: Callable[[object], list[Any]] = alone) -> ExpertCounts:
    """Does `action`, and tells the counts of all stages: `gathered` makes a list of what each stage gives. Raises
    RequestError for a model without experts."""
    routers = routers_of(model)
    stages = [each for each in gathered(_count(routers, action) if routers else None) if each is not None]
    if not stages:
        raise RequestError(NONE)
    layers = tuple(layer for _, own, _ in stages for layer in own)
    return ExpertCounts(stages[0][0], layers, b"".join(counts for _, _, counts in stages))


def _count(routers: Mapping[str, Router], action: CountAction) -> tuple[bool, tuple[int, ...], bytes]:
    """Does `action`, and tells whether these count, their layers, and their counts, int64 [layers, experts]."""
    recorders = [router.recorder for router in routers.values()]
    if action == "start":
        for recorder in recorders:
            recorder.counts.zero_()
    if action != "look":
        for recorder in recorders:
            recorder.on.fill_(action == "start")
    counts = torch.stack([recorder.counts for recorder in recorders]).cpu()
    counting = bool(recorders[0].on.item())
    return counting, _layers(list(routers)), counts.numpy().astype("<i8").tobytes()


def _layers(paths: list[str]) -> tuple[int, ...]:
    """The number in each path, as in model.layers.3.mlp.gate; or which router of the model it is."""
    found = [re.search(r"\.(\d+)\.", path) for path in paths]
    return tuple(index if match is None else int(match[1]) for index, match in enumerate(found))
