"""Triton's attention kernels on a CPU, interpreted. test_interpreted.py runs this in a process of its own, where
TRITON_INTERPRET is set before anything imports triton. float32 only: the interpreter's bfloat16 is not a GPU's.

The hybrid is here too, as its other half is Triton's."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_flashinfer_attention import stand_in
from torch import Tensor

from engine.kernels.attention import decode as decoding
from engine.kernels.attention import extend as extending
from engine.kernels.attention.page_lists import BLOCK, PROGRAMS, list_pages
from engine.kernels.attention.paged import Blocks, PagedShape
from engine.kernels.attention.reference import list_pages as list_pages_reference
from engine.layers import AttentionShape, Batch, Mirror, Prefix
from engine.plugin import kernels as plugin_kernels
from engine.plugin.testing import ATTENTION_CASES, AttentionCase, check_attention
from engine_plugins.attention import hybrid
from engine_plugins.attention.triton.mha import TritonAttention

PIECES = AttentionCase(page_size=16, heads=(2, 1), head_dim=16, rows=((300, 1), (3, 1), (127, 1), (128, 1)))
MIXED = AttentionCase(page_size=3, heads=(7, 1), head_dim=48, rows=((20, 6), (33, 1), (0, 1), (0, 33)), window=21)


@pytest.mark.parametrize(
    "case", [*ATTENTION_CASES[2:5], ATTENTION_CASES[7], *ATTENTION_CASES[9:12], PIECES, MIXED], ids=str
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # lines of the matrix that hold no query
def test_attention_is_that_of_the_definition(case: AttentionCase) -> None:
    check_attention(TritonAttention, case)


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_attention_in_pieces_is_that_of_the_definition(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that begins within a piece, pieces that some or all of a block's queries see nothing of."""
    monkeypatch.setattr(extending, "LEAST_PIECE", 32)
    case = AttentionCase(page_size=3, heads=(7, 1), head_dim=48, rows=((96, 6), (33, 1), (70, 2)), window=window)
    check_attention(TritonAttention, case)


@pytest.mark.parametrize(("least", "window"), [(32, 60), (512, None)])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rows_of_drafts_begin_later_than_the_host_knows(
    least: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device sees more blocks of positions than the tasks were cut for, and their numbers stay right."""
    monkeypatch.setattr(extending, "LEAST_PIECE", least)
    made: list[TritonAttention] = []

    class Behind(TritonAttention):
        def prepare(self, batch: Batch) -> Any:
            made.append(self)
            return super().prepare(dataclasses.replace(batch, starts=np.maximum(batch.starts - 7, 0)))

    rows = ((98, 5), (60, 5), (9, 1), (31, 2))
    check_attention(Behind, AttentionCase(page_size=3, heads=(2, 1), head_dim=16, rows=rows, window=window))
    assert not made[0]._pieces.arrived.any()


SHAPE = PagedShape(query_heads=6, kv_heads=2, head_dim=16, page_size=4, scale=0.25, window=None)


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
    cut = Blocks(queries=16, positions=64, warps=4, stages=1)
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


def test_tasks_cover_the_rows_of_several_tokens_and_those_with_most_to_read_come_first() -> None:
    starts, lengths = np.array([5, 0, 64, 7]), np.array([9, 1, 4, 8])
    tasks = extending.list_extend_tasks(starts, lengths, SHAPE, BLOCKS, teams=8)
    assert sorted(zip(*tasks[:2].tolist(), strict=True)) == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), *LATER]
    spans = np.minimum(starts[tasks[0]] + 2 * tasks[1] + 2, (starts + lengths)[tasks[0]])
    assert tasks[4].tolist() == sorted(tasks[4].tolist(), reverse=True) == (-(-spans // 32) * 32).tolist()
    assert (tasks[[2, 3, 5]].T == (0, 1, 0)).all(), "what is so short is whole"


BLOCKS = Blocks(queries=6, positions=32, warps=4, stages=1)  # of two tokens
LATER = [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (3, 3)]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 40)), min_size=1, max_size=12),
    st.integers(1, 40),
    st.none() | st.integers(1, 9_000),
)
def test_pieces_are_all_of_a_block_and_lie_where_no_other_does(
    rows: list[tuple[int, int]], teams: int, window: int | None
) -> None:
    starts, lengths = np.array(rows).T
    shape = dataclasses.replace(SHAPE, window=window)
    tasks = extending.list_extend_tasks(starts, lengths, shape, BLOCKS, teams)
    by_block: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for row, block, *piece in zip(*tasks.tolist(), strict=True):
        by_block.setdefault((row, block), []).append(tuple(piece))
    assert set(by_block) == {(r, b) for r in range(len(rows)) if lengths[r] > 1 for b in range(-(-lengths[r] // 2))}
    taken = []
    for (row, block), pieces in by_block.items():
        first = int(starts[row]) + 2 * block
        end = min(first + 2, int(starts[row] + lengths[row]))
        span = end - (0 if window is None else max(first + 1 - window, 0) // 32 * 32)
        number, count, each, place = (list(column) for column in zip(*pieces, strict=True))
        assert number == list(range(-(-span // each[0]))) and set(count) == {len(pieces)}
        assert len(set(each)) == 1 and each[0] % 32 == 0
        assert len(pieces) == 1 or each[0] >= extending.LEAST_PIECE
        assert place == list(range(place[0], place[0] + len(place)))
        taken += place if len(place) > 1 else []
    assert sorted(taken) == list(range(len(taken))) and len(taken) <= 2 * teams
    assert tasks[4].tolist() == sorted(tasks[4].tolist(), reverse=True)
    assert tasks.shape[1] <= teams or len(by_block) >= teams
    assert tasks.shape[1] <= extending.most_extend_tasks(int(lengths.sum()), len(rows), 2, teams)


def test_the_few_tokens_behind_a_long_context_are_cut_for_the_whole_device() -> None:
    """In blocks of 32 tokens for 16 teams: 144 behind 8,192 are five blocks, each in three pieces. Beside many blocks a
    long one is cut to a team's share of all, and longer ones where none is much longer are whole."""
    cut = dataclasses.replace(BLOCKS, queries=96, positions=64)
    few = extending.list_extend_tasks(np.array([8192]), np.array([144]), SHAPE, cut, teams=16)
    assert few.shape[1] == 15 and set(few[4]) == {2752, 2816}
    many = extending.list_extend_tasks(np.array([16384, 0]), np.array([32, 640]), SHAPE, cut, teams=16)
    assert many.shape[1] == 20 + 11 and many[4, 0] == 1536
    assert many[0, :11].tolist() == [0] * 11, "the longest come first"
    alike = extending.list_extend_tasks(np.array([8192]), np.array([1024]), SHAPE, cut, teams=16)
    assert alike.shape[1] == 32


@pytest.mark.parametrize("kind", ["triton", "in pieces", "hybrid"])
def test_one_prompt_plan_serves_steps_of_other_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a CUDA graph: rows of one token and of several, fewer than there is room for. With the hybrid, Triton's
    kernel has the leading rows of one token and a stand-in for FlashInfer's FA3 the others."""
    if kind == "in pieces":
        monkeypatch.setattr(extending, "LEAST_PIECE", 4)
        cut = Blocks(queries=8, positions=4, warps=4, stages=1)
        for where in (extending, plugin_kernels):
            monkeypatch.setattr(where, "extend_blocks", lambda *_: cut)
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
    seen, cut_rows = [], 0
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
        host[:4], host[4:8] = 0, 39  # wherever empty rows begin, nothing is done for them
        host[:count], host[4 : 4 + count] = row_slots, row_starts
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
        if kind == "in pieces":
            assert not backend._pieces.arrived.any()
            cut_rows += int((plan.extend.tasks[2] > 0).sum())
    assert cut_rows > 20 if kind == "in pieces" else cut_rows == 0
    alone = [0, 1, 0, 2, 1, 0, 0, 0] if kind == "hybrid" else [1, 1, 0, 2, 2, 0, 1, 1]
    assert seen == alone, "rows of one token"
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
