"""Matrix multiplication layers, named by the dimension that tensor parallelism divides.

Projections of the same input are stacked into one matrix, hence one GEMM; each layer declares which
tensors of the checkpoint are its parts. With one rank every share is the whole. Left out until there
are more: RowLinear's sum over ranks, and key-value heads repeated where there are more ranks than heads.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from engine.layers.build import Build
from engine.layers.model import Layer, copy_weight, empty_weight
from engine.plugin.specs import LazyTensor


class ColumnLinear(Layer):
    """y = x Wᵀ + b, its output features divided over the ranks.

    `outputs` is the number of output features, or of each part's by the part's name in the checkpoint:
    `self.gate_up_proj = ColumnLinear(build, hidden, {"gate_proj": inner, "up_proj": inner})` loads
    `…gate_proj.weight` and `…up_proj.weight`, and returns [T, 2 * inner].
    """

    def __init__(self, build: Build, inputs: int, outputs: int | Mapping[str, int], bias: bool = False) -> None:
        super().__init__()
        self.sizes = {"": outputs} if isinstance(outputs, int) else dict(outputs)
        self.parts = tuple(self.sizes)
        self.build = build
        rows = sum(build.local(size) for size in self.sizes.values())
        self.weight = empty_weight(build, rows, inputs)
        self.bias = empty_weight(build, rows) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        """[T, inputs] to [T, this rank's outputs of all parts, one after the other]."""
        return nn.functional.linear(inputs, self.weight, self.bias)

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
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
    """The query, key and value projections as one, its heads divided over the ranks."""

    def __init__(
        self, build: Build, inputs: int, query_heads: int, kv_heads: int, head_dim: int, bias: bool = False
    ) -> None:
        sizes = {"q_proj": query_heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
        super().__init__(build, inputs, sizes, bias)
        self.heads = [build.local(query_heads), build.local(kv_heads), build.local(kv_heads)]
        self.head_dim = head_dim

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """[T, inputs] to query [T, query_heads, head_dim] and key, value [T, kv_heads, head_dim]: views."""
        heads = super().forward(inputs).view(inputs.shape[0], -1, self.head_dim)
        query, key, value = heads.split(self.heads, dim=1)
        return query, key, value


class RowLinear(Layer):
    """y = x Wᵀ + b, its input features divided over the ranks: it takes what a ColumnLinear returns."""

    def __init__(self, build: Build, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        assert build.world == 1, "the sum over ranks is not built yet"
        self.build = build
        self.inputs = inputs
        self.weight = empty_weight(build, outputs, build.local(inputs))
        self.bias = empty_weight(build, outputs) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        """[T, this rank's inputs] to [T, outputs]."""
        return nn.functional.linear(inputs, self.weight, self.bias)

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        if parameter == "bias":
            return super().load(name, parameter, part, tensor)
        whole = (self.weight.shape[0], self.inputs)
        copy_weight(name, self.weight, tensor, whole, (slice(None), self.build.share(self.inputs)))
