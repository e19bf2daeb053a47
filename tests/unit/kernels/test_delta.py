"""The gated delta rule in torch against its definition: rows of any lengths, in steps that go on from each other."""

import pytest
import torch
from delta_numbers import HEADS, Numbers, check

from engine.kernels.delta.reference import DeltaOps

OPS = DeltaOps()
CLOSE = 2e-6  # about ten times what is seen


def test_rows_of_unequal_lengths_and_then_of_one_token_each() -> None:
    first = Numbers([1, 66, 2, 1, 17, 3], [4, 0, 6, 7, 1, 3])
    second = Numbers([5, 1, 64], [6, 4, 0], seed=1)
    check(OPS, [first, second, Numbers([1, 1, 1], [0, 6, 4], seed=2)], CLOSE)


@pytest.mark.parametrize("length", [2, 3, 64, 65, 130])
def test_a_row_ends_anywhere_in_a_chunk(length: int) -> None:
    check(OPS, [Numbers([length], [5], seed=length)], CLOSE)


def test_tokens_that_are_all_alike_and_decay_nothing() -> None:
    """Where each takes away what the one before has put there, and a less careful inverse loses all digits."""
    check(OPS, [Numbers([130], [2], alike=True)], CLOSE)


def test_a_memory_that_forgot_all_keeps_what_comes_then() -> None:
    """Decays of a chunk add up to thousands, whose differences in float32 would be off by 4e-5."""
    numbers = Numbers([64], [3])
    numbers.gates.step[:40] += 20
    numbers.gates.step[40:] -= 12
    check(OPS, [numbers], CLOSE)


def test_a_captured_step_knows_no_lengths() -> None:
    """Of one token a row: the host's numbers are not read."""
    numbers = Numbers([1, 1], [3, 5])
    numbers.rows = numbers.rows._replace(lengths=numbers.rows.lengths[:0])
    check(OPS, [numbers], CLOSE)


def test_numbers_of_half_the_length_keep_a_memory_in_float32() -> None:
    numbers = Numbers([40, 1], [3, 5])
    numbers.inputs, numbers.weight = numbers.inputs.bfloat16(), numbers.weight.bfloat16()
    window = torch.zeros(8, 3, numbers.inputs.shape[1], dtype=torch.bfloat16)
    memory = torch.zeros(8, 4, 10, 7)
    mixed = OPS.convolve(numbers.inputs, numbers.weight, window, numbers.rows)
    out = OPS.delta_rule(mixed, numbers.gates, HEADS, memory, numbers.rows)
    assert out.dtype == mixed.dtype == torch.bfloat16 and memory[3].abs().max() > 0.01
    exact = OPS.delta_rule(mixed.float(), numbers.gates, HEADS, torch.zeros_like(memory), numbers.rows)
    torch.testing.assert_close(out.float(), exact, atol=1e-2, rtol=1e-2)
