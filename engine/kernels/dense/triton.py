"""The operations of reference.py as Triton kernels, for GPUs: each reads its inputs once and writes its results once.

One program takes one token (or one head of one token), so a decode step's kernels are over in about the time of a
launch. Sums are taken in float32 and rounded where the reference rounds. Left out: fusion with the matrix products.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.dense import latent as triton_latent
from engine.kernels.dense.linear import silu_times, skinny_cut, skinny_linear
from engine.kernels.dense.reference import HeadNorms, Heads, LatentNorm, Ops, Rotation
from engine.kernels.launch import launch_dependents, wait_for_previous

MANY_PROGRAMS = 4096
LARGEST_ROW = 16384  # numbers that one program holds at a time


@triton.jit
def _vector_kernel(inputs, weight, bias, out, rows, columns, BIASED: tl.constexpr, GATED: tl.constexpr,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPENDS: tl.constexpr):  # fmt: skip
    """GATED, the weight is gate and up, of `rows` each, and silu(gate) * up is what is stored."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    inside = n < rows
    line = weight + n.to(tl.int64)[:, None] * columns
    # The first block of the weight is on its way while the kernel before still runs.
    there = inside[:, None] & (k < columns)[None, :]
    w = tl.load(line + k[None, :], mask=there, other=0.0)
    up_line = line + rows.to(tl.int64) * columns if GATED else line
    if GATED:
        v = tl.load(up_line + k[None, :], mask=there, other=0.0)
    wait_for_previous(DEPENDS)
    x = tl.load(inputs + k, mask=k < columns, other=0.0).to(tl.float32)
    total = w.to(tl.float32) * x[None, :]
    if GATED:
        up_total = v.to(tl.float32) * x[None, :]
    for begin in range(COLUMNS, columns, COLUMNS):
        at = begin + k
        x = tl.load(inputs + at, mask=at < columns, other=0.0).to(tl.float32)
        there = inside[:, None] & (at < columns)[None, :]
        w = tl.load(line + at[None, :], mask=there, other=0.0)
        total += w.to(tl.float32) * x[None, :]
        if GATED:
            v = tl.load(up_line + at[None, :], mask=there, other=0.0)
            up_total += v.to(tl.float32) * x[None, :]
    y = tl.sum(total, 1)
    if BIASED:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(up_total, 1)
        if BIASED:
            up += tl.load(bias + rows + n, mask=inside, other=0.0).to(tl.float32)
        y = silu_times(y, up, out.dtype.element_ty)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_kernel(hidden, stream, weight, out, size, row_stride, heads, head_stride, epsilon,
                     ADDS: tl.constexpr, BLOCK: tl.constexpr, DEPENDS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < size
    w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(DEPENDS)
    begin = row // heads * row_stride + row % heads * head_stride
    x = tl.load(hidden + begin + at, mask=mask, other=0.0)
    if ADDS:
        x = (x.to(tl.float32) + tl.load(stream + row * size + at, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(stream + row * size + at, x, mask=mask)
    x = x.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / size + epsilon)
    tl.store(out + row * size + at, (x * scale * w).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gated_kernel(gate_up, out, size, GELU: tl.constexpr, BLOCK: tl.constexpr, DEPENDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    wait_for_previous(DEPENDS)
    gate = tl.load(gate_up + row * 2 * size + at, mask=mask, other=0.0)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=mask, other=0.0)
    x = gate.to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-2.0 * inner))  # 0.5 x (1 + tanh(inner))
    else:
        x = x / (1.0 + tl.exp(-x))
    tl.store(out + row * size + at, x.to(gate.dtype) * up, mask=mask)


@triton.jit
def _norm_head(
    first, second, third, query_norm, key_norm, is_query, low, rest, pairs, dim, epsilon, kind: tl.constexpr
):
    """The parts of heads, float32, normalised together and rounded to `kind`."""
    square = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(third * third, 1)
    scale = (1.0 / tl.sqrt_rn(square / dim + epsilon))[:, None]
    weight = query_norm if is_query else key_norm
    first = (first * scale * tl.load(weight + low, mask=low < pairs, other=0.0).to(tl.float32)).to(kind)
    second = (second * scale * tl.load(weight + pairs + low, mask=low < pairs, other=0.0).to(tl.float32)).to(kind)
    third = (third * scale * tl.load(weight + rest, mask=rest < dim, other=0.0).to(tl.float32)).to(kind)
    return first.to(tl.float32), second.to(tl.float32), third.to(tl.float32)


@triton.jit
def _store_head(target, first, second, third, low, rest, pairs, in_low, in_rest):
    tl.store(target + low, first, mask=in_low)
    tl.store(target + pairs + low, second, mask=in_low)
    tl.store(target + rest, third, mask=in_rest)


@triton.jit(do_not_specialize=["tokens"])
def _heads_kernel(
    qkv, query, key_norm, query_norm, cosines, sines, cache, places,
    tokens, query_heads, kv_heads, dim, pairs, row_stride, page_stride, epsilon,
    PAGE_SIZE: tl.constexpr, NORMS: tl.constexpr, ROTATES: tl.constexpr, CACHES: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    # HEADS heads, all of one kind, of each of TOKENS tokens: the two halves of `pairs` dimensions, and what is beyond.
    i = tl.arange(0, TOKENS * HEADS)[:, None]
    token, h = (tl.program_id(0) * TOKENS + i // HEADS).to(tl.int64), i % HEADS
    head = tl.program_id(1) * HEADS
    is_query = head < query_heads
    is_value = head >= query_heads + kv_heads
    low, rest = tl.arange(0, PAIRS)[None, :], tl.arange(0, REST)[None, :] + 2 * pairs
    in_low, in_rest = (low < pairs) & (token < tokens), (rest < dim) & (token < tokens)
    begin = qkv + token * row_stride + (head + h) * dim
    wait_for_previous(DEPENDS)
    first_raw = tl.load(begin + low, mask=in_low, other=0.0)
    kind = first_raw.dtype
    first = first_raw.to(tl.float32)
    second = tl.load(begin + pairs + low, mask=in_low, other=0.0).to(tl.float32)
    third = tl.load(begin + rest, mask=in_rest, other=0.0).to(tl.float32)
    if not is_value:
        if NORMS:
            first, second, third = _norm_head(
                first, second, third, query_norm, key_norm, is_query, low, rest, pairs, dim, epsilon, kind
            )
        if ROTATES:
            cosine = tl.load(cosines + token * pairs + low, mask=in_low, other=0.0).to(tl.float32)
            sine = tl.load(sines + token * pairs + low, mask=in_low, other=0.0).to(tl.float32)
            first, second = first * cosine - second * sine, second * cosine + first * sine
    # Rounded to the activations' type first, as if query, key and value had been written out between.
    first, second, third = first.to(kind), second.to(kind), third.to(kind)
    if is_query:
        target = query + (token * query_heads + head + h) * dim
        _store_head(target, first, second, third, low, rest, pairs, in_low, in_rest)
    elif CACHES:
        place = tl.load(places + token, mask=token < tokens, other=0)
        half = tl.where(is_value, 1, 0)
        kv_head = head + h - query_heads - half * kv_heads
        row = half * PAGE_SIZE + place % PAGE_SIZE
        line = cache + place // PAGE_SIZE * page_stride + (row * kv_heads + kv_head) * dim
        stored = cache.dtype.element_ty
        first, second = first.to(tl.float32).to(stored), second.to(tl.float32).to(stored)
        _store_head(line, first, second, third.to(tl.float32).to(stored), low, rest, pairs, in_low, in_rest)
    elif not is_value:
        _store_head(begin, first, second, third, low, rest, pairs, in_low, in_rest)


@triton.jit
def _write_kernel(key, value, cache, places, kv_heads, dim, page_size, page_stride, key_stride, value_stride,
                  BLOCK: tl.constexpr, DEPENDS: tl.constexpr):  # fmt: skip
    token, half = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    mask = at < kv_heads * dim
    source = key + token * key_stride
    if half == 1:
        source = value + token * value_stride
    wait_for_previous(DEPENDS)
    place = tl.load(places + token)
    row = half * page_size + place % page_size
    numbers = tl.load(source + at, mask=mask, other=0.0)
    tl.store(
        cache + place // page_size * page_stride + row * kv_heads * dim + at,
        numbers.to(tl.float32).to(cache.dtype.element_ty),
        mask=mask,
    )


def _warps(block: int) -> int:
    """Sixteen bytes a thread and more."""
    return max(1, min(16, block // 256))


class TritonOps(Ops):
    """The operations on CUDA tensors."""

    def linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.dtype != torch.float32:
            if inputs.shape[0] == 1:
                return self.vector_linear(inputs, weight, bias)
            if (cut := skinny_cut(inputs.shape[0], *weight.shape)) is not None:
                return skinny_linear(inputs, weight, bias, cut)
        return super().linear(inputs, weight, bias)

    def linear_silu(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.dtype != torch.float32:
            if inputs.shape[0] == 1:
                return self.vector_linear(inputs, weight, bias, gated=True)
            cut = skinny_cut(inputs.shape[0], *weight.shape)
            if cut is not None and cut.rows >= 32:
                return skinny_linear(inputs, weight, bias, cut, gated=True)
        return super().linear_silu(inputs, weight, bias)

    def vector_linear(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, rows: int = 4, columns: int = 2048,
        gated: bool = False,
    ) -> Tensor:  # fmt: skip
        """`linear` of one token, or `linear_silu`. A program takes `rows` rows of the weight, `columns` of them at a
        time."""
        count, size = weight.shape
        if gated:
            count, rows = count // 2, max(1, rows // 2)
        columns = min(columns, triton.next_power_of_2(size))
        out = torch.empty(1, count, dtype=inputs.dtype, device=inputs.device)
        _vector_kernel[(triton.cdiv(count, rows),)](
            inputs, weight, weight if bias is None else bias, out, count, size,
            BIASED=bias is not None, GATED=gated, ROWS=rows, COLUMNS=columns, num_warps=4, num_stages=2,
            **launch_dependents(inputs),
        )  # fmt: skip
        return out

    def rms_norm(self, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        size = hidden.shape[-1]
        if hidden.dim() > 3 or hidden.stride(-1) != 1 or size > LARGEST_ROW:
            return super().rms_norm(hidden, weight, epsilon)
        out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        heads = hidden.shape[1] if hidden.dim() == 3 else 1
        rows = hidden.numel() // size
        if rows:
            strides = (hidden.stride(0), heads, hidden.stride(1)) if hidden.dim() == 3 else (hidden.stride(0), 1, 0)
            block = triton.next_power_of_2(size)
            _rms_norm_kernel[(rows,)](
                hidden, hidden, weight, out, size, *strides, epsilon,
                ADDS=False, BLOCK=block, num_warps=_warps(block), **launch_dependents(hidden),
            )  # fmt: skip
        return out

    def add_rms_norm(self, hidden: Tensor, stream: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        rows, size = hidden.shape
        if size > LARGEST_ROW or not (hidden.is_contiguous() and stream.is_contiguous()):
            return super().add_rms_norm(hidden, stream, weight, epsilon)
        if rows:
            block = triton.next_power_of_2(size)
            _rms_norm_kernel[(rows,)](
                hidden, stream, weight, hidden, size, size, 1, 0, epsilon,
                ADDS=True, BLOCK=block, num_warps=_warps(block), **launch_dependents(hidden),
            )  # fmt: skip
        return hidden, stream

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return self._gated(gate_up, gelu=False)

    def gelu_and_mul(self, gate_up: Tensor) -> Tensor:
        return self._gated(gate_up, gelu=True)

    def _gated(self, gate_up: Tensor, gelu: bool) -> Tensor:
        gate_up = gate_up.contiguous()
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
        if rows:
            block = min(2048, triton.next_power_of_2(size))
            _gated_kernel[(rows, triton.cdiv(size, block))](
                gate_up, out, size, GELU=gelu, BLOCK=block, num_warps=4, **launch_dependents(gate_up)
            )
        return out

    def rotate_heads(
        self, qkv: Tensor, heads: Heads, norms: HeadNorms | None, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        query = self._heads(qkv, heads, norms, rotation, None, None)
        _, key, value = qkv.view(len(qkv), -1, heads.dim).split([heads.query, heads.kv, heads.kv], dim=1)
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
        return self._heads(qkv, heads, norms, rotation, cache, places)

    def _heads(
        self,
        qkv: Tensor,
        heads: Heads,
        norms: HeadNorms | None,
        rotation: Rotation | None,
        cache: Tensor | None,
        places: Tensor | None,
    ) -> Tensor:
        tokens, dim = qkv.shape[0], heads.dim
        query = torch.empty(tokens, heads.query, dim, dtype=qkv.dtype, device=qkv.device)
        if not tokens:
            return query
        cosines, sines = rotation if rotation is not None else (qkv, qkv)
        pairs = cosines.shape[-1] if rotation is not None else dim // 2
        query_norm, key_norm, epsilon = norms if norms is not None else (qkv, qkv, 0.0)
        # Without a cache only query and key are touched; the value stays where it is.
        count = heads.query + (2 if cache is not None else 1) * heads.kv
        # Many tokens fill the device with few programs each; a few need one program a head.
        many = tokens * count > MANY_PROGRAMS
        together = math.gcd(heads.query, heads.kv, 8) if many else 1
        each = max(1, 32 // together) if many else 1
        _heads_kernel[(triton.cdiv(tokens, each), count // together)](
            qkv, query, key_norm, query_norm, cosines, sines,
            qkv if cache is None else cache, qkv if places is None else places,
            tokens, heads.query, heads.kv, dim, pairs, qkv.stride(0), 0 if cache is None else cache.stride(0), epsilon,
            PAGE_SIZE=1 if cache is None else cache.shape[2],
            NORMS=norms is not None, ROTATES=rotation is not None, CACHES=cache is not None,
            TOKENS=each, HEADS=triton.next_power_of_2(together), PAIRS=triton.next_power_of_2(pairs),
            REST=triton.next_power_of_2(max(dim - 2 * pairs, 1)), num_warps=4 if many else 1, **launch_dependents(qkv),
        )  # fmt: skip
        return query

    def write_pages(self, key: Tensor, value: Tensor, cache: Tensor, places: Tensor) -> None:
        tokens, heads, dim = key.shape
        if key.stride()[1:] != (dim, 1) or value.stride()[1:] != (dim, 1):
            key, value = key.contiguous(), value.contiguous()
        if tokens:
            block = triton.next_power_of_2(heads * dim)
            _write_kernel[(tokens, 2)](
                key, value, cache, places, heads, dim, cache.shape[2], cache.stride(0), key.stride(0), value.stride(0),
                BLOCK=block, num_warps=_warps(block), **launch_dependents(key),
            )  # fmt: skip

    def latent_into_pages(
        self,
        query: Tensor,
        latents: Tensor,
        norm: LatentNorm,
        rotation: Rotation,
        interleaved: bool,
        cache: Tensor,
        places: Tensor,
    ) -> None:
        triton_latent.latent_into_pages(query, latents, norm, rotation, interleaved, cache, places)

    def multiply_heads(self, inputs: Tensor, weight: Tensor) -> Tensor:
        out = triton_latent.multiply_heads(inputs, weight)
        return super().multiply_heads(inputs, weight) if out is None else out
