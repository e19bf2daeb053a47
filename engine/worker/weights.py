"""Streams a checkpoint into a model: one tensor at a time in memory beside the model, and a bar to watch."""

import math
import sys
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from engine.layers.model import Model
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


def weight_bytes(model: Model) -> int:
    """Bytes that the model's weights take on its device, dense or packed; tied ones count once."""
    return sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
