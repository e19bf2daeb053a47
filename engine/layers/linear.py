"""Matrix multiplication layers, named by the dimension that tensor parallelism divides.

Projections of the same input are stacked into one matrix, hence one GEMM; each layer declares which
tensors of the checkpoint are its parts. On a CPU parts that the checkpoint holds in packed blocks stay packed
(engine/kernels/cpu/calls.py); where the build has a quantization, matrices are stored by it (quantization.py). A rank
holds a `Shard` of its matrices; with one rank it is the whole. A RowLinear takes what a ColumnLinear returns, so the
ranks meet once, in the sum of the former:

    x, on all ranks ─ ColumnLinear ─> outputs, divided ─ … ─ RowLinear ─> parts of a sum ─ all_reduce ─> on all ranks

Packed parts stay packed where a cut between ranks falls between blocks; where it falls within one, they are unpacked.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.kernels.dense.reference import Heads, Ops
from engine.kernels.types import Packed, PackedMatrix
from engine.layers.batch import Batch
from engine.layers.build import Build
from engine.layers.model import Layer, check_shape, checkpoint_path, copy_weight, empty_weight
from engine.layers.quantization import QuantizedLinear, Shard
from engine.parallel.collectives import all_reduce
from engine.parallel.mesh import Axis
from engine.plugin.specs import LazyTensor


def packed_part(dense: Ops, tensor: LazyTensor, rows: slice, columns: slice) -> Packed | None:
    """That part of `tensor` as it is packed in the checkpoint, where `dense` multiplies by such; else None."""
    packed = getattr(tensor, "packed", None)
    if not dense.packed_kinds or packed is None:
        return None
    found: Packed | None = packed(rows, columns)
    return found if found is not None and found[0] in dense.packed_kinds else None


class Linear(Layer):
    """y = x Wᵀ + b with the weight [rows, inputs] of all parts, one after the other: dense, packed or quantized.

    `sizes` are the output features of each part and `inputs` the input features, of the whole model; of these the rank
    holds `shard`. A quantization is asked once the layer's name is known; a layer that is not `quantizable` is dense.
    """

    held_dense = False  # what is quantized in the checkpoint is kept as what it stands for: `weight` is used itself

    def __init__(
        self,
        build: Build,
        sizes: Mapping[str, int],
        inputs: int,
        shard: Shard,
        bias: bool,
        quantizable: bool = True,
    ) -> None:
        super().__init__()
        self.build = build
        self.sizes = dict(sizes)
        self.parts = tuple(sizes)
        self.inputs = inputs
        self.shard = shard
        rows = sum(shard.rows_of(part) for part in sizes)
        self.waits = build.quantization is not None and quantizable  # to be named, before it is known how it is stored
        self.weight = empty_weight(build, rows, shard.inputs, device=torch.device("meta") if self.waits else None)
        self.bias = empty_weight(build, rows) if bias else None
        self.quantized: QuantizedLinear | None = None
        self.path = ""
        self._packed: dict[str, Packed] = {}  # until all parts have come
        self.matrices: tuple[PackedMatrix, ...] = ()  # all of the weight, once every part has come packed

    def forward(self, inputs: Tensor, batch: Batch | None = None) -> Tensor:
        """[T, inputs] to [T, rows]. `batch` is the step whose tokens these are; None if they are some of its tokens."""
        if self.quantized is not None:
            return self.quantized.linear(inputs, self.bias)
        if not self.matrices:
            return self.build.kernels.dense.linear(inputs, self.weight, self.bias)
        inputs = inputs.contiguous()
        if len(self.matrices) == 1:
            out = torch.empty(inputs.shape[0], self.matrices[0].rows)
            self.matrices[0].linear(inputs, out)
        else:
            out = torch.empty(inputs.shape[0], sum(matrix.rows for matrix in self.matrices))
            parts = out.split([matrix.rows for matrix in self.matrices], dim=1)
            for matrix, part in zip(self.matrices, parts, strict=True):
                matrix.linear(inputs, part)
        return out if self.bias is None else out.add_(self.bias)

    @property
    def dense(self) -> bool:
        """Whether `weight` is used as it is, neither quantized nor packed."""
        return self.quantized is None and not self.matrices

    def silu(self, inputs: Tensor, batch: Batch | None = None) -> Tensor:
        """silu(gate) * up of a dense layer whose parts are these: [T, inputs] to [T, rows / 2]."""
        return self.build.kernels.dense.linear_silu(inputs, self.weight, self.bias)

    def gated(self, gate_up: Tensor, batch: Batch | None = None) -> Tensor:
        """`forward` of silu(gate) * up, which `gate_up` [T, 2 * inputs] holds: [T, rows]."""
        if self.quantized is not None:
            return self.quantized.linear(gate_up, self.bias, gated=True)
        return self(self.build.kernels.dense.silu_and_mul(gate_up), batch)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [rows, inputs], or what it stands for, in `dtype`, by default that of activations."""
        dtype = dtype or self.build.dtype
        if self.quantized is not None:
            return self.quantized.dense(dtype)
        if self.matrices:
            return torch.cat([matrix.unpacked() for matrix in self.matrices]).to(dtype)
        return self.weight.to(dtype)

    # ── quantized ────────────────────────────────────────────────────────────────────────────

    def named(self, path: str) -> None:
        self.path = path
        scheme = self.build.quantization
        if scheme is None or not self.waits:
            return
        self.waits = False
        modules = dict.fromkeys(self.stored_in.get(part, part) for part in self.parts)
        paths = [checkpoint_path(self.stored_as or path, module) for module in modules]
        taken = [each for each in paths if scheme.takes(each)]
        if not taken:
            self.weight = empty_weight(self.build, *self.weight.shape)
        elif len(taken) < len(paths):
            rest = ", ".join(each for each in paths if each not in taken)
            raise ConfigError(
                f"of one stacked layer the checkpoint quantizes {', '.join(taken)} and not {rest}, which is not "
                "supported; quantize all or none of them"
            )
        else:
            self.quantized = scheme.linear(self.build, self.sizes, self.inputs, self.shard)
            for name, parameter in self.quantized.tensors.items():
                self.register_parameter(name, parameter)

    def names(self, path: str, parameter: str) -> list[tuple[str, str]]:
        ends = (parameter,) if self.quantized is None else self.quantized.suffixes.get(parameter, (parameter,))
        return [(f"{checkpoint_path(path, part)}.{end}", part) for part in self.parts for end in ends]

    def optional(self) -> frozenset[str]:
        return self.quantized.optional if self.quantized is not None else frozenset()

    def passed_over(self, path: str) -> list[str]:
        ignored = self.quantized.ignored if self.quantized is not None else ()
        return [f"{checkpoint_path(path, part)}.{name}" for part in self.parts for name in ignored]

    def whole(self, parameter: str, part: str) -> tuple[int, ...] | None:
        if self.quantized is not None and parameter in self.quantized.tensors:
            return None
        return (self.sizes[part], self.inputs)[: 2 if parameter == "weight" else 1]

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        if self.load_quantized(name, parameter, part, tensor):
            return
        if parameter == "weight" and self.keep_packed(name, part, tensor):
            return
        begin = 0
        for each in self.parts[: self.parts.index(part)]:
            begin += self.shard.rows_of(each)
        whole = (self.sizes[part], self.inputs)[: 2 if parameter == "weight" else 1]
        index = (self.shard.rows[part], self.shard.columns)[: len(whole)]
        target = self.get_parameter(parameter)[begin : begin + self.shard.rows_of(part)]
        copy_weight(name, target, tensor, whole, index)

    def load_quantized(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> bool:
        """Takes `tensor` if the weight is quantized and it belongs to that."""
        if self.quantized is None or parameter not in self.quantized.tensors:
            return False
        self.quantized.load(name, parameter, part, tensor)
        return True

    def loaded(self) -> None:
        self.unpack_parts()
        if self.quantized is not None and (self.quantized.loaded(self.path) or self.held_dense):
            dense = self.quantized.dense(self.build.dtype)
            for name in self.quantized.tensors:
                delattr(self, name)
            self.weight = nn.Parameter(dense, requires_grad=False)
            self.quantized = None

    def fill_at_random(self, generator: torch.Generator) -> None:
        if self.quantized is None:
            return super().fill_at_random(generator)
        self.quantized.fill_at_random(generator)
        if self.bias is not None:
            self.bias.normal_(0.0, 0.02, generator=generator)

    # ── packed ───────────────────────────────────────────────────────────────────────────────

    def keep_packed(self, name: str, part: str, tensor: LazyTensor) -> bool:
        """Takes `tensor` as it is packed in the checkpoint; False when it cannot stay so."""
        packed = packed_part(self.build.kernels.dense, tensor, self.shard.rows[part], self.shard.columns)
        if packed is None:
            return False
        check_shape(name, tensor, (self.sizes[part], self.inputs))
        self._packed[part] = packed
        if len(self._packed) == len(self.parts):
            self.matrices = self.build.kernels.dense.matrices([self._packed.pop(each) for each in self.parts])
            for index, matrix in enumerate(self.matrices):
                self.register_buffer(f"packed_{index}", matrix.data)
            self.weight = nn.Parameter(self.weight.new_empty(0, self.shard.inputs), requires_grad=False)
        return True

    def unpack_parts(self) -> None:
        """Some part did not come packed: those that did take their dense place."""
        begin = 0
        for part in self.parts:
            size = self.shard.rows_of(part)
            if packed := self._packed.pop(part, None):
                (matrix,) = self.build.kernels.dense.matrices([packed])
                self.weight[begin : begin + size] = matrix.unpacked()
            begin += size


class ColumnLinear(Linear):
    """y = x Wᵀ + b, its output features divided over the ranks along `axis`.

    `outputs` is the number of output features, or of each part's by the part's name in the checkpoint:
    `self.gate_up_proj = ColumnLinear(build, hidden, {"gate_proj": inner, "up_proj": inner})` loads
    `…gate_proj.weight` and `…up_proj.weight`, and returns [T, 2 * inner] with one rank, a rank's share with more.
    `replicated` names parts that every rank holds whole.
    """

    def __init__(
        self,
        build: Build,
        inputs: int,
        outputs: int | Mapping[str, int],
        bias: bool = False,
        quantizable: bool = True,
        *,
        replicated: Collection[str] = (),
        axis: Axis = "tp",
    ) -> None:
        sizes = {"": outputs} if isinstance(outputs, int) else dict(outputs)
        rows = {
            part: slice(0, size) if part in replicated else build.share(size, axis, f"outputs of {part or 'a layer'}")
            for part, size in sizes.items()
        }
        super().__init__(build, sizes, inputs, Shard(rows, slice(0, inputs)), bias, quantizable)


class ReplicatedLinear(Linear):
    """y = x Wᵀ + b, whole on every rank; `outputs` as a ColumnLinear's."""

    def __init__(
        self,
        build: Build,
        inputs: int,
        outputs: int | Mapping[str, int],
        bias: bool = False,
        quantizable: bool = True,
    ) -> None:
        sizes = {"": outputs} if isinstance(outputs, int) else dict(outputs)
        super().__init__(build, sizes, inputs, Shard.whole(sizes, inputs), bias, quantizable)


class QKVLinear(Linear):
    """The query, key and value projections as one, its heads divided over the ranks that share attention.

    Where there are more ranks than key-value heads, several ranks hold the same one. `heads` says how what it returns,
    [T, (query + 2 * kv) * dim], divides on this rank; `parts` are the names of the three in checkpoints.
    """

    def __init__(
        self,
        build: Build,
        inputs: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        bias: bool = False,
        parts: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"),
    ) -> None:
        query, key = build.query_heads(query_heads), build.kv_heads(kv_heads)
        counts, shares = (query_heads, kv_heads, kv_heads), (query, key, key)
        sizes = {part: count * head_dim for part, count in zip(parts, counts, strict=True)}
        rows = {part: slice(s.start * head_dim, s.stop * head_dim) for part, s in zip(parts, shares, strict=True)}
        super().__init__(build, sizes, inputs, Shard(rows, slice(0, inputs)), bias)
        self.heads = Heads(query.stop - query.start, key.stop - key.start, head_dim)


class RowLinear(Linear):
    """y = x Wᵀ + b, its input features divided over the ranks along `axis`: it takes what a ColumnLinear returns.

    It sums over the ranks, unless `summed` is false: then whoever takes its parts of the sum does."""

    def __init__(
        self,
        build: Build,
        inputs: int,
        outputs: int,
        bias: bool = False,
        *,
        summed: bool = True,
        axis: Axis = "tp",
    ) -> None:
        shard = Shard({"": slice(0, outputs)}, build.share(inputs, axis, "inputs of a layer"))
        super().__init__(build, {"": outputs}, inputs, shard, bias)
        self.group = build.group(axis)
        self.sums = summed and self.group.size > 1

    def forward(self, inputs: Tensor, batch: Batch | None = None) -> Tensor:
        out = super().forward(inputs, batch)
        return all_reduce(out, self.group) if self.sums else out

    def gated(self, gate_up: Tensor, batch: Batch | None = None) -> Tensor:
        out = super().gated(gate_up, batch)
        return all_reduce(out, self.group) if self.sums and self.quantized is not None else out

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        if parameter == "bias" and self.group.place:  # the first rank adds it to the sum
            self.get_parameter("bias").zero_()
            return
        super().load(name, parameter, part, tensor)
