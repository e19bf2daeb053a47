"""Triton's gated delta rule against its definition: on a GPU (tests/gpu/test_gpu_delta.py), or interpreted on a CPU
(test_interpreted.py, which runs this in a process of its own)."""

from delta_numbers import Numbers, check

from engine.kernels.delta.triton import TritonDeltaOps

TRITON = TritonDeltaOps()


def test_rows_of_unequal_lengths_and_then_of_one_token_each() -> None:
    """Within a chunk and beyond its end; each goes on from what the step before left."""
    check(TRITON, [Numbers([1, 17], [4, 6]), Numbers([1, 1], [6, 4], seed=2)], 2e-4)


def test_tokens_that_are_all_alike_and_decay_nothing() -> None:
    check(TRITON, [Numbers([16], [2], alike=True)], 2e-4)
