"""Linear attention by the gated delta rule (Gated DeltaNet, arXiv:2412.06464): a memory of fixed size for each request.

    hidden ─┬─ q,k,v ─ short convolution ─ silu ─ delta rule ─ norm ─(·)─ out
            ├─ beta, step ────────────────────────┘                   │
            └─ z ─ silu ──────────────────────────────────────────────┘

Two states of each request are kept, and no pages: the last inputs of the convolution, and the memory of each value
head, in float32. Heads are divided over the ranks that share attention, and what belongs to a head goes with it. Left
out: biases, activations other than silu.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.errors import ConfigError
from engine.kernels.delta.reference import DeltaGates, DeltaHeads, StepRows
from engine.layers.batch import Batch
from engine.layers.build import Build
from engine.layers.linear import ColumnLinear, RowLinear
from engine.layers.model import Layer, check_shape, empty_weight, put
from engine.layers.norm import RMSNorm
from engine.parallel.mesh import Axis
from engine.plugin.specs import LazyTensor, StateGroup

AXIS: Axis = "attention_tp"
WINDOW, MEMORY = "delta window", "delta memory"  # names of the groups of states


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaShape:
    """Sizes of a model's gated delta nets. Each key head serves value_heads / key_heads value heads; the convolution
    sees `width` tokens. Raises ConfigError for numbers of heads that do not go together."""

    hidden_size: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    width: int
    epsilon: float

    def __post_init__(self) -> None:
        if self.value_heads % self.key_heads:
            raise ConfigError(
                f"{self.value_heads} value heads of linear attention are no multiple of its {self.key_heads} key heads"
            )

    @property
    def keys(self) -> int:
        """Numbers of a token's keys over all heads."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Numbers of a token's values over all heads."""
        return self.value_heads * self.value_dim

    def held(self, build: Build) -> DeltaHeads:
        """The heads of this rank. Raises ConfigError where they do not divide."""
        key = build.local(self.key_heads, AXIS, "key heads of linear attention")
        return DeltaHeads(key, key * self.value_heads // self.key_heads, self.key_dim, self.value_dim)

    def states(self, build: Build, layers: int) -> tuple[StateGroup, ...]:
        """What `layers` of them keep of a request on this rank."""
        heads = self.held(build)
        channels = 2 * heads.key * heads.key_dim + heads.value * heads.value_dim
        kind = str(build.dtype).removeprefix("torch.")
        memory = (heads.value, heads.key_dim, heads.value_dim)
        groups = (
            StateGroup(name=WINDOW, layers=layers, shape=(self.width - 1, channels), dtype=kind),
            StateGroup(name=MEMORY, layers=layers, shape=memory, dtype="float32"),
        )
        return groups if layers else ()


class ShortConvolution(Layer):
    """The weights [channels, width] of a causal convolution of each channel by itself; a checkpoint has them as
    [channels, 1, width], those of queries, keys and values one below the other."""

    def __init__(self, shape: DeltaShape, build: Build) -> None:
        super().__init__()
        sizes = (shape.keys, shape.keys, shape.values)
        self.shares = [build.share(size, AXIS, "channels of a convolution") for size in sizes]
        self.stored = (sum(sizes), 1, shape.width)
        self.starts = (0, shape.keys, 2 * shape.keys)
        self.weight = empty_weight(build, sum(share.stop - share.start for share in self.shares), shape.width)

    def whole(self, parameter: str, part: str) -> tuple[int, ...]:
        return self.stored

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        check_shape(name, tensor, self.stored)
        begin = 0
        for start, share in zip(self.starts, self.shares, strict=True):
            rows = slice(start + share.start, start + share.stop)
            count = share.stop - share.start
            put(tensor[rows, slice(0, 1), slice(0, self.stored[2])][:, 0], self.weight[begin : begin + count])
            begin += count


class GatedDeltaNet(Layer):
    """Layer `place` of those that keep these states. Checkpoints call it `linear_attn`.

    Its projections are `in_proj_q`, `in_proj_k`, `in_proj_v` and `in_proj_z`, and of the gates `in_proj_b` and
    `in_proj_a`: a model whose checkpoints stack them otherwise says so (`Model.stacked`)."""

    def __init__(self, shape: DeltaShape, build: Build, place: int, *, summed: bool = True) -> None:
        super().__init__()
        self.kernels = build.kernels
        self.place = place
        self.heads = shape.held(build)
        self.share = build.share(shape.value_heads, AXIS, "value heads of linear attention")
        self.value_heads = shape.value_heads
        stacked = {"in_proj_q": shape.keys, "in_proj_k": shape.keys, "in_proj_v": shape.values}
        self.in_proj = ColumnLinear(build, shape.hidden_size, {**stacked, "in_proj_z": shape.values}, axis=AXIS)
        gates = {"in_proj_b": shape.value_heads, "in_proj_a": shape.value_heads}
        self.gates_proj = ColumnLinear(build, shape.hidden_size, gates, axis=AXIS)
        self.conv1d = ShortConvolution(shape, build)
        self.A_log = empty_weight(build, self.heads.value, dtype=torch.float32)
        self.dt_bias = empty_weight(build, self.heads.value, dtype=torch.float32)
        self.norm = RMSNorm(build, shape.value_dim, shape.epsilon)
        self.out_proj = RowLinear(build, shape.values, shape.hidden_size, summed=summed, axis=AXIS)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[T, hidden_size] in and out; the states of the batch's rows go on."""
        rows = StepRows(batch.slots, batch.row_offsets, batch.lengths)
        window, memory = (batch.states[name][self.place] for name in (WINDOW, MEMORY))
        values = self.heads.value * self.heads.value_dim
        mixed, z = self.in_proj(hidden, batch).split([len(self.conv1d.weight), values], dim=1)
        beta, step = self.gates_proj(hidden, batch).chunk(2, dim=1)
        ops = self.kernels.delta
        mixed = ops.convolve(mixed, self.conv1d.weight, window, rows)
        made = ops.delta_rule(mixed, DeltaGates(beta, step, self.A_log, self.dt_bias), self.heads, memory, rows)
        gate = functional.silu(z.to(torch.float32)).view_as(made)
        return self.out_proj((self.norm(made) * gate).to(hidden.dtype).flatten(1), batch)

    def whole(self, parameter: str, part: str) -> tuple[int, ...]:
        return (self.value_heads,)

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        check_shape(name, tensor, (self.value_heads,))
        put(tensor[self.share], self.get_parameter(parameter))
