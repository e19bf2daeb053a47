"""The base of layers that hold weights, the base of models, and how a checkpoint finds its way into them.

A weight's name in the checkpoint is its layer's path in the model, where a layer that stacks several
tensors answers to each one's name in place of its own. So the checkpoint's names are Hugging Face's and
a model class needs no table of them. Names and shapes are compared before memory is taken for weights: a model that
is built `deferred` has none until then. Left out: weights that change shape on the way in.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.layers.attention import Backend
from engine.layers.batch import Batch
from engine.layers.build import Build
from engine.layers.pieces import Stacks, divided
from engine.messages.media import Pixels
from engine.messages.step import TOKEN
from engine.options.sizes import show_size
from engine.parallel.collectives import Divided
from engine.plugin.specs import KVSpec, LazyTensor, StateGroup

LARGEST = 1 << 44  # bytes of one weight
PIECE_BYTES = 32 << 20
IN_FLIGHT = 3


class Layer(nn.Module):
    """A module with weights. `parts` names the checkpoint's modules that it stacks; "" is its own name.

    `extras` are names under its own of what a checkpoint may hold or not; `load` gets them as parameters of part ""."""

    parts: tuple[str, ...] = ("",)
    extras: tuple[str, ...] = ()
    stored_as: str = ""  # its path in a checkpoint that names it otherwise than the model does
    stored_in: Mapping[str, str] = MappingProxyType({})  # by a part: the checkpoint's module that stacks it with others

    def named(self, path: str) -> None:
        """Called once, before any weight is loaded: the layer's path in the model, which is its name in checkpoints."""

    def names(self, path: str, parameter: str) -> list[tuple[str, str]]:
        """The checkpoint's tensors that `parameter` of this layer, which is at `path`, consists of; each with its part,
        as `load` is told it."""
        return [(f"{checkpoint_path(path, part)}.{parameter}", part) for part in self.parts]

    def whole(self, parameter: str, part: str) -> tuple[int, ...] | None:
        """The shape that the checkpoint's tensor for this part of `parameter` must have; None if only `load` knows."""
        known = not part and parameter in self._parameters
        return tuple(self.get_parameter(parameter).shape) if known else None

    def optional(self) -> frozenset[str]:
        """Parameters that a checkpoint need not have."""
        return frozenset()

    def passed_over(self, path: str) -> list[str]:
        """The checkpoint's tensors that belong to this layer and that it has no use for."""
        return []

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        """Copies what this rank needs of `tensor`, called `name` in the checkpoint, into `parameter`.

        Raises ConfigError when its shape is not the one that the model's configuration calls for.
        """
        target = self.get_parameter(parameter)
        copy_weight(name, target, tensor, tuple(target.shape), (slice(None),))

    def loaded(self) -> None:
        """Called once, when every weight of the model has been loaded."""

    def fill_at_random(self, generator: torch.Generator) -> None:
        """In the place of loading, for benchmarks: matrices of deviation 0.02, vectors near 1."""
        for weight in self.parameters(recurse=False):
            weight.normal_(0.0, 0.02, generator=generator)
            if weight.dim() == 1:
                weight.add_(1.0)


def empty_weight(
    build: Build, *shape: int, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> nn.Parameter:
    """A weight of this rank, to be filled by `Layer.load`; of the build's type and device unless others are given.

    Raises ConfigError for a shape that no memory could hold."""
    dtype = dtype or build.dtype
    if math.prod(shape) > LARGEST // dtype.itemsize:
        raise ConfigError(
            f"the model's configuration calls for a weight of shape {shape}, which is more than {LARGEST >> 40} TiB; "
            "one of its sizes is wrong"
        )
    device = device or (torch.device("meta") if build.deferred else build.device)
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def copy_weight(
    name: str, target: Tensor, tensor: LazyTensor, whole: tuple[int, ...], index: tuple[slice, ...]
) -> None:
    """Copies `tensor[index]` into `target` if the tensor's full shape is `whole`, else raises ConfigError."""
    check_shape(name, tensor, whole)
    put(tensor[index], target)


def put(source: Tensor, target: Tensor) -> None:
    """Copies `source` into `target`, which may be on a GPU, where it becomes of the type there."""
    if target.is_cuda and source.is_cpu and source.dim():
        _send(source, target)
    else:
        target.copy_(source)


def _send(source: Tensor, target: Tensor) -> None:
    """Copies to a GPU in pieces through pinned memory, so that one is read while the one before travels.

    As fast as either; from memory that is not pinned, the driver does one after the other. At most IN_FLIGHT pieces
    wait, as pinned memory is kept by torch for later."""
    rows = max(1, PIECE_BYTES // max(1, source[:1].numel() * source.element_size()))
    sent: deque[torch.cuda.Event] = deque()
    for part, place in zip(source.split(rows), target.split(rows), strict=True):
        if len(sent) == IN_FLIGHT:
            sent.popleft().synchronize()
        place.copy_(part.pin_memory().to(target.device, non_blocking=True))
        sent.append(torch.cuda.Event())
        sent[-1].record()


def check_shape(name: str, tensor: LazyTensor, whole: tuple[int, ...]) -> None:
    """Raises ConfigError when `tensor`, called `name` in the checkpoint, is not of shape `whole`."""
    if tuple(tensor.shape) != whole:
        raise ConfigError(
            f"weight {name} has shape {tuple(tensor.shape)} in the checkpoint, but its configuration "
            f"calls for {whole}: the two do not belong together"
        )


Wanted = dict[str, tuple[Layer, str, str]]  # by a tensor's name: the layer, parameter and part that `load` is told


class Elsewhere(nn.Module):
    """In the place of a layer that another stage of the pipeline holds: its weights in a checkpoint are passed over."""


class Model(nn.Module, ABC):
    """A model family: constructed from config.json's terms and a Build, then loaded, then run.

        ids ─ embed ─> hidden ─ run: layers first .. last-1 ─> hidden ─ logits

    A subclass sets `vocab_size`, `backends` (one for each KV group) and `held`, the layers that it has, and writes
    `embed`, `run` and `logits`. With a pipeline a rank holds a range of the layers: `held` is `build.stage(layers)`.
    The first stage embeds, and what `run` returns on one stage goes to `run` of the next, as `width` numbers a token of
    the build's type. A model that does so says that it is `staged`; others run on one stage alone.

    Recurrent layers keep `states`, which they read and write at `batch.states[name][layer][slots]`. These start as
    zeros with each request, and each position is computed once, in order, however prompts are cut. A decode step on a
    GPU is captured, and so are prompts up to `most_graph_tokens`: layers then see the batch's tensors alone.
    """

    staged = False
    in_copies = False  # whether attention may run in copies, which share the other layers (layers/spread.py)
    width: int = 0  # of the hidden states that a staged model passes on
    vocab_size: int
    held: range = range(1)
    yields: int = TOKEN  # what comes of a row, as in a StepPlan: a TOKEN, or a VECTOR
    embedding_size: int = 0  # numbers of a vector
    backends: tuple[Backend, ...] = ()
    states: tuple[StateGroup, ...] = ()  # what its recurrent layers keep of each request
    most_graph_tokens: float = float("inf")  # as of Backend; 0 where layers plan prompts on the host
    vocabulary: Divided | None = None  # whose logits a rank makes, where several divide them
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # ends of names in checkpoints that hold no weight
    renamed: tuple[tuple[str, str], ...] = ()  # beginnings of names in some checkpoints, and what they are here
    stacked: Stacks = MappingProxyType({})  # modules of its checkpoints that stack what layers hold apart
    turns = False  # whether rotary embedding may place a token elsewhere than at its position (Batch.turns)
    sees = False  # whether it `encode`s media
    levels: int = 0  # vectors of each embedding beside the first one, as of Media

    @abstractmethod
    def __init__(self, config: dict[str, Any], build: Build) -> None:
        """Allocates the weights, unset. Raises ConfigError for a configuration that it cannot run."""
        super().__init__()
        if build.mesh.pp > 1 and not self.staged:
            raise ConfigError(f"{type(self).__name__} runs on one stage, and there are {build.mesh.pp} (pp); say pp 1")
        if build.mesh.dp > 1 and not self.in_copies:
            raise ConfigError(
                f"{type(self).__name__} runs with one copy of attention, and there are {build.mesh.dp} "
                "(--dp-attention); say --dp-attention 1"
            )
        self.device = build.device
        self.dtype = build.dtype
        self.quantization = build.quantization
        self.page_size = build.page_size
        self.kernels = build.kernels

    @abstractmethod
    def embed(self, batch: Batch) -> Tensor:
        """What the first layer reads: a vector of each of the step's tokens, [T, H]."""

    @abstractmethod
    def run(self, hidden: Tensor, batch: Batch, first: int, last: int) -> Tensor:
        """Layers first .. last-1 on `hidden` [T, H], what `embed` or the layer before returned, which may be written
        over. Returns [T, H]; after the last layer of the model, what `logits` reads."""

    def forward(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """The hidden states of the step's tokens, [T, H], after the layers that are `held`; `hidden` [T, H] are those
        that the stage before has passed on, and may be written over."""
        return self.run(self.embed(batch) if hidden is None else hidden, batch, self.held.start, self.held.stop)

    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Float32 vectors [R, embedding_size] of the rows whose hidden states are `hidden` [T, H], of a model that
        yields vectors."""
        raise NotImplementedError(f"{type(self).__name__} makes no vectors")

    def encode(self, media: Sequence[Pixels]) -> list[Tensor]:
        """The embeddings of pictures and clips, of a model that sees: [tokens, (1 + levels) * width] of each."""
        raise NotImplementedError(f"{type(self).__name__} reads text alone")

    def largest_medium(self, tokens: int) -> Pixels:
        """Made-up pixels that take as much memory to encode as any of up to `tokens` embeddings, and are as many or
        nearly so."""
        raise NotImplementedError(f"{type(self).__name__} reads text alone")

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [S, vocab_size] of some of the hidden states, [S, H]; of their type or float32. On a GPU this may be
        part of a CUDA graph: nothing here may wait for the device, or depend on what the host knew."""

    def own_logits(self, hidden: Tensor) -> Tensor:
        """As `logits`, of this rank's tokens alone where there is a `vocabulary`."""
        return self.logits(hidden)

    def kv_spec(self) -> KVSpec:
        """What it keeps of requests: by default one group of pages a backend, and `states`."""
        groups = tuple(backend.kv_group() for backend in self.backends)
        return KVSpec(page_size=self.page_size, groups=groups, states=self.states)

    def prepare(self, batch: Batch) -> tuple[Any, ...]:
        """What goes into `batch.plans` before `forward`."""
        return tuple(backend.prepare(batch) for backend in self.backends)

    def name_layers(self, names: Iterable[str] | None = None) -> None:
        """Tells each layer its name. `load` does, and so must who fills the weights otherwise; `names` are those of the
        checkpoint's tensors."""
        names = None if names is None else list(names)
        used = [
            (beginning, own)
            for beginning, own in self.renamed
            if names is None or any(name.startswith(beginning) for name in names)
        ]
        modules = {  # by a module here (parent.module): the one of checkpoints that stacks it
            f"{stack.rpartition('.')[0]}.{part}": stack.rpartition(".")[2]
            for stack, parts in self.stacked.items()
            for part in parts
        }
        for path, layer in self.named_modules():
            if isinstance(layer, Layer):
                layer.stored_as = next(
                    (old + path.removeprefix(own) for old, own in used if path.startswith(own)), path
                )
                ends = {part: _last_two(checkpoint_path(path, part)) for part in layer.parts}
                layer.stored_in = {part: modules[end] for part, end in ends.items() if end in modules}
                layer.named(path)

    def allocate(self) -> None:
        """Takes the memory of weights that have none, because the model was built `deferred`.

        Raises ConfigError when the device has too little."""
        waiting = [weight for weight in self.parameters() if weight.is_meta]
        size = sum(weight.nbytes for weight in waiting)
        with torch.inference_mode(False):
            for weight in waiting:
                try:
                    there = torch.empty(weight.shape, dtype=weight.dtype, device=self.device)
                except RuntimeError as error:  # of an allocator
                    raise ConfigError(
                        f"the model's weights take {show_size(size)}, and {self.device} has too little memory free"
                    ) from error
                torch.utils.swap_tensors(weight, nn.Parameter(there, requires_grad=False))  # shared ones stay shared

    def load(self, tensors: Iterable[tuple[str, LazyTensor]]) -> None:
        """Fills the weights. Raises ConfigError that names unknown and missing ones, or one of another shape than the
        configuration calls for, before memory is taken for any.

        A parameter shared by two layers (tied embeddings) is loaded under its first name; the other
        name may appear in the checkpoint and is passed over.
        """
        tensors = [part for name, tensor in tensors for part in self._apart(name, tensor)]
        self.name_layers(name for name, _ in tensors)
        wanted, found = self._matched((self._own_name(name), tensor) for name, tensor in tensors)
        for name, tensor in found:
            layer, parameter, part = wanted[name]
            if (whole := layer.whole(parameter, part)) is not None:
                check_shape(name, tensor, whole)
        self.allocate()
        for name, tensor in found:
            layer, parameter, part = wanted[name]
            layer.load(name, parameter, part, tensor)
        for module in self.modules():
            if isinstance(module, Layer):
                module.loaded()

    def _apart(self, name: str, tensor: LazyTensor) -> Iterator[tuple[str, LazyTensor]]:
        """What a checkpoint stacks as what the layers hold, and anything else as it is."""
        module, _, end = name.rpartition(".")
        parts = self.stacked.get(_last_two(module))
        if parts is not None and end in ("weight", "bias"):
            return divided(name, tensor, parts)
        if parts is not None and self.quantization is not None:
            return self.quantization.divided(name, tensor, parts)
        return iter([(name, tensor)])

    def _own_name(self, name: str) -> str:
        """What a weight of a checkpoint is called here."""
        for beginning, own in self.renamed:
            if name.startswith(beginning):
                return own + name.removeprefix(beginning)
        return name

    def _matched(self, tensors: Iterable[tuple[str, LazyTensor]]) -> tuple[Wanted, list[tuple[str, LazyTensor]]]:
        """What the layers want, by name, and those of `tensors` that are wanted. Raises ConfigError as `load` does."""
        wanted: Wanted = {}
        aliases: set[str] = set()
        extras: set[str] = set()
        seen: set[int] = set()
        elsewhere: list[str] = []
        for path, layer in self.named_modules():
            if isinstance(layer, Elsewhere):
                elsewhere.append(f"{path}.")
            if not isinstance(layer, Layer):
                continue
            aliases.update(layer.passed_over(path))
            for parameter, weight in layer.named_parameters(recurse=False):
                names = layer.names(path, parameter)
                if id(weight) in seen:
                    aliases.update(name for name, _ in names)
                else:
                    wanted.update((name, (layer, parameter, part)) for name, part in names)
                seen.add(id(weight))
            wanted.update((f"{path}.{extra}", (layer, extra, "")) for extra in layer.extras)
            extras.update(f"{path}.{extra}" for extra in layer.extras)
        missing = {
            name: None
            for name, (layer, parameter, _) in wanted.items()
            if name not in extras and parameter not in layer.optional()
        }
        unknown, found, others = [], [], tuple(elsewhere)
        for name, tensor in tensors:
            if name in wanted:
                found.append((name, tensor))
                missing.pop(name, None)
            elif name not in aliases and not name.endswith(self.ignored) and not name.startswith(others):
                unknown.append(name)
        if missing or unknown:
            both = (("missing", list(missing)), ("unknown", unknown))
            complaints = "; ".join(f"{len(names)} {word} ({_some(names)})" for word, names in both if names)
            raise ConfigError(
                f"the checkpoint's weights do not fit {type(self).__name__}: {complaints}. "
                "Is its config.json the right one?"
            )
        return wanted, found


def checkpoint_path(path: str, part: str) -> str:
    """The module path in the checkpoint of `part` of the layer at `path`: its sibling of that name."""
    return path if not part else ".".join([*path.split(".")[:-1], part])


def _last_two(path: str) -> str:
    """Of a module's path its own name, behind its parent's."""
    return ".".join(path.split(".")[-2:])


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
