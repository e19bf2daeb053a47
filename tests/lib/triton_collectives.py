"""The exchange kernel against its definition, interpreted on a CPU: the "ranks" are tensors of one process, which send
first and take then (test_interpreted.py runs this in a process of its own)."""

import numpy as np
import pytest
import torch

from engine.kernels.collectives.draw import best_of_chunks, choose_over_ranks
from engine.kernels.collectives.exchange import Inboxes
from engine.kernels.collectives.reference import sum_add_norm, sum_parts
from engine.kernels.logits.draw import draw
from engine.kernels.logits.reference import pack_ids

ROWS, SIZE = 5, 12
DTYPES = [torch.float32, torch.float16]  # the interpreter's bfloat16 is not right


def inboxes(ranks: int, by_words: bool, rows: int = ROWS, words: int = SIZE, looks: int = 3) -> list[Inboxes]:
    shape = (2, ranks - 1, rows, words)
    kind = torch.int64 if by_words else torch.int32
    boxes = tuple(torch.zeros(shape, dtype=kind) for _ in range(ranks))
    flags = tuple(torch.zeros(shape[:3], dtype=torch.int32) for _ in range(ranks))
    return [
        Inboxes(
            place=place,
            boxes=boxes,
            flags=flags,
            epochs=torch.zeros(rows, dtype=torch.int32),
            control=torch.full((1,), looks, dtype=torch.int32),
            failed=torch.zeros(1, dtype=torch.int32),
        )
        for place in range(ranks)
    ]


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exchanged(ours: list[Inboxes], parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """What each rank has as the sum of `parts`."""
    mine = [part.clone() for part in parts]
    for own, part in zip(ours, mine, strict=True):
        own.exchange(part, takes=False)
    for own, part in zip(ours, mine, strict=True):
        own.exchange(part, sends=False)
    return mine


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_words", [True, False], ids=["words", "rows"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_get_the_sum_its_stream_and_its_norm(ranks: int, by_words: bool, dtype: torch.dtype) -> None:
    """In several exchanges of other sizes and row counts, so that inboxes hold what came before."""
    ours = inboxes(ranks, by_words)
    for turn, (rows, size) in enumerate([(5, 12), (2, 12), (5, 8), (3, 12), (5, 12)]):
        parts = [random(rows, size, dtype=dtype, seed=10 * turn + rank) for rank in range(ranks)]
        stream, weight = random(rows, size, dtype=dtype, seed=90 + turn), random(size, dtype=dtype, seed=80)
        wanted = sum_add_norm(parts, stream, weight, 1e-6)
        mine = [(part.clone(), stream.clone()) for part in parts]
        assert all(own.takes(part) for own, part in zip(ours, parts, strict=True))
        for own, (part, _) in zip(ours, mine, strict=True):
            own.exchange(part, takes=False)
        for own, (part, old) in zip(ours, mine, strict=True):
            own.exchange(part, old, weight, 1e-6, sends=False)
        for own, (part, old) in zip(ours, mine, strict=True):
            assert own.failed.item() == 0
            assert torch.equal(old, wanted[1])
            torch.testing.assert_close(part, wanted[0], atol=2e-3 if dtype == torch.float16 else 1e-5, rtol=1e-3)
            assert torch.equal(part, mine[0][0])  # bit for bit
            assert own.epochs.tolist() == ours[0].epochs.tolist()


@pytest.mark.parametrize("by_words", [True, False], ids=["words", "rows"])
def test_a_plain_sum(by_words: bool) -> None:
    ours = inboxes(2, by_words)
    parts = [random(4, 10, dtype=torch.float16, seed=seed) for seed in (0, 1)]
    mine = exchanged(ours, parts)
    assert torch.equal(mine[0], sum_parts(parts)) and torch.equal(mine[1], mine[0])


@pytest.mark.parametrize("by_words", [True, False], ids=["words", "rows"])
def test_what_never_comes_is_given_up_and_named(by_words: bool) -> None:
    ours = inboxes(3, by_words)
    part = random(2, 12, dtype=torch.float32, seed=0)
    ours[1].exchange(part.clone(), takes=False)
    ours[0].exchange(part.clone())
    assert ours[0].failed.item() == 3 and ours[0].control.item() == 0  # rank 2's part is missing
    assert ours[1].failed.item() == 0


def test_numbers_of_exchanges_wrap_around() -> None:
    ours = inboxes(2, True)
    for own in ours:
        own.epochs.fill_(2**31 - 2)
    for turn in range(4):
        parts = [random(2, 12, dtype=torch.float32, seed=10 * turn + rank) for rank in range(2)]
        mine = exchanged(ours, parts)
        assert torch.equal(mine[0], sum_parts(parts)) and torch.equal(mine[1], mine[0])
    assert ours[0].failed.item() == 0 and ours[0].epochs[0].item() == -(2**31) + 2


def test_what_does_not_fit_is_not_taken() -> None:
    (own, _) = inboxes(2, True)
    assert own.takes(torch.zeros(5, 12)) and own.takes(torch.zeros(1, 24, dtype=torch.bfloat16))
    others = (torch.zeros(6, 12), torch.zeros(5, 13), torch.zeros(0, 12), torch.zeros(5, 12, dtype=torch.int32))
    assert not any(own.takes(each) for each in (*others, torch.zeros(12, 5).t(), torch.zeros(12)))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_drawn_over_ranks_are_those_of_one(masked: bool, ranks: int) -> None:
    rows, size, part = 4, 9001, 4512 if ranks == 2 else 3008  # whole words of masks, more than one chunk
    logits = 3 * random(rows, size, dtype=torch.float32, seed=0)
    logits[0, 4600] = logits[0, 77] = logits[1, 5000] = logits[1, 8000] = 60.0  # equals: the lower id, of any rank
    slots, temperatures = torch.tensor([2, 0, 3, 1]), torch.tensor([0.0, 0.7, 0.0, 1.3])
    lasts, seeds = torch.tensor([5, 0, 9, 2]), torch.arange(rows) * 0x123456789ABCDEF
    some = np.flatnonzero(np.random.default_rng(0).integers(0, 2, size))
    table = torch.from_numpy(np.stack([pack_ids(ids, size) for ids in (some, np.arange(size), np.array([8500]))]))
    masks = (table, torch.tensor([1, 0, 2, 0])) if masked else None
    tokens, lengths = (
        torch.zeros(ranks + 1, rows, 12, dtype=torch.int32),
        torch.zeros(ranks + 1, rows, dtype=torch.int64),
    )
    wanted = draw(logits, slots, lasts, temperatures, seeds, tokens[-1], lengths[-1], masks=masks)
    assert wanted[0] == 77 and (not masked or wanted[2] == 8500)
    ours, found = inboxes(ranks, True), []
    for rank in range(ranks):
        own = slice(rank * part, min(size, (rank + 1) * part))
        mine = None if masks is None else (table[:, own.start // 32 : -(-own.stop // 32)], masks[1])
        found.append(best_of_chunks(logits[:, own], slots, lasts, temperatures, seeds, own.start, mine))
    for stage in ({"takes": False}, {"sends": False}):
        got = [
            choose_over_ranks(own, best, slots, lasts, tokens[rank], lengths[rank], **stage)
            for rank, (own, best) in enumerate(zip(ours, found, strict=True))
        ]
    assert all(torch.equal(each, wanted) for each in got)
    assert all(torch.equal(each, tokens[-1]) for each in tokens) and all(
        torch.equal(each, lengths[-1]) for each in lengths
    )
