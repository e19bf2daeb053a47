"""A tensor of a checkpoint in GGUF's blocks, which counts the bytes that are read."""

from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Blocks:
    """`bytes` uint8 [rows, bytes of a row]; `read` are how many of them kernels have been given."""

    def __init__(self, kind: str, packed: NDArray[np.uint8]) -> None:
        self.kind, self.bytes = kind, packed
        self.type = gguf.GGMLQuantizationType[kind]
        self.weights, self.size = gguf.GGML_QUANT_SIZES[self.type]
        self.shape = (packed.shape[0], packed.shape[1] // self.size * self.weights)
        self.read = 0

    @classmethod
    def of(cls, kind: str, weight: Tensor) -> "Blocks":
        return cls(kind, gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind]))

    def __getitem__(self, index: Any) -> Tensor:
        whole = gguf.dequantize(self.bytes, self.type).astype(np.float32).reshape(self.shape)
        return torch.from_numpy(whole.copy())[index]

    def packed(self, rows: slice, columns: slice) -> tuple[str, NDArray[np.uint8]] | None:
        if columns.start % self.weights or columns.stop % self.weights:
            return None
        part = self.bytes[rows, columns.start // self.weights * self.size : columns.stop // self.weights * self.size]
        self.read += part.size
        return self.kind, part.copy()
