"""Numbers that kernels of mixtures and of FP8 products are tested with, and how near results must be."""

import torch
from torch import Tensor

from engine.kernels.fp8.reference import BLOCK

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
FP8_TOLERANCE = 0.12  # where activations become FP8: each is off by up to 1 in 16, and they do so twice in a mixture


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def exact(tokens: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations whose FP8 is exact: small whole numbers and a 448 in each 128, times a power of two."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-8, 9, (tokens, size), generator=generator).float()
    whole[:, ::BLOCK] = 448.0
    scale = 2.0 ** torch.randint(-3, 3, (tokens, -(-size // BLOCK)), generator=generator)
    return (whole * scale.repeat_interleave(BLOCK, 1)[:, :size]).to(DEVICE, dtype)


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Off by no more than half of `tolerance` as a whole, of the typical size; and nowhere by more than `tolerance` of
    what is wanted and of ten times the typical size: the largest numbers are many times that, and so are their
    roundings."""
    assert got.shape == wanted.shape and bool(got.isfinite().all())
    off, wanted = (got.double() - wanted.double()).abs(), wanted.double().abs()
    size = wanted.square().mean().sqrt()
    whole, worst = float(off.square().mean().sqrt() / size), float((off / (wanted + 10 * size)).max())
    assert whole <= tolerance / 2 and worst <= tolerance, f"off by {whole:.3g}, at the worst {worst:.3g}: {tolerance}"
