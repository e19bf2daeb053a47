"""Comparing tensors in contract checks."""

from torch import Tensor


def assert_close(got: Tensor, wanted: Tensor, tolerance: float, where: str) -> None:
    worst = float((got - wanted).abs().max())
    assert worst <= tolerance, f"{where}: off by {worst:.3g}, more than {tolerance:.3g}"
