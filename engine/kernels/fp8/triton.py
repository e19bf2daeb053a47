"""Products with E4M3 weights on a GPU, and activations becoming E4M3, in Triton: what reference.py defines.

    one token   a vector times the matrix: `vector_kernel`
    some        `linear_kernel` with activations as they are, few rows of the matrix a program: to read takes the time
    many        activations become FP8 (`quantize_kernel`, or with one scale a token `quantize_lines_kernel`); then
                torch's scaled product where the device and the shape allow it, else `linear_kernel`

Which of them a step takes is a matter of its tokens: `READING_TOKENS` and `CUTS`, to be tuned by bench/kernels/fp8.py.
"""

import functools
import logging
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from engine.kernels.fp8.reference import BLOCK, E4M3, LARGEST, Fp8Ops, Fp8Weight
from engine.kernels.launch import launch_dependents, wait_for_previous

log = logging.getLogger("engine.kernels")

READING_TOKENS = 64  # up to so many, activations stay as they are
LONGEST_LINE = 32768  # numbers of a token that one program holds at a time
NO_SCALES, BLOCK_SCALES, ROW_SCALES = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product is cut: a program makes `rows` x `columns` of the result, `depth` of the sum at a time. `together`
    programs, one above the other, share columns of the weight while they are in the cache."""

    rows: int
    columns: int
    depth: int
    together: int
    warps: int
    stages: int


# By the tokens of a step, up to so many.
CUTS: tuple[tuple[float, Cut], ...] = (
    (16, Cut(16, 16, 512, 1, 4, 4)),
    (32, Cut(32, 16, 512, 1, 4, 3)),
    (64, Cut(64, 32, 256, 1, 4, 4)),
    (128, Cut(64, 64, 128, 8, 4, 4)),
    (float("inf"), Cut(128, 128, 128, 8, 8, 4)),
)


# ── activations ──────────────────────────────────────────────────────────────────────────────


@triton.jit
def silu_mul(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def activations(inputs, token, stride, at, SIZE: tl.constexpr, GATED: tl.constexpr):
    """Those of one token `at` some places; GATED, the line is gate and up, and they are silu(gate) * up."""
    x = tl.load(inputs + token * stride + at, mask=at < SIZE, other=0.0).to(tl.float32)
    if GATED:
        x = silu_mul(x, tl.load(inputs + token * stride + SIZE + at, mask=at < SIZE, other=0.0).to(tl.float32))
    return x


@triton.jit
def to_fp8(x, scale, LARGEST: tl.constexpr):
    return tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST)


@triton.jit(do_not_specialize=["scale_stride"])
def quantize_kernel(
    inputs, numbers, scales, input_stride, scale_stride, SIZE: tl.constexpr, GATED: tl.constexpr,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """TOGETHER blocks of one token."""
    wait_for_previous(DEPENDS)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = activations(inputs, token, input_stride, at, SIZE, GATED)
    scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-12) / LARGEST
    x = to_fp8(x, scale[:, None], LARGEST)
    tl.store(numbers + token * SIZE + at, x.to(numbers.dtype.element_ty), mask=at < SIZE)
    tl.store(scales + block.to(tl.int64) * scale_stride + token, scale, mask=block * BLOCK < SIZE)


@triton.jit
def quantize_lines_kernel(
    inputs, numbers, scales, input_stride, SIZE: tl.constexpr, GATED: tl.constexpr, LARGEST: tl.constexpr,
    COLUMNS: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """One token, with one scale."""
    wait_for_previous(DEPENDS)
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    x = activations(inputs, token, input_stride, at, SIZE, GATED)
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-12) / LARGEST
    tl.store(numbers + token * SIZE + at, to_fp8(x, scale, LARGEST).to(numbers.dtype.element_ty), mask=at < SIZE)
    tl.store(scales + token, scale)


def quantize_tokens(inputs: Tensor, gated: bool = False, multiple: int = 1, each: int = BLOCK) -> tuple[Tensor, Tensor]:
    """As `fp8.quantize_tokens`, of `inputs` [T, K], or of silu(gate) * up of [T, 2 * K], and a scale for `each` so many
    numbers. There are lines beyond T to make their number a `multiple`; what they hold is anything."""
    tokens, size = inputs.shape
    size = size // 2 if gated else size
    if inputs.stride(1) != 1:
        inputs = inputs.contiguous()
    lines = triton.cdiv(tokens, multiple) * multiple
    numbers = torch.empty(lines, size, dtype=E4M3, device=inputs.device)
    count = triton.cdiv(size, each)
    scales = torch.empty(count, lines, dtype=torch.float32, device=inputs.device)
    if tokens:
        together = min(8, triton.next_power_of_2(count))
        quantize_kernel[(tokens, triton.cdiv(count, together))](
            inputs, numbers, scales, inputs.stride(0), lines, SIZE=size, GATED=gated, LARGEST=LARGEST, BLOCK=each,
            TOGETHER=together, num_warps=4, **launch_dependents(inputs),
        )  # fmt: skip
    return numbers, scales.t()


def quantize_lines(inputs: Tensor, gated: bool = False) -> tuple[Tensor, Tensor]:
    """As `fp8.quantize_lines`."""
    tokens, size = inputs.shape
    size = size // 2 if gated else size
    if inputs.stride(1) != 1:
        inputs = inputs.contiguous()
    numbers = torch.empty(tokens, size, dtype=E4M3, device=inputs.device)
    scales = torch.empty(tokens, 1, dtype=torch.float32, device=inputs.device)
    if tokens:
        columns = triton.next_power_of_2(size)
        quantize_lines_kernel[(tokens,)](
            inputs, numbers, scales, inputs.stride(0), SIZE=size, GATED=gated, LARGEST=LARGEST, COLUMNS=columns,
            num_warps=max(1, min(16, columns // 512)), **launch_dependents(inputs),
        )  # fmt: skip
    return numbers, scales


# ── products ─────────────────────────────────────────────────────────────────────────────────


@triton.jit
def scaled_line(inputs, scales, row, at, SIZE: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr):
    """`inputs` at `at`, times the scales of the blocks of the matrix that those columns of `row` are in."""
    x = tl.load(inputs + at, mask=at < SIZE, other=0.0).to(tl.float32)
    if SCALES == 1:
        columns: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
        x *= tl.load(scales + (row // BLOCK) * columns + at // BLOCK, mask=at < SIZE, other=0.0)
    return x


@triton.jit
def load_step(at, there, EVEN: tl.constexpr):
    """A tile of a matrix; where columns do not divide EVENly into steps, those beyond are zeros."""
    return tl.load(at) if EVEN else tl.load(at, mask=there, other=0.0)


@triton.jit
def as_type(w, x):
    """`w` in the type of `x`. FP8 goes by way of float32, as exact: a Hopper's instruction from float16 to bfloat16 is
    that of a unit which makes 16 numbers a cycle."""
    if w.dtype == x.dtype:
        return w
    return w.to(tl.float32).to(x.dtype)


@triton.jit
def add_product(total, x, w, each, scale, QUANTIZED: tl.constexpr, SCALES: tl.constexpr, PRECISION: tl.constexpr):
    """`total` + x wᵀ, times `each` of the lines of x where these are QUANTIZED, times the scale of the block of w."""
    if QUANTIZED:
        factor = each * tl.load(scale) if SCALES == 1 else each
        return total + tl.dot(x, tl.trans(w), input_precision=PRECISION) * factor[:, None]
    if SCALES == 1:
        return total + tl.dot(x, tl.trans(as_type(w, x)), input_precision=PRECISION) * tl.load(scale)
    return tl.dot(x, tl.trans(as_type(w, x)), total, input_precision=PRECISION)


@triton.jit
def vector_kernel(
    inputs, weight, scales, bias, out, N: tl.constexpr, K: tl.constexpr, SCALES: tl.constexpr, BIASED: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the weight, which are of one block, times one token."""
    first, k = tl.program_id(0) * ROWS, tl.arange(0, COLUMNS)
    n = first + tl.arange(0, ROWS)
    line = weight + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K
    # The first block of the weight is on its way while the kernel before still runs.
    w = tl.load(line + k[None, :], mask=(k < K)[None, :], other=0.0)
    wait_for_previous(DEPENDS)
    total = w.to(tl.float32) * scaled_line(inputs, scales, first, k, K, SCALES, BLOCK)[None, :]
    for begin in range(COLUMNS, K, COLUMNS):
        at = begin + k
        w = tl.load(line + at[None, :], mask=(at < K)[None, :], other=0.0)
        total += w.to(tl.float32) * scaled_line(inputs, scales, first, at, K, SCALES, BLOCK)[None, :]
    y = tl.sum(total, 1)
    if SCALES == 2:
        y *= tl.load(scales + n, mask=n < N, other=0.0)
    if BIASED:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["tokens", "scale_stride"])
def linear_kernel(
    inputs, input_scales, weight, scales, bias, out, tokens, input_stride, scale_stride, out_stride,
    N: tl.constexpr, K: tl.constexpr, QUANTIZED: tl.constexpr, SCALES: tl.constexpr, BIASED: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr, DEPENDS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens times COLUMNS rows of the weight, DEPTH at a time in steps of a block, whose copies run together."""
    STEP: tl.constexpr = BLOCK if DEPTH > BLOCK else DEPTH
    EVEN: tl.constexpr = K % DEPTH == 0
    columns: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    lines = tl.cdiv(tokens, ROWS)
    first_line = tl.program_id(0) // (TOGETHER * columns) * TOGETHER
    within = tl.program_id(0) % (TOGETHER * columns)
    side = tl.minimum(lines - first_line, TOGETHER)
    wait_for_previous(DEPENDS)
    if within < side * columns:
        first, column = (first_line + within % side) * ROWS, within // side * COLUMNS
        m, n, k = first + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS), tl.arange(0, STEP)
        line = tl.minimum(m, tokens - 1).to(tl.int64)
        source = inputs + line[:, None] * input_stride + k[None, :]
        matrix = weight + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + k[None, :]
        scale = scales
        if SCALES == 1:
            scale += column // BLOCK * ((K + BLOCK - 1) // BLOCK)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, K, DEPTH):
            for step in tl.static_range(DEPTH // STEP):
                start = begin + step * STEP
                block = (start if EVEN else tl.minimum(start, K - 1)) // BLOCK
                there = (start + k < K)[None, :]
                x, w = load_step(source + start, there, EVEN), load_step(matrix + start, there, EVEN)
                each = x
                if QUANTIZED:
                    each = tl.load(input_scales + block * scale_stride + line)
                total = add_product(total, x, w, each, scale + block, QUANTIZED, SCALES, PRECISION)
        if SCALES == 2:
            total *= tl.load(scales + n, mask=n < N, other=0.0)[None, :]
        if BIASED:
            total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        target = out + m.to(tl.int64)[:, None] * out_stride + n[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=(m < tokens)[:, None] & (n < N)[None, :])


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the GPU `device` multiplies E4M3 numbers: from Ada and Hopper on."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def scaled_product_of_blocks(device: torch.device) -> bool:
    """Whether torch multiplies with scales of blocks on this GPU: a Hopper, with CUDA 12.9 or newer. It is tried."""
    if torch.cuda.get_device_capability(device) != (9, 0) or not hasattr(functional, "scaled_mm"):
        return False
    numbers, scales = quantize_tokens(torch.zeros(8, 5 * BLOCK, dtype=torch.bfloat16, device=device))
    weight = torch.zeros(2 * BLOCK, 5 * BLOCK, device=device).to(E4M3)
    try:
        multiply_blocks(numbers, scales, weight, torch.ones(2, 8, device=device), None, torch.bfloat16)
    except (RuntimeError, ValueError) as error:  # of a library that is older, or knows another layout
        log.info("FP8 products with scales of blocks are Triton's, as torch's say: %s", str(error).partition("\n")[0])
        return False
    return True


def multiply_blocks(
    numbers: Tensor, scales: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """torch's product of `numbers` [T, K], T a multiple of 4, with `scales` [T, blocks], and of `weight` [N, K] with
    `scale` [row blocks, column blocks up to a multiple of 4]."""
    kinds = functional.ScalingType
    return functional.scaled_mm(
        numbers, weight.t(), scales, kinds.BlockWise1x128, scale.t(), kinds.BlockWise128x128,
        bias=bias, output_dtype=dtype,
    )  # fmt: skip


class TritonFp8Ops(Fp8Ops):
    """The operations on CUDA tensors."""

    pays = True

    def weight(self, numbers: Tensor, scale: Tensor) -> Fp8Weight:
        aligned = numbers.shape[0] % 16 == 0 and numbers.shape[1] % 16 == 0
        if scale.dim() == 1 or not aligned or not scaled_product_of_blocks(numbers.device):
            return Fp8Weight(numbers, scale)
        return Fp8Weight(numbers, scale, functional.pad(scale, (0, -scale.shape[1] % 4)).contiguous())

    def linear(self, inputs: Tensor, weight: Fp8Weight, bias: Tensor | None, gated: bool = False) -> Tensor:
        tokens, size = len(inputs), weight.numbers.shape[1]
        if tokens <= READING_TOKENS or inputs.dtype == torch.float32:
            inputs = self.dense.silu_and_mul(inputs) if gated else inputs
            if inputs.stride(1) != 1:
                inputs = inputs.contiguous()
            if tokens <= 1:
                return self.by_vector(inputs, weight, bias)
            return self.by_kernel(inputs, None, weight, bias)
        if weight.rowwise and size <= LONGEST_LINE and size % 16 == 0 and weight.numbers.shape[0] % 16 == 0:
            return self.by_lines(inputs, weight, bias, gated)
        if weight.padded_scale is not None:
            return self.by_blocks(inputs, weight, bias, gated)
        return self.by_kernel(*quantize_tokens(inputs, gated), weight, bias, inputs.dtype)

    def by_vector(
        self, inputs: Tensor, weight: Fp8Weight, bias: Tensor | None, rows: int = 4, columns: int = 2048
    ) -> Tensor:
        """`linear` of one token. A program takes `rows` rows of the weight, `columns` of them at a time."""
        count, size = weight.numbers.shape
        out = torch.empty(len(inputs), count, dtype=inputs.dtype, device=inputs.device)
        if len(inputs):
            vector_kernel[(triton.cdiv(count, rows),)](
                inputs, weight.numbers, weight.scale, weight.scale if bias is None else bias, out, N=count, K=size,
                SCALES=ROW_SCALES if weight.rowwise else BLOCK_SCALES, BIASED=bias is not None, BLOCK=BLOCK,
                ROWS=rows, COLUMNS=min(columns, triton.next_power_of_2(size)), num_warps=4,
                **launch_dependents(inputs),
            )  # fmt: skip
        return out

    def by_kernel(
        self, inputs: Tensor, input_scales: Tensor | None, weight: Fp8Weight, bias: Tensor | None,
        dtype: torch.dtype | None = None, cut: Cut | None = None,
    ) -> Tensor:  # fmt: skip
        """`linear` of any number of tokens, in `dtype`, that of inputs unless they are FP8 with scales of blocks."""
        tokens, (count, size) = len(inputs), weight.numbers.shape
        cut = cut or next(each for most, each in CUTS if tokens <= most)
        quantized = input_scales is not None
        depth = min(cut.depth, BLOCK) if quantized else cut.depth
        depth = 32 if inputs.dtype == torch.float32 else depth
        out = torch.empty(tokens, count, dtype=dtype or inputs.dtype, device=inputs.device)
        linear_kernel[(triton.cdiv(tokens, cut.rows) * triton.cdiv(count, cut.columns),)](
            inputs, weight.scale if input_scales is None else input_scales, weight.numbers, weight.scale,
            weight.scale if bias is None else bias, out, tokens, inputs.stride(0),
            0 if input_scales is None else input_scales.stride(1), out.stride(0), N=count, K=size,
            QUANTIZED=quantized, SCALES=ROW_SCALES if weight.rowwise else BLOCK_SCALES, BIASED=bias is not None,
            BLOCK=BLOCK, ROWS=cut.rows, COLUMNS=cut.columns, DEPTH=depth, TOGETHER=cut.together,
            PRECISION="ieee" if inputs.dtype == torch.float32 else "tf32", num_warps=cut.warps, num_stages=cut.stages,
            **launch_dependents(inputs),
        )  # fmt: skip
        return out

    def by_blocks(self, inputs: Tensor, weight: Fp8Weight, bias: Tensor | None, gated: bool = False) -> Tensor:
        """`linear` by torch's product with scales of blocks, which wants a multiple of 4 tokens."""
        assert weight.padded_scale is not None
        numbers, scales = quantize_tokens(inputs, gated, multiple=4)
        product = multiply_blocks(numbers, scales, weight.numbers, weight.padded_scale, bias, inputs.dtype)
        return product[: len(inputs)]

    def by_lines(self, inputs: Tensor, weight: Fp8Weight, bias: Tensor | None, gated: bool = False) -> Tensor:
        """`linear` by torch's product with scales of rows."""
        numbers, scales = quantize_lines(inputs, gated)
        rows = weight.scale[None, :]
        return torch._scaled_mm(numbers, weight.numbers.t(), scales, rows, bias=bias, out_dtype=inputs.dtype)
