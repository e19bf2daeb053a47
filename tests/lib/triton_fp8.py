"""Triton's FP8 products against their definition in torch: on a GPU (tests/gpu/test_gpu_fp8.py), or interpreted on a
CPU (test_interpreted.py, which runs this in a process of its own)."""

import pytest
import torch
from kernel_numbers import DEVICE, FP8_TOLERANCE, GPU, TOLERANCE, assert_near, exact, random

from engine.kernels.fp8.reference import (
    BLOCK,
    E4M3,
    Fp8Ops,
    Fp8Weight,
    dequantize,
    dequantize_tokens,
    quantize_blocks,
    quantize_lines,
    quantize_rows,
    quantize_tokens,
)
from engine.kernels.fp8.triton import CUTS, READING_TOKENS, Cut, TritonFp8Ops
from engine.kernels.fp8.triton import quantize_lines as triton_quantize_lines
from engine.kernels.fp8.triton import quantize_tokens as triton_quantize_tokens

DTYPE = torch.bfloat16 if GPU else torch.float32
NEAR = TOLERANCE[DTYPE]
REFERENCE, TRITON = Fp8Ops(), TritonFp8Ops()
SHAPES = [(2112, 7168), (2048, 1408), (576, 2048), (200, 72)] if GPU else [(72, 160), (136, 128)]


def weight(rows: int, columns: int, kind: str) -> Fp8Weight:
    """Of which every block, or row, has another size."""
    dense = random(rows, columns, dtype=torch.float32, seed=1) * columns**-0.5
    dense *= 0.1 + torch.rand(rows, 1, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    return Fp8Weight(*(quantize_blocks(dense) if kind == "blocks" else quantize_rows(dense)))


# ── activations ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(5, 256), (3, 200), (1, 2048), (2, 64)], ids=str)
def test_activations_become_fp8(shape: tuple[int, int]) -> None:
    """Exactly, where they can; the interpreter rounds others wrongly."""
    inputs = random(*shape, dtype=torch.float32) * 30 if GPU else exact(*shape)
    wanted, got = quantize_tokens(inputs), triton_quantize_tokens(inputs)
    torch.testing.assert_close(got[1], wanted[1])
    assert got[0].dtype == E4M3 and got[1].t().is_contiguous()
    assert ((got[0].float() - wanted[0].float()).abs() <= 0.13 * wanted[0].float().abs()).all()
    assert (got[0].float() == wanted[0].float()).float().mean() > 0.99
    assert_near(dequantize_tokens(*got), inputs, FP8_TOLERANCE)
    padded = triton_quantize_tokens(inputs, multiple=4)
    assert len(padded[0]) == len(padded[1]) == -(-shape[0] // 4) * 4
    assert torch.equal(padded[0][: shape[0]].float(), got[0].float())
    assert torch.equal(padded[1][: shape[0]], got[1])


def test_gated_activations_become_fp8() -> None:
    up = exact(3, 256, torch.float32)
    gate = torch.full_like(up, 30.0)  # whose silu is 30
    numbers, scale = triton_quantize_tokens(torch.cat((gate, up), dim=1), gated=True)
    torch.testing.assert_close(dequantize_tokens(numbers, scale), 30 * up, rtol=0.01 if GPU else 1e-5, atol=1e-4)


def test_a_tokens_activations_become_fp8_with_one_scale() -> None:
    inputs = exact(3, BLOCK, torch.float32).repeat(1, 3)
    for got, wanted in zip(triton_quantize_lines(inputs), quantize_lines(inputs), strict=True):
        torch.testing.assert_close(got.float(), wanted.float())


def test_nothing_but_zeros_stays_that() -> None:
    numbers, scale = triton_quantize_tokens(torch.zeros(2, 256, device=DEVICE))
    assert not numbers.float().any() and bool((scale > 0).all())


# ── products ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["blocks", "rows"])
@pytest.mark.parametrize("biased", [False, True])
def test_one_token(kind: str, shape: tuple[int, int], biased: bool) -> None:
    matrix, inputs = weight(*shape, kind), random(1, shape[1], dtype=DTYPE)
    bias = random(shape[0], dtype=DTYPE, seed=3) if biased else None
    wanted = REFERENCE.linear(inputs, matrix, bias)
    assert_near(TRITON.by_vector(inputs, matrix, bias, 4 if GPU else 8, 64), wanted, NEAR)
    if GPU:
        assert_near(TRITON.linear(inputs, matrix, bias), wanted, NEAR)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_some_tokens(kind: str, shape: tuple[int, int]) -> None:
    matrix, bias = weight(*shape, kind), random(shape[0], dtype=DTYPE, seed=3)
    cuts = [cut for _, cut in CUTS] if GPU else [Cut(16, 32, 256, 2, 4, 2)]
    for tokens, cut in zip((2, 17, 33, 100, 300), cuts, strict=False):
        inputs = random(tokens, shape[1], dtype=DTYPE)
        wanted = REFERENCE.linear(inputs, matrix, bias)
        assert_near(TRITON.by_kernel(inputs, None, matrix, bias, cut=cut), wanted, NEAR)


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_fp8_activations(kind: str) -> None:
    shape = (1024, 512) if GPU else (72, 256)
    matrix, inputs = weight(*shape, kind), exact(37, shape[1], DTYPE) / 64
    wanted = REFERENCE.linear(inputs, matrix, None)
    cut = Cut(64, 128, 128, 4, 4, 3) if GPU else Cut(16, 64, 128, 2, 4, 2)
    numbers, scales = triton_quantize_tokens(inputs)
    got = TRITON.by_kernel(numbers, scales, matrix, None, DTYPE, cut)
    assert_near(got, wanted, NEAR)


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_operands_of_one_sign(kind: str) -> None:
    """FP8 matrix units cut running sums off. Where signs are random that cannot be seen; here sums would be too small,
    by 1.5% at 1,024 products and by 4.5% at 8,192."""
    rows, columns = (256, 8192) if GPU else (64, 256)
    dense = random(rows, columns, dtype=torch.float32, seed=1).abs()
    matrix = Fp8Weight(*(quantize_blocks(dense) if kind == "blocks" else quantize_rows(dense)))
    inputs = exact(70, columns, torch.float32).abs() / 64
    wanted = inputs.double() @ dequantize(matrix.numbers, matrix.scale).double().T
    numbers, scales = triton_quantize_tokens(inputs.to(DTYPE))
    cut = Cut(64, 128, 128, 4, 4, 3) if GPU else Cut(16, 64, 128, 2, 4, 2)
    results = [TRITON.by_kernel(numbers, scales, matrix, None, DTYPE, cut)]
    if GPU:
        results.append(TRITON.linear(inputs.to(DTYPE), TRITON.weight(matrix.numbers, matrix.scale), None))
    for got in results:
        assert abs(float((got.double() - wanted).mean() / wanted.mean())) < 2e-3


def test_a_weight_stands_for_nearly_what_it_was_made_of() -> None:
    dense = random(300, 200, dtype=torch.float32)
    for quantize, most in ((quantize_blocks, 0.05), (quantize_rows, 0.04)):
        error = dequantize(*quantize(dense)) - dense
        assert error.square().mean().sqrt() < most * dense.square().mean().sqrt()


if GPU:

    @pytest.mark.parametrize("kind", ["blocks", "rows"])
    @pytest.mark.parametrize("tokens", [1, 3, 64, 65, 130, 1003])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_whatever_is_chosen(kind: str, tokens: int, shape: tuple[int, int]) -> None:
        matrix = weight(*shape, kind)
        matrix = TRITON.weight(matrix.numbers, matrix.scale)
        inputs, bias = random(tokens, shape[1], dtype=DTYPE), random(shape[0], dtype=DTYPE, seed=3)
        near = FP8_TOLERANCE if tokens > READING_TOKENS else NEAR
        assert_near(TRITON.linear(inputs, matrix, bias), REFERENCE.linear(inputs, matrix, bias), near)
        gate_up = torch.cat((3 * random(tokens, shape[1], dtype=DTYPE, seed=8), inputs), dim=1)
        got, wanted = (ops.linear(gate_up, matrix, None, gated=True) for ops in (TRITON, REFERENCE))
        assert_near(got, wanted, near)

    @pytest.mark.parametrize("tokens", [1, 16, 200])
    def test_captured(tokens: int) -> None:
        matrix = weight(1024, 512, "blocks")
        matrix = TRITON.weight(matrix.numbers, matrix.scale)
        inputs = random(tokens, 512, dtype=DTYPE)
        TRITON.linear(inputs, matrix, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = TRITON.linear(inputs, matrix, None)
        for seed in range(3):
            inputs.copy_(random(tokens, 512, dtype=DTYPE, seed=seed + 5))
            graph.replay()
            assert torch.equal(out, TRITON.linear(inputs, matrix, None))
