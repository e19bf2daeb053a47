"""The fastest of cuBLASLt's ways to multiply by a matrix, for sizes where its own first choice is not that.

cuBLASLt ranks its kernels by a model of the device, and torch takes the first. For some hundred tokens, where a
product fills the device one and a half times, the ranking is often wrong (bench/kernels_linear.py). Here the candidates
of a size are timed once, and the fastest is kept. A call goes through ctypes, which costs some tens of microseconds: it
is meant for steps that are captured in CUDA graphs. See the cuBLASLt API in NVIDIA's cuBLAS documentation.

Left out: other layouts than row-major inputs [T, K] times weights [N, K]; biases.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LIBRARY = "libcublasLt.so.{version}"
COMPUTE_32F, REAL_32F = 68, 0  # cublasComputeType_t, cudaDataType_t
REALS = {torch.bfloat16: 14, torch.float16: 2}
TRANSPOSE_A = 3  # cublasLtMatmulDescAttributes_t
MOST_WORKSPACE = 1  # cublasLtMatmulPreferenceAttributes_t
WORKSPACE_BYTES = 32 << 20  # what torch gives cuBLAS on Hopper


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t."""

    _fields_ = [("data", ctypes.c_uint64 * 8)]


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@dataclass(frozen=True, slots=True)
class Product:
    """One size of a product: cuBLASLt's descriptions of it."""

    description: Any
    layouts: tuple[Any, Any, Any]  # weight, inputs, out


class CublasLt:
    """The library, with a handle and a workspace on one device. Raises OSError where it is not there."""

    def __init__(self, device: torch.device) -> None:
        self._library = ctypes.CDLL(LIBRARY.format(version=str(torch.version.cuda).split(".")[0]))
        self._handle = ctypes.c_void_p()
        self._call("cublasLtCreate", ctypes.byref(self._handle))
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with cublasStatus_t {status}")

    def product(self, tokens: int, weight: Tensor) -> Product:
        """`tokens` tokens times `weight` [N, K]. In cuBLASLt's terms, columns first: out [N, T] = weightᵀ x [K, T]."""
        rows, columns = weight.shape
        description = ctypes.c_void_p()
        self._call("cublasLtMatmulDescCreate", ctypes.byref(description), COMPUTE_32F, REAL_32F)
        transposed = ctypes.c_int32(1)
        self._call(
            "cublasLtMatmulDescSetAttribute", description, TRANSPOSE_A, ctypes.byref(transposed), ctypes.c_size_t(4)
        )
        layouts = tuple(
            self._layout(REALS[weight.dtype], *sizes) for sizes in ((columns, rows), (columns, tokens), (rows, tokens))
        )
        return Product(description, (layouts[0], layouts[1], layouts[2]))

    def _layout(self, kind: int, rows: int, columns: int) -> Any:
        layout = ctypes.c_void_p()
        sizes = (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows))
        self._call("cublasLtMatrixLayoutCreate", ctypes.byref(layout), kind, *sizes)
        return layout

    def candidates(self, product: Product, most: int) -> list[Algorithm]:
        """At most so many ways, cuBLASLt's favourite first."""
        preference = ctypes.c_void_p()
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        space = ctypes.c_uint64(WORKSPACE_BYTES)
        self._call(
            "cublasLtMatmulPreferenceSetAttribute", preference, MOST_WORKSPACE, ctypes.byref(space), ctypes.c_size_t(8)
        )
        found, count = (Heuristic * most)(), ctypes.c_int(0)
        weight, inputs, out = product.layouts
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self._handle, product.description, weight, inputs, out, out, preference,
            most, found, ctypes.byref(count),
        )  # fmt: skip
        self._call("cublasLtMatmulPreferenceDestroy", preference)
        return [result.algorithm for result in found[: count.value] if result.state == 0]

    def run(self, product: Product, algorithm: Algorithm, inputs: Tensor, weight: Tensor, out: Tensor) -> None:
        """Writes `out` [T, N]; all are dense, of one type, and of the product's sizes."""
        layout_w, layout_x, layout_y = product.layouts
        pointer = ctypes.c_void_p
        self._call(
            "cublasLtMatmul", self._handle, product.description,
            ctypes.byref(self._one), pointer(weight.data_ptr()), layout_w, pointer(inputs.data_ptr()), layout_x,
            ctypes.byref(self._zero), pointer(out.data_ptr()), layout_y, pointer(out.data_ptr()), layout_y,
            ctypes.byref(algorithm), pointer(self._workspace.data_ptr()), ctypes.c_size_t(WORKSPACE_BYTES),
            pointer(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip
