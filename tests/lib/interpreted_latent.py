"""Triton's kernels of latent attention on a CPU, interpreted. test_interpreted.py runs this in a process of its own,
where TRITON_INTERPRET is set before anything imports triton. float32 only: the interpreter's bfloat16 is no GPU's."""

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kernels.attention import expanded as triton_expanded
from engine.kernels.attention import mla as triton_mla
from engine.kernels.attention import reference
from engine.kernels.dense.reference import write_latents
from engine.layers import Batch, LatentShape, Mirror
from engine.plugin.testing import LATENT_CASES, LatentCase, check_latent_attention, latent_reference
from engine_plugins.attention.triton.mla import TritonLatentAttention


class Expanding(TritonLatentAttention):
    """Expands every row of several tokens, and the cache by a few tokens at a time."""

    chunk_tokens = 11

    def expands(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return lengths > 1


class Absorbing(TritonLatentAttention):
    """Absorbs every row."""

    def expands(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return lengths < 1


SMALL = (32, 16, 16, 16)
LONG = LatentCase(page_size=16, heads=3, rows=((300, 1), (3, 1), (127, 1), (128, 1)), dims=SMALL)
MANY_HEADS = LatentCase(page_size=3, heads=20, rows=((20, 3), (33, 1), (0, 1), (0, 5)), dims=SMALL)


@pytest.mark.parametrize("case", [*LATENT_CASES[1:6], LONG, MANY_HEADS], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # lines of the matrix that hold no query
def test_absorbed_rows_are_those_of_the_definition(case: LatentCase) -> None:
    check_latent_attention(Absorbing, case)


@pytest.mark.parametrize("case", [*LATENT_CASES[2:4], LATENT_CASES[5], MANY_HEADS], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_expanded_rows_are_those_of_the_definition(case: LatentCase) -> None:
    check_latent_attention(Expanding, case)


SHAPE = LatentShape(layers=1, query_heads=20, latent_dim=32, rope_dim=16, key_dim=16, value_dim=16, scale=0.2)
PAGE, LINE = 4, 100


class Steps:
    """A backend over random pages of two slots, and the definition of what its steps attend."""

    def __init__(self, tokens: int) -> None:
        torch.manual_seed(0)
        self.backend = TritonLatentAttention(SHAPE, PAGE, torch.device("cpu"), torch.float32)
        self.query, self.up = torch.randn(tokens, 20, 32), torch.randn(20, 32, 32) * 32**-0.5
        self.table = torch.randperm(2 * LINE).to(torch.int32).view(2, LINE)
        self.contexts = torch.randn(2, LINE * PAGE, SHAPE.width)
        self.cache = torch.empty(2 * LINE, PAGE, SHAPE.width)
        places = (self.table.long()[..., None] * PAGE + torch.arange(PAGE)).flatten(1)
        write_latents(self.contexts.flatten(0, 1), self.cache, places.flatten())

    def batch(self, numbers: Tensor, rows: int) -> Batch:
        slots, starts, offsets = numbers.split([rows, rows, rows + 1])
        nothing, empty = numbers[:0], np.empty(0, np.int64)
        return Batch(
            ids=torch.zeros(len(self.query), dtype=torch.int64), positions=nothing, places=nothing,
            page_table=self.table, slots=slots, row_starts=starts, row_offsets=offsets,
            starts=empty, lengths=empty, offsets=empty, caches=(),
        )  # fmt: skip

    def check(self, plan: object, rows: list[tuple[int, int, int]]) -> None:
        out = self.backend.forward(self.query, self.contexts[0, :0], self.up, self.cache, plan)
        first = 0
        for slot, start, length in rows:
            wanted = latent_reference(
                self.query[first : first + length], self.contexts[slot, : start + length], self.up, SHAPE
            )
            assert (out[first : first + length] - wanted).abs().max() < 1e-5
            first += length


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_one_plan_serves_decode_steps_of_other_positions() -> None:
    """As in a CUDA graph; a row is a part of one team's range, all of it, or that of several teams."""
    steps = Steps(2)
    numbers = torch.tensor([1, 0, 0, 0, 0, 1, 2])
    plan = steps.backend.capture(steps.batch(numbers, 2))
    for starts in ((0, 1), (389, 127), (128, 300), (5, 255), (399, 399)):
        numbers[2:4] = torch.tensor(starts)
        steps.check(plan, [(1, starts[0], 1), (0, starts[1], 1)])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_one_plan_serves_steps_with_prompts() -> None:
    steps = Steps(9)
    numbers = Mirror(3 * 3 + 1, torch.device("cpu"))
    plan = steps.backend.capture_prompts(steps.batch(numbers.device, 3))
    for rows in ([(0, 0, 9)], [(1, 30, 1), (0, 3, 5)], [(0, 17, 1), (1, 0, 1)]):
        slots, starts, lengths = (np.array(part) for part in zip(*rows, strict=True))
        offsets, host = np.concatenate(([0], np.cumsum(lengths))), numbers.host()
        host[:] = 0
        host[: len(rows)], host[3 : 3 + len(rows)] = slots, starts
        host[6:] = np.pad(offsets, (0, 3 - len(rows)), mode="edge")
        numbers.send()
        steps.backend.refill_prompts(plan, starts, lengths, offsets)
        steps.check(plan, rows)


@pytest.mark.parametrize("heads", [1, 3, 8, 20])
def test_whole_keys_are_joined(heads: int) -> None:
    both, latents = torch.randn(5, heads, 48), torch.randn(5, 40)
    key, rotated = both[..., :32], latents[:, 24:]
    joined = triton_expanded.join_keys(key, rotated)
    assert joined.is_contiguous() and torch.equal(joined, reference.join_keys(key, rotated))


def test_blocks_cover_all_lines_and_the_longest_contexts_come_first() -> None:
    starts, lengths = np.array([5, 0, 64, 7]), np.array([9, 1, 4, 8])
    rows, blocks = triton_mla.list_mla_blocks(starts, lengths, heads=6, lines=16)
    assert sorted(zip(rows.tolist(), blocks.tolist(), strict=True)) == [
        *((0, block) for block in range(4)), *((2, block) for block in range(2)), *((3, block) for block in range(3)),
    ]  # fmt: skip
    assert rows.tolist()[:2] == [2, 2]
    rows, blocks = triton_expanded.list_expanded(np.array([9, 3]), np.array([9, 30]), causal=True, size=4)
    assert list(zip(rows.tolist(), blocks.tolist(), strict=True)) == [(1, 0), (0, 2), (0, 1), (0, 0)]
