"""Triton's gated delta rule against its definition: on a GPU (tests/gpu/test_gpu_delta.py), or interpreted on a CPU
(test_interpreted.py, which runs this in a process of its own)."""

from delta_numbers import Numbers, check

from engine.kernels.delta.triton import TritonDeltaOps

TRITON = TritonDeltaOps()


def test_rows_of_unequal_lengths_and_then_of_one_token_each() -> None:
    """Within a chunk, to its end, and beyond; each goes on from what the step before left."""
    steps = [Numbers([1, 17], [4, 6]), Numbers([2, 3], [6, 4], seed=1), Numbers([1, 1], [6, 4], seed=2)]
    check(TRITON, steps, 2e-4)


def test_tokens_that_are_all_alike_and_decay_nothing() -> None:
    check(TRITON, [Numbers([18], [2], alike=True)], 2e-4)
