"""Triton's attention kernels on a CPU, interpreted. test_triton_attention.py runs this in a process of its own, where
TRITON_INTERPRET is set before anything imports triton. float32 only: the interpreter's bfloat16 is not a GPU's."""

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kernels import triton_attention as kernels
from engine.kernels.page_lists import BLOCK, PROGRAMS, list_pages, list_pages_reference
from engine.layers import AttentionShape, Batch, Mirror
from engine.plugin.testing import ATTENTION_CASES, AttentionCase, check_attention
from engine_plugins.attention.triton import TritonAttention

PIECES = AttentionCase(page_size=16, heads=(2, 1), head_dim=16, rows=((300, 1), (3, 1), (127, 1), (128, 1)))
MIXED = AttentionCase(page_size=3, heads=(7, 1), head_dim=48, rows=((20, 6), (33, 1), (0, 1), (0, 33)), window=21)


@pytest.mark.parametrize(
    "case", [*ATTENTION_CASES[2:5], ATTENTION_CASES[7], *ATTENTION_CASES[9:12], PIECES, MIXED], ids=str
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # lines of the matrix that hold no query
def test_attention_is_that_of_the_definition(case: AttentionCase) -> None:
    check_attention(TritonAttention, case)


SHAPE = kernels.PagedShape(query_heads=6, kv_heads=2, head_dim=16, page_size=4, scale=0.25, window=None)


def definition(query: Tensor, cache: Tensor, line: Tensor, position: int) -> Tensor:
    """[query_heads, head_dim] of one token."""
    halves = cache[line.long()].double().transpose(0, 1).flatten(1, 2)[:, : position + 1]
    key, value = halves.repeat_interleave(SHAPE.group, dim=2)
    scores = torch.einsum("hd,khd->hk", query.double(), key) * SHAPE.scale
    return torch.einsum("hk,khd->hd", scores.softmax(-1), value)


def test_one_plan_serves_steps_of_other_positions() -> None:
    """As in a CUDA graph; rows are cut into no piece, some, and as many as there can be."""
    torch.manual_seed(0)
    query, cache = torch.randn(2, 6, 16), torch.randn(200, 2, 4, 2, 16)
    table = torch.randperm(200).to(torch.int32).view(2, 100)
    positions, order = torch.zeros(2, dtype=torch.int64), torch.arange(2)
    rows = kernels.plan_decode(order, positions, order, SHAPE, 5)
    assert rows.pieces >= 3 and 3 * kernels.SHORTEST <= 390
    for steps in ((0, 1), (389, 127), (128, 300), (5, 255)):
        positions.copy_(torch.tensor(steps))
        out = torch.full_like(query, torch.nan)
        kernels.attend_decode(query, cache, table, out, rows, SHAPE)
        for row, position in enumerate(steps):
            assert (out[row] - definition(query[row], cache, table[row], position)).abs().max() < 1e-5
        assert not rows.scratch.arrived.any()


def test_blocks_cover_the_rows_of_several_tokens_and_the_longest_contexts_come_first() -> None:
    starts, lengths = np.array([5, 0, 64, 7]), np.array([9, 1, 4, 8])
    rows, blocks = kernels.list_extend_blocks(starts, lengths, 4)
    assert sorted(zip(rows.tolist(), blocks.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 2), (2, 0), (3, 0), (3, 1)]
    ends = starts[rows] + 4 * blocks
    assert ends.tolist() == sorted(ends.tolist(), reverse=True)


@pytest.mark.parametrize("rows", [1, 7, 64, 256, 1024])
def test_the_scratch_of_a_step_is_bounded(rows: int) -> None:
    pieces, most = kernels.decode_pieces(rows, 8, 264)
    assert 1 <= pieces <= most <= kernels.MOST_PIECES
    assert rows * most <= max(2048, 8 * rows)
    rounds = -(-rows * 8 * pieces // 264) / pieces
    assert rounds <= 1.15 * rows * 8 / 264 or pieces * rows * 8 <= 264, "programs stand idle in the last round"


def test_one_prompt_plan_serves_steps_of_other_rows() -> None:
    """As in a CUDA graph: rows of one token and of several, fewer than there is room for."""
    shape = AttentionShape(layers=1, query_heads=4, kv_heads=2, head_dim=16, scale=0.25)
    backend = TritonAttention(shape, 4, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    cache, table = torch.randn(40, 2, 4, 2, 16), torch.arange(40, dtype=torch.int32).view(4, 10)
    numbers = Mirror(3 * 4 + 1, torch.device("cpu"))
    slots, starts, offsets = numbers.device.split([4, 4, 5])
    ids = torch.zeros(12, dtype=torch.int64)
    nothing = np.empty(0, np.int64)
    batch = Batch(
        ids=ids, positions=ids, places=ids, page_table=table, slots=slots, row_starts=starts, row_offsets=offsets,
        sampled=ids, starts=nothing, lengths=nothing, offsets=nothing, caches=((cache,),),
    )  # fmt: skip
    plan = backend.capture_prompts(batch)
    for rows in ([(2, 7, 5), (0, 30, 1), (1, 0, 3)], [(3, 17, 1)], [(1, 2, 11)]):
        row_slots, row_starts, lengths = (np.array(column) for column in zip(*rows, strict=True))
        ends = np.concatenate(([0], np.cumsum(lengths)))
        host, count = numbers.host(), len(rows)
        host[:], host[:count], host[4 : 4 + count] = 0, row_slots, row_starts
        host[8 : 9 + count], host[9 + count :] = ends, ends[-1]
        numbers.send()
        backend.refill_prompts(plan, row_starts, lengths, ends)
        query = torch.randn(12, 4, 16)
        out = backend.attend(query, cache, plan).view(12, 4, 16)
        for row, (slot, start, length) in enumerate(rows):
            for offset in range(length):
                at = ends[row] + offset
                halves = cache[table[slot].long()].double().transpose(0, 1).flatten(1, 2)[:, : start + offset + 1]
                key, value = halves.repeat_interleave(2, dim=2)
                scores = torch.einsum("hd,khd->hk", query[at].double(), key) * 0.25
                wanted = torch.einsum("hk,khd->hd", scores.softmax(-1), value)
                assert (out[at] - wanted).abs().max() < 1e-5, (rows, row, offset)


def test_pages_are_listed_as_the_reference_lists_them() -> None:
    """Rows of no page, one, a block, and more than all programs take in their first turn."""
    counts = (1, 0, BLOCK, BLOCK * PROGRAMS + 3, 17)
    table = torch.arange(7 * 5000, dtype=torch.int32).view(7, 5000)
    slots, offsets = torch.tensor([3, 0, 6, 1, 3]), torch.tensor((0, *counts)).cumsum(0).to(torch.int32)
    listed, wanted = (torch.full((sum(counts) + 9,), -1, dtype=torch.int32) for _ in range(2))
    list_pages(table, slots, offsets, listed)
    list_pages_reference(table, slots, offsets, wanted)
    assert torch.equal(listed, wanted) and (wanted[-9:] == -1).all() and wanted[1] == 6 * 5000
