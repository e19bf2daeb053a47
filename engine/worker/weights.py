"""Streams a checkpoint into a model: one tensor at a time in memory beside the model, and a bar to watch.

Or fills it at random, where only its speed is of interest.
"""

import math
import sys
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from engine.layers.model import Layer, Model
from engine.layers.moe import Router
from engine.plugin.specs import Checkpoint, LazyTensor


@torch.inference_mode()
def load_weights(model: Model, checkpoint: Checkpoint) -> None:
    """Fills `model`. Raises ConfigError for weights that are missing, unknown or of another shape.

    The bar goes to standard error, if that is a terminal.
    """
    tensors = list(checkpoint.tensors())
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("loading weights", total=sum(math.prod(tensor.shape) for _, tensor in tensors))

        def watched() -> Iterator[tuple[str, LazyTensor]]:
            for name, tensor in tensors:
                yield name, tensor
                progress.advance(task, math.prod(tensor.shape))

        model.load(watched())


@torch.inference_mode()
def fill_at_random(model: Model, ties: bool = False) -> None:
    """Gives the layers of `model` seeded weights, for benchmarks without a checkpoint. With `ties` its routers score
    all experts alike, so that all tokens choose the first ones: as few weights are read as there can be."""
    model.name_layers()
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    layers = [layer for layer in model.modules() if isinstance(layer, Layer)]
    for layer in layers:
        layer.fill_at_random(generator)
        if ties and isinstance(layer, Router):
            for weight in layer.parameters():
                weight.zero_()
    for layer in layers:
        layer.loaded()


def weight_bytes(model: Model) -> int:
    """Bytes that the model's weights take on its device, dense or packed; tied ones count once."""
    return sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
