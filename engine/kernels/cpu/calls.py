"""The CPU kernels of *.c: compiled on first use, called through ctypes.

The library is kept in a cache (engine/runtime/compiled.py). `kernels()` is None where there is neither a compiler nor a
library that one has made before, or ENGINE_CPU_KERNELS=0: layers then do the same in torch. All take and return float32
tensors on the CPU.
"""

import ctypes
import functools
import logging
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.dense.reference import HeadNorms, Heads, Ops, Rotation
from engine.kernels.types import Packed, PackedMatrix
from engine.runtime.compiled import Sources, said

log = logging.getLogger("engine.kernels")

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
WIDE = "-mprefer-vector-width=512"  # compilers for x86 prefer 256 bits by themselves

# GGUF's name of a block type to (number in blocks.h, weights in a block, bytes in a block).
KINDS = {
    "F32": (0, 32, 128),
    "F16": (1, 32, 64),
    "BF16": (2, 32, 64),
    "Q4_0": (3, 32, 18),
    "Q4_1": (4, 32, 20),
    "Q5_0": (5, 32, 22),
    "Q5_1": (6, 32, 24),
    "Q8_0": (7, 32, 34),
    "Q4_K": (8, 256, 144),
    "Q5_K": (9, 256, 176),
    "Q6_K": (10, 256, 210),
}
GEMM_TOKENS = 16  # from this many tokens on, unpacking a matrix turned on its side is worth it

_pointer, _int, _long, _float = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
SIGNATURES = {
    "linear": (_int, _pointer, _long, _int, _pointer, _int, _pointer, _long),
    "unpack": (_int, _pointer, _pointer, _long, _int, _pointer),
    "gemm": (_int, _pointer, _long, _int, _pointer, _int, _pointer, _long, _pointer, _int),
    "rotation": (_pointer, _pointer, _float, _int, _int, _pointer),
    "rms_norm": (_pointer, _pointer, _int, _int, _float, _pointer),
    "add_rms_norm": (_pointer, _pointer, _pointer, _int, _int, _float),
    "silu_and_mul": (_pointer, _int, _int, _pointer),
    "gelu_and_mul": (_pointer, _int, _int, _pointer),
    "rotate_heads": (
        *(_pointer, _long, _int, _int, _int, _int, _pointer, _pointer, _float),
        *(_pointer, _pointer, _int, _pointer, _int, _long, _pointer),
    ),
    "write_pages": (_pointer, _pointer, _long, _long, _pointer, _int, _int, _long, _int, _pointer),
    "attend": (
        *(_pointer, _long, _pointer, _pointer, _long, _pointer),
        *(_int, _int, _long, _int, _int, _int, _float, _int, _pointer),
    ),
}


# ── building ─────────────────────────────────────────────────────────────────────────────────


@functools.cache
def kernels() -> "Kernels | None":
    """The compiled kernels; None, with the reason in the log, where they cannot be had."""
    if os.environ.get("ENGINE_CPU_KERNELS") == "0":
        return None
    try:
        library = sources().load()
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("the CPU kernels do not compile, so the CPU runs at a fraction of its speed: %s", said(error))
        return None
    if library is None:
        log.warning(
            "no C compiler, and no kernels compiled before for this processor: the CPU runs at a fraction of its "
            "speed; install gcc or clang"
        )
        return None
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.gemm_scratch.restype = _long
    return Kernels(library)


def sources() -> Sources:
    """The C files, and how they are compiled."""
    wide = (WIDE,) if platform.machine() in ("x86_64", "AMD64") else ()
    openmp = _openmp()
    return Sources(
        name="cpu",
        title="the CPU kernels",
        paths=tuple(sorted(FOLDER.glob("*.[ch]"))),
        flags=(*FLAGS, *wide),
        linked=(str(openmp) if openmp else "-fopenmp", "-lm"),
        native=True,
    )


def _openmp() -> Path | None:
    """The OpenMP runtime that torch carries: with another one, two pools of threads would share the cores."""
    return next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)


# ── calling ──────────────────────────────────────────────────────────────────────────────────


class Kernels(Ops):
    """What *.c export, on float32 tensors. Use the one that `kernels()` returns."""

    packed_kinds = frozenset(KINDS)

    def __init__(self, library: Any) -> None:
        self.library = library  # a ctypes.CDLL, or what records its calls
        self._scratch = torch.empty(0)
        self._scratch_size = library.gemm_scratch()  # floats a thread

    def matrices(self, parts: Sequence[Packed]) -> tuple[PackedMatrix, ...]:
        kinds = groupby(parts, key=lambda part: part[0])
        return tuple(CpuMatrix(self, kind, _stacked([rows for _, rows in same])) for kind, same in kinds)

    def scratch(self, threads: int) -> int:
        """The address of what `gemm` works in: fresh memory at each call would cost more than the call."""
        needed = threads * self._scratch_size
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed)
        return self._scratch.data_ptr()

    def rotation(self, positions: Tensor, frequencies: Tensor, magnitude: float) -> Rotation:
        positions = positions.contiguous()
        out = torch.empty(2, positions.shape[0], 1, frequencies.shape[0])
        self.library.rotation(
            *(positions.data_ptr(), frequencies.data_ptr(), magnitude),
            *(positions.shape[0], frequencies.shape[0], out.data_ptr()),
        )
        cosines, sines = out.unbind(0)
        return cosines, sines

    def rms_norm(self, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        size = hidden.shape[-1]
        tokens = hidden.numel() // size
        self.library.rms_norm(hidden.data_ptr(), weight.data_ptr(), tokens, size, epsilon, out.data_ptr())
        return out

    def add_rms_norm(self, hidden: Tensor, stream: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        hidden, stream = hidden.contiguous(), stream.contiguous()
        tokens, size = hidden.shape
        self.library.add_rms_norm(*(hidden.data_ptr(), stream.data_ptr(), weight.data_ptr()), *(tokens, size, epsilon))
        return hidden, stream

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return self._gated(self.library.silu_and_mul, gate_up)

    def gelu_and_mul(self, gate_up: Tensor) -> Tensor:
        return self._gated(self.library.gelu_and_mul, gate_up)

    @staticmethod
    def _gated(function: Callable[..., None], gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(tokens, size)
        function(gate_up.data_ptr(), tokens, size, out.data_ptr())
        return out

    def rotate_heads(
        self, qkv: Tensor, heads: Heads, norms: HeadNorms | None, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self._rotate(qkv, heads, norms, rotation)
        query, key, value = qkv.split([heads.query, heads.kv, heads.kv], dim=1)
        return query, key, value

    def rotate_into_pages(
        self,
        qkv: Tensor,
        heads: Heads,
        norms: HeadNorms | None,
        rotation: Rotation | None,
        cache: Tensor,
        places: Tensor,
    ) -> Tensor:
        qkv = self._rotate(qkv, heads, norms, rotation, cache, places.contiguous())
        return qkv[:, : heads.query]

    def _rotate(
        self,
        qkv: Tensor,
        heads: Heads,
        norms: HeadNorms | None,
        rotation: Rotation | None,
        cache: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """`rotate_heads` in place, then into the cache if there is one; the heads, [T, query + 2 * kv, dim]."""
        query, kv, dim = heads
        qkv = qkv.contiguous()
        normed = (norms.query.data_ptr(), norms.key.data_ptr(), norms.epsilon) if norms else (None, None, 0.0)
        turned = (
            (rotation[0].data_ptr(), rotation[1].data_ptr(), rotation[0].shape[-1]) if rotation else (None, None, 0)
        )
        written: tuple[int | None, ...] = (None, 0, 0, None)
        if cache is not None and places is not None:
            written = (places.data_ptr(), cache.shape[2], cache.stride(0), cache.data_ptr())
        tokens, size = qkv.shape
        self.library.rotate_heads(*(qkv.data_ptr(), size, tokens, query, kv, dim), *normed, *turned, *written)
        return qkv.view(tokens, query + 2 * kv, dim)

    def write_pages(self, key: Tensor, value: Tensor, cache: Tensor, places: Tensor) -> None:
        places = places.contiguous()
        tokens, kv, dim = key.shape
        self.library.write_pages(
            *(key.data_ptr(), value.data_ptr(), key.stride(0), value.stride(0)),
            *(places.data_ptr(), tokens, cache.shape[2], cache.stride(0), kv * dim, cache.data_ptr()),
        )


def _stacked(parts: Sequence[NDArray[np.uint8]]) -> Tensor:
    """`parts` below each other in memory that is written: what is read-only is a file's, and is copied, once.

    The memory is numpy's, which asks the system for huge pages where an array is large, as torch does not: a product
    with the head of a small model takes a sixth less time then."""
    if len(parts) == 1 and parts[0].flags.writeable:
        return torch.from_numpy(np.ascontiguousarray(parts[0]))
    stacked = np.empty((sum(len(rows) for rows in parts), parts[0].shape[1]), np.uint8)
    np.concatenate(parts, out=stacked)
    return torch.from_numpy(stacked)


class CpuMatrix:
    """As `PackedMatrix`, on a CPU."""

    def __init__(self, kernels: Kernels, kind: str, data: Tensor) -> None:
        self._number, weights, size = KINDS[kind]
        assert data.dtype == torch.uint8 and data.is_contiguous() and data.shape[1] % size == 0
        self.kind = kind
        self.data = data
        self.rows = data.shape[0]
        self.inputs = data.shape[1] // size * weights
        self._kernels = kernels

    def linear(self, inputs: Tensor, out: Tensor) -> None:
        tokens = inputs.shape[0]
        called_with = (
            *(self._number, self.data.data_ptr(), self.rows, self.inputs),
            *(inputs.data_ptr(), tokens, out.data_ptr(), out.stride(0)),
        )
        if tokens < GEMM_TOKENS:
            self._kernels.library.linear(*called_with)
        else:
            threads = torch.get_num_threads()
            self._kernels.library.gemm(*called_with, self._kernels.scratch(threads), threads)

    def select(self, ids: Tensor) -> Tensor:
        out = torch.empty(ids.shape[0], self.inputs)
        self._unpack(ids.contiguous().data_ptr(), ids.shape[0], out)
        return out

    def unpacked(self) -> Tensor:
        out = torch.empty(self.rows, self.inputs)
        self._unpack(None, self.rows, out)
        return out

    def _unpack(self, ids: int | None, count: int, out: Tensor) -> None:
        self._kernels.library.unpack(self._number, self.data.data_ptr(), ids, count, self.inputs, out.data_ptr())


# ── attention ────────────────────────────────────────────────────────────────────────────────

RUN = 16  # tokens that share a pass over the keys
MOST_QUERIES = 64  # of one task: a limit of attention.c


def attention_tasks(starts: np.ndarray, lengths: np.ndarray, offsets: np.ndarray, group: int) -> np.ndarray:
    """Rows cut into runs of tokens that share a pass over the keys: int32 [n, 4] of first token, tokens, row, position.

    `starts`, `lengths` [R] and `offsets` [R + 1] are a Batch's; `group` is query heads to a key head.
    """
    run = max(1, min(RUN, MOST_QUERIES // group))
    counts = -(-lengths // run)
    rows = np.repeat(np.arange(len(lengths)), counts)
    first = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * run
    tasks = np.stack(
        (offsets[rows] + first, np.minimum(run, lengths[rows] - first), rows, starts[rows] + first), axis=1
    )
    return np.ascontiguousarray(tasks, dtype=np.int32)
