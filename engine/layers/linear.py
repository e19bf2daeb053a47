"""Matrix multiplication layers, named by the dimension that tensor parallelism divides.

Projections of the same input are stacked into one matrix, hence one GEMM; each layer declares which
tensors of the checkpoint are its parts. On a CPU parts that the checkpoint holds in packed blocks stay packed
(engine/kernels/cpu/calls.py); where the build has a quantization, matrices are stored by it (quantization.py). With one
rank every share is the whole. Left out until there are more: RowLinear's sum over ranks, key-value heads repeated where
there are more ranks than heads, and shares of packed and quantized parts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.kernels.dense.reference import Heads, Ops
from engine.kernels.types import Packed, PackedMatrix
from engine.layers.build import Build
from engine.layers.model import Layer, check_shape, checkpoint_path, copy_weight, empty_weight
from engine.layers.quantization import QuantizedLinear
from engine.plugin.specs import LazyTensor


def packed_rows(dense: Ops, tensor: LazyTensor, world: int) -> Packed | None:
    """`tensor` as it is packed in the checkpoint, where `dense` multiplies by such; else None."""
    packed = getattr(tensor, "packed", None)
    if not dense.packed_kinds or packed is None or world != 1:
        return None
    found: Packed | None = packed()
    return found if found is not None and found[0] in dense.packed_kinds else None


class Linear(Layer):
    """y = x Wᵀ + b with the weight [rows, inputs] of all parts, one after the other: dense, packed or quantized.

    A quantization is asked once the layer's name is known; a layer that is not `quantizable` is dense.
    """

    sizes: Mapping[str, int]  # output features of each part, of the whole model
    held_dense = False  # what is quantized in the checkpoint is kept as what it stands for: `weight` is used itself

    def __init__(self, build: Build, inputs: int, rows: int, bias: bool, quantizable: bool = True) -> None:
        super().__init__()
        self.build = build
        self.inputs = inputs
        self.waits = build.quantization is not None and quantizable  # to be named, before it is known how it is stored
        self.weight = empty_weight(build, rows, inputs, device=torch.device("meta") if self.waits else None)
        self.bias = empty_weight(build, rows) if bias else None
        self.quantized: QuantizedLinear | None = None
        self.path = ""
        self._packed: dict[str, Packed] = {}  # until all parts have come
        self.matrices: tuple[PackedMatrix, ...] = ()  # all of the weight, once every part has come packed

    def forward(self, inputs: Tensor) -> Tensor:
        """[T, inputs] to [T, rows]."""
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

    def silu(self, inputs: Tensor) -> Tensor:
        """silu(gate) * up of a dense layer whose parts are these: [T, inputs] to [T, rows / 2]."""
        return self.build.kernels.dense.linear_silu(inputs, self.weight, self.bias)

    def gated(self, gate_up: Tensor) -> Tensor:
        """`forward` of silu(gate) * up, which `gate_up` [T, 2 * inputs] holds: [T, rows]."""
        if self.quantized is not None:
            return self.quantized.linear(gate_up, self.bias, gated=True)
        return self(self.build.kernels.dense.silu_and_mul(gate_up))

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
        paths = [checkpoint_path(path, part) for part in self.parts]
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
            self.quantized = scheme.linear(self.build, self.sizes, self.inputs)
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
        packed = packed_rows(self.build.kernels.dense, tensor, self.build.world)
        if packed is None:
            return False
        check_shape(name, tensor, (self.sizes[part], self.weight.shape[1]))
        self._packed[part] = packed
        if len(self._packed) == len(self.parts):
            self.matrices = self.build.kernels.dense.matrices([self._packed.pop(each) for each in self.parts])
            for index, matrix in enumerate(self.matrices):
                self.register_buffer(f"packed_{index}", matrix.data)
            self.weight = nn.Parameter(self.weight.new_empty(0, self.inputs), requires_grad=False)
        return True

    def unpack_parts(self) -> None:
        """Some part did not come packed: those that did take their dense place."""
        begin = 0
        for part, size in self.sizes.items():
            if packed := self._packed.pop(part, None):
                (matrix,) = self.build.kernels.dense.matrices([packed])
                self.weight[begin : begin + size] = matrix.unpacked()
            begin += self.build.local(size)


class ColumnLinear(Linear):
    """y = x Wᵀ + b, its output features divided over the ranks.

    `outputs` is the number of output features, or of each part's by the part's name in the checkpoint:
    `self.gate_up_proj = ColumnLinear(build, hidden, {"gate_proj": inner, "up_proj": inner})` loads
    `…gate_proj.weight` and `…up_proj.weight`, and returns [T, 2 * inner].
    """

    def __init__(
        self,
        build: Build,
        inputs: int,
        outputs: int | Mapping[str, int],
        bias: bool = False,
        quantizable: bool = True,
    ) -> None:
        sizes = {"": outputs} if isinstance(outputs, int) else dict(outputs)
        super().__init__(build, inputs, sum(build.local(size) for size in sizes.values()), bias, quantizable)
        self.sizes = sizes
        self.parts = tuple(sizes)

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        if self.load_quantized(name, parameter, part, tensor):
            return
        if parameter == "weight" and self.keep_packed(name, part, tensor):
            return
        begin = 0
        for each, size in self.sizes.items():
            if each == part:
                break
            begin += self.build.local(size)
        rows = self.build.local(self.sizes[part])
        whole = (self.sizes[part], self.weight.shape[1])[: 2 if parameter == "weight" else 1]
        target = self.get_parameter(parameter)[begin : begin + rows]
        copy_weight(name, target, tensor, whole, (self.build.share(self.sizes[part]),))


class QKVLinear(ColumnLinear):
    """The query, key and value projections as one, its heads divided over the ranks.

    `heads` says how what it returns, [T, (query + 2 * kv) * dim], divides on this rank.
    """

    def __init__(
        self, build: Build, inputs: int, query_heads: int, kv_heads: int, head_dim: int, bias: bool = False
    ) -> None:
        sizes = {"q_proj": query_heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
        super().__init__(build, inputs, sizes, bias)
        self.heads = Heads(build.local(query_heads), build.local(kv_heads), head_dim)


class RowLinear(Linear):
    """y = x Wᵀ + b, its input features divided over the ranks: it takes what a ColumnLinear returns."""

    def __init__(self, build: Build, inputs: int, outputs: int, bias: bool = False) -> None:
        assert build.world == 1, "the sum over ranks is not built yet"
        super().__init__(build, build.local(inputs), outputs, bias)
        self.sizes = {"": outputs}

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        if self.load_quantized(name, parameter, part, tensor):
            return
        if parameter == "bias":
            return super().load(name, parameter, part, tensor)
        if not self.keep_packed(name, part, tensor):
            whole = (self.weight.shape[0], self.inputs)
            copy_weight(name, self.weight, tensor, whole, (slice(None), self.build.share(self.inputs)))
