"""Triton's FP8 products against their definition in torch: on a GPU (tests/gpu/test_gpu_fp8.py), or interpreted on a
CPU (test_interpreted.py, which runs this in a process of its own)."""

import pytest
import torch
from torch import Tensor

from engine.kernels.fp8 import (
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
from engine.kernels.triton_fp8 import CUTS, Cut, TritonFp8Ops
from engine.kernels.triton_fp8 import quantize_lines as triton_quantize_lines
from engine.kernels.triton_fp8 import quantize_tokens as triton_quantize_tokens

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 2e-2 if GPU else 1e-4
REFERENCE, TRITON = Fp8Ops(), TritonFp8Ops()
SHAPES = [(2112, 7168), (2048, 1408), (576, 2048), (200, 72)] if GPU else [(72, 160), (136, 128)]


def random(*shape: int, dtype: torch.dtype = DTYPE, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def weight(rows: int, columns: int, kind: str) -> Fp8Weight:
    """Of which every block, or row, has another size."""
    dense = random(rows, columns, dtype=torch.float32, seed=1) * columns**-0.5
    dense *= 0.1 + torch.rand(rows, 1, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    return Fp8Weight(*(quantize_blocks(dense) if kind == "blocks" else quantize_rows(dense)))


def exact(tokens: int, size: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Activations whose FP8 is exact: small whole numbers and a 448 in each 128, times a power of two."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-8, 9, (tokens, size), generator=generator).float()
    whole[:, ::BLOCK] = 448.0
    scale = 2.0 ** torch.randint(-3, 3, (tokens, -(-size // BLOCK)), generator=generator)
    return (whole * scale.repeat_interleave(BLOCK, 1)[:, :size]).to(DEVICE, dtype)


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Off by no more than `tolerance` of the typical size."""
    assert got.shape == wanted.shape and bool(got.isfinite().all())
    worst = float((got.double() - wanted.double()).abs().max() / wanted.double().square().mean().sqrt())
    assert worst <= tolerance, f"off by {worst:.3g}, more than {tolerance:.3g}"


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
    assert_near(dequantize_tokens(*got), inputs, 0.3)
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
    matrix, inputs = weight(*shape, kind), random(1, shape[1])
    bias = random(shape[0], seed=3) if biased else None
    wanted = REFERENCE.linear(inputs, matrix, bias)
    assert_near(TRITON.by_vector(inputs, matrix, bias, 4 if GPU else 8, 64), wanted, TOLERANCE)
    if GPU:
        assert_near(TRITON.linear(inputs, matrix, bias), wanted, TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_some_tokens(kind: str, shape: tuple[int, int]) -> None:
    matrix, bias = weight(*shape, kind), random(shape[0], seed=3)
    cuts = [cut for _, cut in CUTS] if GPU else [Cut(16, 32, 256, 2, 4, 2)]
    for tokens, cut in zip((2, 17, 33, 100, 300), cuts, strict=False):
        inputs = random(tokens, shape[1])
        wanted = REFERENCE.linear(inputs, matrix, bias)
        assert_near(TRITON.by_kernel(inputs, None, matrix, bias, cut=cut), wanted, TOLERANCE)


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_fp8_activations(kind: str) -> None:
    shape = (1024, 512) if GPU else (72, 256)
    matrix, inputs = weight(*shape, kind), exact(37, shape[1]) / 64
    wanted = REFERENCE.linear(inputs, matrix, None)
    cut = Cut(64, 128, 128, 4, 4, 3) if GPU else Cut(16, 64, 128, 2, 4, 2)
    numbers, scales = triton_quantize_tokens(inputs)
    got = TRITON.by_kernel(numbers, scales, matrix, None, DTYPE, cut)
    assert_near(got, wanted, TOLERANCE)


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
        """The error of FP8 activations is under 1 in 10 of the typical result, at the worst of all results."""
        matrix = weight(*shape, kind)
        matrix = TRITON.weight(matrix.numbers, matrix.scale)
        inputs, bias = random(tokens, shape[1]), random(shape[0], seed=3)
        got, wanted = TRITON.linear(inputs, matrix, bias), REFERENCE.linear(inputs, matrix, bias)
        gate_up = torch.cat((3 * random(tokens, shape[1], seed=8), inputs), dim=1)
        both = TRITON.linear(gate_up, matrix, None, gated=True), REFERENCE.linear(gate_up, matrix, None, gated=True)
        assert_near(*both, 0.3 if tokens > 64 else TOLERANCE)
        assert_near(got, wanted, 0.25 if tokens > 64 else TOLERANCE)
        error = (got.double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt()
        assert error < 0.04

    @pytest.mark.parametrize("tokens", [1, 16, 200])
    def test_captured(tokens: int) -> None:
        matrix = weight(1024, 512, "blocks")
        matrix = TRITON.weight(matrix.numbers, matrix.scale)
        inputs = random(tokens, 512)
        TRITON.linear(inputs, matrix, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = TRITON.linear(inputs, matrix, None)
        for seed in range(3):
            inputs.copy_(random(tokens, 512, seed=seed + 5))
            graph.replay()
            assert torch.equal(out, TRITON.linear(inputs, matrix, None))
