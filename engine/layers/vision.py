"""What vision towers are built from: patches of pixels, attention within pictures or windows of them, and positions in
the plane.

    uint8 [n, height, width, 3] ─ normalise ─ cut ─ matrix ─> patches [N, size] ─ blocks ─ merge ─> embeddings

All media of a batch go through a tower together, their patches end to end; `Segments` says which patches see each
other. A tower is whole on every rank, because its pictures are small beside a prompt's other work. Left out: towers
that divide themselves over ranks, CUDA graphs.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import groupby
from operator import attrgetter
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.errors import ConfigError
from engine.kernels.dense.reference import Heads
from engine.layers.activation import gated_activation
from engine.layers.batch import upload
from engine.layers.build import Build
from engine.layers.linear import ReplicatedLinear
from engine.layers.model import Layer, check_shape, empty_weight, put
from engine.layers.norm import LayerNorm, RMSNorm
from engine.messages.media import Pixels
from engine.plugin.specs import LazyTensor

try:
    from torch.nn.attention import varlen
except ImportError:  # torch before 2.10
    varlen = None  # type: ignore[assignment]

Norm = LayerNorm | RMSNorm
ALIGNED = 8  # numbers of two bytes: what a GPU's matrix kernels want rows to begin at a multiple of
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "relu": functional.relu,
}


def vision_activation(name: str) -> Callable[[Tensor], Tensor]:
    """By its name in config.json. Raises ConfigError for one that is not known."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"the activation {name!r} is not supported; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


# ── pixels ───────────────────────────────────────────────────────────────────────────────────


def normalised(pixels: Pixels, device: torch.device) -> Tensor:
    """Float32 numbers of `pixels.shape`, as Pixels says. Does not wait for the device."""
    return normalised_together([pixels], device)[0][0]


def normalised_together(media: Sequence[Pixels], device: torch.device) -> list[Tensor]:
    """As `normalised`, in groups [n, *shape] of n that are alike and follow each other, as the slices of a clip are."""
    groups = []
    for _, group in groupby(media, attrgetter("shape", "scale", "mean", "std")):
        each = list(group)
        first = each[0]
        numbers = np.frombuffer(bytearray().join([one.data for one in each]), np.uint8)
        mean, std = upload(np.array([first.mean, first.std], np.float32), device)
        whole = upload(numbers.reshape(len(each), *first.shape), device).to(torch.float32)
        groups.append((whole * first.scale - mean) / std)
    return groups


def pictures_of(media: Sequence[Pixels], device: torch.device) -> Tensor:
    """The pictures [n, height, width, 3] of all `media`, which are of one size, normalised."""
    return torch.cat([each.flatten(0, 1) for each in normalised_together(media, device)])


def patches_of(media: Sequence[Pixels], patch: int, steps: int, merge: int, device: torch.device) -> Tensor:
    """The `merged_patches` of all `media`, one after the other; one that has a single frame shows it in all `steps`."""
    patches = []
    for frames in normalised_together(media, device):
        if frames.shape[1] == 1:
            frames = frames.expand(-1, steps, -1, -1, -1)
        patches.append(merged_patches(frames.flatten(0, 1), patch, steps, merge))
    return torch.cat(patches)


def runs_of(media: Sequence[Pixels]) -> list[tuple[int, int, int]]:
    """The grids (steps, high, wide) of `media`, those of one size that follow each other as one."""
    runs = groupby([each.grid for each in media], lambda grid: grid[1:])
    return [(sum([grid[0] for grid in run]), high, wide) for (high, wide), run in runs]


def merged_patches(frames: Tensor, patch: int, steps: int, merge: int) -> Tensor:
    """[n / steps * h * w, 3 * steps * patch * patch] of `frames` [n, height, width, 3]; a single one is repeated.

    Patches are in the order of squares of `merge` x `merge`, the numbers of a patch in that of a convolution's."""
    if len(frames) < steps:
        frames = frames.expand(steps, -1, -1, -1)
    count, height, width, channels = frames.shape
    high, wide = height // (patch * merge), width // (patch * merge)
    cut = frames.reshape(count // steps, steps, high, merge, patch, wide, merge, patch, channels)
    return cut.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, channels * steps * patch * patch)


class PatchEmbedding(Layer):
    """A convolution over patches that do not overlap: a matrix. Its weight is [size, channels, …] in checkpoints."""

    def __init__(self, build: Build, size: int, shape: tuple[int, ...], bias: bool) -> None:
        """`shape` is that of a patch, channels first."""
        super().__init__()
        self.shape = (size, *shape)
        self.weight = empty_weight(build, size, int(np.prod(shape)))
        self.bias = empty_weight(build, size) if bias else None

    def forward(self, patches: Tensor) -> Tensor:
        """[N, numbers of a patch] to [N, size]."""
        return functional.linear(patches.to(self.weight.dtype), self.weight, self.bias)

    def whole(self, parameter: str, part: str) -> tuple[int, ...] | None:
        return self.shape if parameter == "weight" else super().whole(parameter, part)

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        if parameter != "weight":
            return super().load(name, parameter, part, tensor)
        check_shape(name, tensor, self.shape)
        put(tensor[tuple(slice(None) for _ in self.shape)].flatten(1), self.weight)


# ── who sees whom ────────────────────────────────────────────────────────────────────────────


class Segments:
    """Runs of patches of which each sees its own run: pictures, or windows of them.

    Runs of one length attend together. Of several lengths, those of each length do; on a GPU from Ampere on all do at
    once, by a kernel that is told where runs begin (torch.nn.attention.varlen, of FlashAttention): in 16 bits."""

    def __init__(self, lengths: Sequence[int] | np.ndarray, device: torch.device) -> None:
        """`lengths` are those of the runs, which follow each other."""
        self.sizes, self.device = np.asarray(lengths, np.int64), device
        self.single = int(self.sizes[0]) if len(set(self.sizes.tolist())) == 1 else 0

    @cached_property
    def groups(self) -> list[Tensor]:
        """[runs, length] int64 of each length: the patches of its runs."""
        starts = np.cumsum(self.sizes) - self.sizes
        sizes = np.unique(self.sizes)
        return [upload(starts[self.sizes == size][:, None] + np.arange(size), self.device) for size in sizes]

    @cached_property
    def bounds(self) -> tuple[Tensor, int]:
        """[runs + 1] int32: where runs begin, and the last one ends; and the longest run."""
        return upload(np.cumsum([0, *self.sizes], dtype=np.int32), self.device), int(self.sizes.max())

    @classmethod
    def of_frames(cls, grids: Sequence[tuple[int, ...]], device: torch.device) -> Self:
        """Each step of each grid (steps, high, wide) by itself."""
        return cls(np.repeat([high * wide for _, high, wide in grids], [grid[0] for grid in grids]), device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[T, heads, dim] each, to [T, heads * dim]."""
        if self.single:
            q, k, v = (each.unflatten(0, (-1, self.single)).transpose(1, 2) for each in (query, key, value))
            mixed = functional.scaled_dot_product_attention(q, k, v)
            return mixed.transpose(1, 2).flatten(2).flatten(0, 1)
        if varlen is not None and flash_takes(query):
            begins, longest = self.bounds
            ragged: Any = varlen.varlen_attn(query, key, value, begins, begins, longest, longest)
            return cast(Tensor, ragged.flatten(1))
        out = torch.empty_like(query)
        for group in self.groups:  # [runs, length]: patches
            q, k, v = (each[group].transpose(1, 2) for each in (query, key, value))
            mixed = functional.scaled_dot_product_attention(q, k, v)
            out[group] = mixed.transpose(1, 2)
        return out.flatten(1)


def flash_takes(query: Tensor) -> bool:
    """Whether FlashAttention takes `query` [T, heads, dim]."""
    half = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0
    return half and query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


Turn = tuple[Tensor, Tensor]  # cosines and sines [T, 1, head_dim / 2], float32


def turned_by(places: np.ndarray, head_dim: int, theta: float, device: torch.device) -> Turn:
    """The rotation of patches at `places` [T, 2], row and column: half of the pairs of dimensions turn by each."""
    frequencies = 1.0 / theta ** (
        torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=device) / (head_dim // 2)
    )
    angles = (upload(places, device)[:, :, None].to(torch.float32) * frequencies).flatten(1)[:, None]
    return angles.cos(), angles.sin()


def block_places(high: int, wide: int, merge: int) -> np.ndarray:
    """int64 [high * wide, 2]: row and column of each patch of a grid, in the order of squares of `merge` x `merge`."""
    grid = np.indices((high, wide)).reshape(2, high // merge, merge, wide // merge, merge)
    return grid.transpose(1, 3, 2, 4, 0).reshape(-1, 2)


def grid_places(grids: Sequence[tuple[int, ...]], merge: int) -> np.ndarray:
    """As `block_places`, of all grids (steps, high, wide), one after the other."""
    return np.concatenate([np.tile(block_places(high, wide, merge), (steps, 1)) for steps, high, wide in grids])


# ── blocks ───────────────────────────────────────────────────────────────────────────────────


class VisionAttention(nn.Module):
    """Attention of `heads` heads between patches; `qkv` is one matrix, or three named by `parts`."""

    def __init__(self, build: Build, size: int, heads: int, parts: tuple[str, ...] = (), out: str = "proj") -> None:
        super().__init__()
        self.kernels = build.kernels
        self.heads = Heads(heads, heads, size // heads)
        outputs = dict.fromkeys(parts, size) if parts else 3 * size
        self.qkv = ReplicatedLinear(build, size, outputs, bias=True)
        self.out = out
        setattr(self, out, ReplicatedLinear(build, size, size, bias=True))

    def forward(self, hidden: Tensor, segments: Segments, by: Turn | None = None) -> Tensor:
        query, key, value = self.kernels.dense.rotate_heads(self.qkv(hidden), self.heads, None, by)
        mixed: Tensor = getattr(self, self.out)(segments.attend(query, key, value))
        return mixed


class GatedVisionMLP(Layer):
    """down(act(gate) * up)."""

    def __init__(self, build: Build, size: int, inner: int, activation: str) -> None:
        super().__init__()
        self.gate_up_proj = ReplicatedLinear(build, size, {"gate_proj": inner, "up_proj": inner}, bias=True)
        self.activation = gated_activation(build, activation)
        self.down_proj = ReplicatedLinear(build, inner, size, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(hidden)))

    def loaded(self) -> None:
        """Pads the inner size with zeros: rows that begin at odd places are read at a third of the speed by a GPU."""
        gate_up, down = self.gate_up_proj, self.down_proj
        gate_up.unpack_parts()
        if (missing := -down.inputs % ALIGNED) and gate_up.dense and down.dense and gate_up.bias is not None:
            gate_up.weight = _padded(gate_up.weight.unflatten(0, (2, -1)), (0, 0, 0, missing))
            gate_up.bias = _padded(gate_up.bias.unflatten(0, (2, -1)), (0, missing))
            down.weight = nn.Parameter(functional.pad(down.weight, (0, missing)), requires_grad=False)


def _padded(halves: Tensor, by: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(functional.pad(halves, by).flatten(0, 1), requires_grad=False)


class VisionMLP(nn.Module):
    """Two matrices with an activation between them; `names` are theirs in checkpoints."""

    def __init__(
        self, build: Build, size: int, inner: int, activation: str, names: tuple[str, str], outputs: int | None = None
    ) -> None:
        super().__init__()
        self.names = names
        self.activation = vision_activation(activation)
        setattr(self, names[0], ReplicatedLinear(build, size, inner, bias=True))
        setattr(self, names[1], ReplicatedLinear(build, inner, outputs or size, bias=True))

    def forward(self, hidden: Tensor) -> Tensor:
        first, second = (getattr(self, name) for name in self.names)
        said: Tensor = second(self.activation(first(hidden)))
        return said


class VisionBlock(nn.Module):
    """Attention, then an MLP; each reads a norm of the stream, and the next norm adds what it says to it. `names` are
    those of the two norms, the attention and the MLP in checkpoints."""

    def __init__(
        self, norms: tuple[Norm, Norm], attention: nn.Module, mlp: nn.Module, names: tuple[str, str, str, str]
    ) -> None:
        super().__init__()
        self.names = names
        for name, module in zip(names, (*norms, attention, mlp), strict=True):
            setattr(self, name, module)

    def forward(
        self, hidden: Tensor, stream: Tensor | None, segments: Segments, by: Turn | None = None
    ) -> tuple[Tensor, Tensor]:
        """`hidden` [T, size] is still to be added to `stream`, None before the first block; so is what is returned."""
        first, second, attention, mlp = (getattr(self, name) for name in self.names)
        hidden, stream = first.add(hidden, stream)
        hidden, stream = second.add(attention(hidden, segments, by), stream)
        return mlp(hidden), stream
