"""Streams a checkpoint into a model: one tensor at a time in memory beside the model, and a bar to watch.

Or fills it at random, where only its speed is of interest.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine.errors import ConfigError
from engine.layers.model import Layer, Model
from engine.layers.moe import Router
from engine.options.sizes import show_size
from engine.plugin.specs import Checkpoint, LazyTensor
from engine.plugin.terms import Terms
from engine.worker.memory import available_memory

Tensors = Sequence[tuple[str, LazyTensor]]


def checked_tensors(checkpoint: Checkpoint, terms: Terms) -> Tensors:
    """Every weight of `checkpoint`, not read yet.

    Raises ConfigError for files that are missing, cut or damaged, for a name that comes twice, and for numbers of
    layers and tokens that the weights contradict: who builds one layer after another, or spells every token, would
    never end. All other sizes are compared when the model is there."""
    tensors = list(checkpoint.tensors())
    counts = Counter(name for name, _ in tensors)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ConfigError(
            f"the checkpoint has {len(twice)} weights twice, {twice[0]} among them; remove the files that are not of it"
        )
    sizes = {size for _, tensor in tensors for size in tensor.shape}
    vocab_size, layers = terms.get("vocab_size"), terms.get("num_hidden_layers")
    if tensors and type(vocab_size) is int and vocab_size not in sizes:
        raise terms.wrong("vocab_size", "that of the checkpoint, where no weight has so many rows")
    if tensors and type(layers) is int and layers > len(tensors):
        raise terms.wrong("num_hidden_layers", f"at most {len(tensors)}, as so many weights are in the checkpoint")
    return tensors


@torch.inference_mode()
def load_weights(model: Model, tensors: Tensors) -> None:
    """Fills `model`. Raises ConfigError for weights that are missing, unknown or of another shape.

    The bar goes to standard error, if that is a terminal.
    """
    if not sys.stderr.isatty():
        return model.load(tensors)
    from rich.console import Console  # here: importing it takes as long as reading a small model
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading weights", total=sum(math.prod(tensor.shape) for _, tensor in tensors))

        def advance(numbers: int) -> None:
            progress.advance(task, numbers)

        model.load((name, Watched(tensor, advance)) for name, tensor in tensors)


class Watched:
    """A tensor not read yet that says how many of its numbers are, each once."""

    def __init__(self, tensor: LazyTensor, advance: Callable[[int], None]) -> None:
        self._tensor = tensor
        self._advance = advance
        self._left = math.prod(tensor.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._tensor.shape

    def __getitem__(self, index: slice | tuple[slice, ...]) -> torch.Tensor:
        part = self._tensor[index]
        self._read(part.numel())
        return part

    def packed(self, rows: slice, columns: slice) -> tuple[str, Any] | None:
        packed = getattr(self._tensor, "packed", None)
        found: tuple[str, Any] | None = None if packed is None else packed(rows, columns)
        if found is not None:
            high, wide = (
                len(range(*index.indices(size))) for index, size in zip((rows, columns), self.shape, strict=True)
            )
            self._read(high * wide)
        return found

    def _read(self, numbers: int) -> None:
        self._advance(min(numbers, self._left))
        self._left -= min(numbers, self._left)


@torch.inference_mode()
def fill_at_random(model: Model, ties: bool = False) -> None:
    """Gives the layers of `model` seeded weights, for benchmarks without a checkpoint. With `ties` its routers score
    all experts alike, so that all tokens choose the first ones: as few weights are read as there can be.

    Raises ConfigError when the device has too little memory for them."""
    model.name_layers()
    needed = sum(weight.nbytes for weight in model.parameters() if weight.is_meta)
    if needed > (free := available_memory(model.device)):  # a CPU's is only taken when it is written
        raise ConfigError(
            f"the weights of the model's configuration take {show_size(needed)}, and {model.device} has "
            f"{show_size(free)} free"
        )
    model.allocate()
    generator = torch.Generator(next(model.parameters()).device)
    layers = [layer for layer in model.modules() if isinstance(layer, Layer)]
    for number, layer in enumerate(layers):
        generator.manual_seed(number)  # what all ranks hold whole is the same on all, whatever came before
        layer.fill_at_random(generator)
        if ties and isinstance(layer, Router):
            for weight in layer.parameters():
                weight.zero_()
    for layer in layers:
        layer.loaded()


def weight_bytes(model: Model) -> int:
    """Bytes that the model's weights take on its device, dense or packed; tied ones count once."""
    return sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
