"""Phi-3, Phi-3.5 and Phi-4, the dense ones.

They are the shared decoder; query, key and value, and gate and up, are one tensor each in the checkpoint. Left out:
mixtures of experts, images.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from torch import Tensor

from engine.plugin import ConfigError, LazyTensor, Terms
from engine.plugin.layers import AttentionKind, Build, CausalLM, DecoderShape


class Phi3(CausalLM):
    """`Phi3ForCausalLM` of Hugging Face."""

    def __init__(self, config: Terms, build: Build) -> None:
        super().__init__(config, build)
        shape = self.shape_of(Terms.of(config))
        query, key = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.fused = {
            "qkv_proj": {"q_proj": query, "k_proj": key, "v_proj": key},
            "gate_up_proj": {"gate_proj": shape.intermediate_size, "up_proj": shape.intermediate_size},
        }

    @staticmethod
    def shape_of(config: Terms) -> DecoderShape:
        window = config.integer("sliding_window", None, low=0) or None
        rope = Terms({"original_max_position_embeddings": 4096, **config}, config.source)
        return DecoderShape.of(config, kinds=(AttentionKind(rope=rope, window=window),))

    def load(self, tensors: Iterable[tuple[str, LazyTensor]]) -> None:
        super().load(part for name, tensor in tensors for part in self._parts(name, tensor))

    def _parts(self, name: str, tensor: LazyTensor) -> Iterator[tuple[str, LazyTensor]]:
        """A fused tensor as its parts, another as it is. Raises ConfigError when it has other rows than they."""
        path, _, end = name.rpartition(".")
        module, _, last = path.rpartition(".")
        if last not in self.fused:
            yield name, tensor
            return
        rows = self.fused[last]
        if tensor.shape[0] != sum(rows.values()):
            raise ConfigError(
                f"weight {name} has shape {tuple(tensor.shape)} in the checkpoint, but its configuration "
                f"calls for {sum(rows.values())} rows: the two do not belong together"
            )
        first = 0
        for part, count in rows.items():
            yield f"{module}.{part}.{end}", Rows(tensor, first, count)
            first += count


class Rows:
    """`count` rows of a tensor not read yet, from `first` on, as a tensor not read yet."""

    def __init__(self, tensor: LazyTensor, first: int, count: int) -> None:
        self._tensor = tensor
        self._first = first
        self.shape = (count, *tensor.shape[1:])

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        rows, *others = index if isinstance(index, tuple) else (index,)
        return self._tensor[(self._moved(rows), *others)]

    def packed(self, rows: slice, columns: slice) -> tuple[str, np.ndarray] | None:
        """The blocks of some of the rows as they are stored, where the tensor has such."""
        packed = getattr(self._tensor, "packed", None)
        found: tuple[str, np.ndarray] | None = None if packed is None else packed(self._moved(rows), columns)
        return found

    def _moved(self, rows: slice) -> slice:
        """The same rows, as the tensor counts them."""
        begin, end, step = rows.indices(self.shape[0])
        return slice(self._first + begin, self._first + end, step)
