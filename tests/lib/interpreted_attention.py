"""Triton's attention kernels on a CPU, interpreted. test_interpreted.py runs this in a process of its own, where
TRITON_INTERPRET is set before anything imports triton. float32 only: the interpreter's bfloat16 is not a GPU's.

The hybrid is here too, as its other half is Triton's."""

import numpy as np
import pytest
import torch
from test_flashinfer_attention import stand_in
from torch import Tensor

from engine.kernels.attention import decode as decoding
from engine.kernels.attention import extend as kernels
from engine.kernels.attention.page_lists import BLOCK, PROGRAMS, list_pages
from engine.kernels.attention.reference import list_pages as list_pages_reference
from engine.layers import AttentionShape, Batch, Mirror, Prefix
from engine.plugin.testing import ATTENTION_CASES, AttentionCase, check_attention
from engine_plugins.attention import hybrid
from engine_plugins.attention.triton import mha
from engine_plugins.attention.triton.mha import TritonAttention

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


@pytest.mark.parametrize("short", [0, 1024])
@pytest.mark.parametrize("teams", [1, 3, 7])
def test_one_plan_serves_steps_of_other_positions(teams: int, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a CUDA graph: rows that one team computes, that begin and end within one, and that many share."""
    torch.manual_seed(0)
    query, cache = torch.randn(3, 6, 16), torch.randn(300, 2, 4, 2, 16)
    table = torch.randperm(300).to(torch.int32).view(3, 100)
    positions, order = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    rows = decoding.plan_decode(order, positions, order, SHAPE, teams)
    monkeypatch.setattr(decoding, "SHORT", decoding.tl.constexpr(short))
    for steps in ((0, 1, 0), (389, 127, 64), (128, -1, 300), (5, 255, 63)):
        positions.copy_(torch.tensor(steps))
        out = torch.full_like(query, torch.nan)
        decoding.attend_decode(query, cache, table, out, rows, SHAPE)
        for row, position in enumerate(steps):
            if position >= 0:
                assert (out[row] - definition(query[row], cache, table[row], position)).abs().max() < 1e-5
        assert not rows.scratch.arrived.any()


def test_rows_that_share_prefixes_attend_to_all_of_them() -> None:
    """Two prefixes, one of them of more rows than a tile takes, rows without one, and steps without any."""
    torch.manual_seed(0)
    tile = decoding.prefix_queries(SHAPE) // SHAPE.group
    count = tile + 6
    table = torch.randperm(count * 100).to(torch.int32).view(count, 100)
    table[1 : tile + 3, :40] = table[1, :40]
    table[tile + 3 : tile + 5, :70] = table[tile + 3, :70]
    query, cache = torch.randn(count, 6, 16), torch.randn(count * 100, 2, 4, 2, 16)
    slots, tokens = torch.arange(count), torch.arange(count - 1, -1, -1)
    positions = torch.randint(160, 170, (count,))
    positions[tile + 3 :] = torch.tensor([280, 331, 9])
    numbers = torch.zeros(decoding.SharedRows.size(count), dtype=torch.int64)
    shared = decoding.SharedRows.of(numbers, count, SHAPE)
    rows = decoding.plan_decode(slots, positions, tokens, SHAPE, 20, shared=shared)
    prefixes = (Prefix(np.arange(1, tile + 3), 160), Prefix(np.arange(tile + 3, tile + 5), 280))
    for found in (prefixes, (), prefixes[1:]):
        listed = decoding.list_shared(found, count, SHAPE, 20)
        numbers[:] = 0
        for part, values in zip(numbers.split([2, 3 * count, count, count]), listed, strict=True):
            part[: len(values)] = torch.from_numpy(values)
        assert [shared.firsts[1], shared.firsts[-2]] == [128 * (len(found) == 2), 256 * (len(found) > 0)]
        out = torch.full_like(query, torch.nan)
        decoding.attend_decode(query, cache, table, out, rows, SHAPE)
        for row in range(count):
            wanted = definition(query[tokens[row]], cache, table[row], int(positions[row]))
            assert (out[tokens[row]] - wanted).abs().max() < 1e-5, row


def test_a_prefix_may_have_fewer_blocks_than_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a step may leave its pieces where one of more rows does."""
    cut = kernels.Blocks(queries=16, positions=64, warps=4, stages=1)
    monkeypatch.setattr(decoding, "prefix_blocks", lambda shape, dtype: cut)
    torch.manual_seed(0)
    table = torch.randperm(300).to(torch.int32).view(3, 100)
    table[:, :32] = table[0, :32]
    query, cache, order = torch.randn(3, 6, 16), torch.randn(300, 2, 4, 2, 16), torch.arange(3)
    prefix, teams = Prefix(np.arange(3), 128), 8
    counts, tiles, members, firsts = decoding.list_shared((prefix,), 3, SHAPE, teams)
    assert counts.tolist() == [1, decoding.PREFIX_PIECES]
    numbers = torch.from_numpy(np.concatenate((counts, tiles, members, firsts)))
    other = decoding.SharedRows.of(torch.zeros(decoding.SharedRows.size(5), dtype=torch.int64), 5, SHAPE)
    shared = decoding.SharedRows.of(numbers, 3, SHAPE, other)
    assert shared.partial is other.partial
    positions = torch.tensor([128, 140, 399])
    out = torch.full_like(query, torch.nan)
    rows = decoding.plan_decode(order, positions, order, SHAPE, teams, shared=shared)
    decoding.attend_decode(query, cache, table, out, rows, SHAPE)
    for row, position in enumerate(positions.tolist()):
        assert (out[row] - definition(query[row], cache, table[row], position)).abs().max() < 1e-5


def test_blocks_cover_the_rows_of_several_tokens_and_the_longest_contexts_come_first() -> None:
    starts, lengths = np.array([5, 0, 64, 7]), np.array([9, 1, 4, 8])
    rows, blocks = kernels.list_extend_blocks(starts, lengths, 4)
    assert sorted(zip(rows.tolist(), blocks.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 2), (2, 0), (3, 0), (3, 1)]
    ends = starts[rows] + 4 * blocks
    assert ends.tolist() == sorted(ends.tolist(), reverse=True)


@pytest.mark.parametrize("kind", ["triton", "few tokens behind many", "hybrid"])
def test_one_prompt_plan_serves_steps_of_other_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a CUDA graph: rows of one token and of several, fewer than there is room for. With the hybrid, Triton's
    kernel has the leading rows of one token and a stand-in for FlashInfer's FA3 the others."""
    if kind == "few tokens behind many":
        monkeypatch.setattr(mha, "LONG", 2)
        monkeypatch.setattr(mha, "FEW_TOKENS", 6)
    shape = AttentionShape(layers=1, query_heads=4, kv_heads=2, head_dim=16, scale=0.25)
    if kind == "hybrid":
        modules = stand_in(monkeypatch)
        monkeypatch.setattr(hybrid.PromptAttention, "fills_device", lambda *_: True)
        monkeypatch.setattr(hybrid, "TRITON_TOKENS", 0)
    backend_class = hybrid.HybridAttention if kind == "hybrid" else TritonAttention
    backend = backend_class(shape, 4, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    cache, table = torch.randn(40, 2, 4, 2, 16), torch.arange(40, dtype=torch.int32).view(4, 10)
    numbers = Mirror(3 * 4 + 1, torch.device("cpu"))
    slots, starts, offsets = numbers.device.split([4, 4, 5])
    ids = torch.zeros(12, dtype=torch.int64)
    nothing = np.empty(0, np.int64)
    batch = Batch(
        ids=ids, positions=ids, places=ids, page_table=table, slots=slots, row_starts=starts, row_offsets=offsets,
        starts=nothing, lengths=nothing, offsets=nothing, caches=((cache,),),
    )  # fmt: skip
    plan = backend.capture_prompts(batch)
    backend.refill_prompts(plan, nothing, nothing, np.zeros(1, np.int64))
    seen = []
    for rows in (
        [(2, 7, 5), (0, 30, 1), (1, 0, 3)],
        [(3, 17, 1)],
        [(1, 2, 11)],
        [(3, 12, 1), (0, 39, 1), (2, 20, 9)],
        [(0, 1, 1), (1, 3, 6), (2, 0, 1)],
        [(3, 33, 3)],
        [(1, 35, 2), (2, 20, 1)],
        [(1, 35, 3), (2, 20, 1)],
    ):
        row_slots, row_starts, lengths = (np.array(column) for column in zip(*rows, strict=True))
        ends = np.concatenate(([0], np.cumsum(lengths)))
        host, count = numbers.host(), len(rows)
        host[:], host[:count], host[4 : 4 + count] = 0, row_slots, row_starts
        host[8 : 9 + count], host[9 + count :] = ends, ends[-1]
        numbers.send()
        backend.refill_prompts(plan, row_starts, lengths, ends)
        decode = plan.decode.decode if kind == "hybrid" else plan.decode
        seen.append(int((decode.positions >= 0).sum()))
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
    cut = {
        "triton": [1, 1, 0, 2, 2, 0, 1, 1],
        "few tokens behind many": [1, 1, 0, 2, 2, 3, 3, 1],  # the last step has more than there are rows
        "hybrid": [0, 1, 0, 2, 1, 0, 0, 0],
    }
    assert seen == cut[kind], "tokens that are rows of their own"
    if kind == "hybrid":
        ones = [int((terms["queries"].diff() > 0).sum()) for terms in modules["fa3"].plans]
        assert ones == [0, 3, 0, 1, 1, 2, 1, 2, 2], "rows that are FA3's"
        assert all(terms["captured"] and terms["most"] == 12 for terms in modules["fa3"].plans)


def test_pages_are_listed_as_the_reference_lists_them() -> None:
    """Rows of no page, one, a block, and more than all programs take in their first turn."""
    counts = (1, 0, BLOCK, BLOCK * PROGRAMS + 3, 17)
    table = torch.arange(7 * 5000, dtype=torch.int32).view(7, 5000)
    slots, offsets = torch.tensor([3, 0, 6, 1, 3]), torch.tensor((0, *counts)).cumsum(0).to(torch.int32)
    listed, wanted = (torch.full((sum(counts) + 9,), -1, dtype=torch.int32) for _ in range(2))
    list_pages(table, slots, offsets, listed)
    list_pages_reference(table, slots, offsets, wanted)
    assert torch.equal(listed, wanted) and (wanted[-9:] == -1).all() and wanted[1] == 6 * 5000
