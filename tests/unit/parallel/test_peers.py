"""Which way a sum over GPUs takes, and what ranks are told of one that was awaited in vain; without a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from engine.errors import EngineError
from engine.kernels.collectives.exchange import Inboxes
from engine.kernels.dense.reference import Ops
from engine.parallel.collectives import Group, all_reduce, sum_add_norm
from engine.parallel.peers import Border, PeerMemory


def inboxes(kind: torch.dtype, rows: int, control: Tensor, failed: Tensor) -> Inboxes:
    boxes = tuple(torch.zeros(2, 1, rows, 8, dtype=kind) for _ in range(2))
    flags = tuple(torch.zeros(2, 1, rows, dtype=torch.int32) for _ in range(2))
    epochs = torch.zeros(rows, dtype=torch.int32)
    return Inboxes(place=0, boxes=boxes, flags=flags, epochs=epochs, control=control, failed=failed)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Of each exchange: by words or not, rows, and whether a norm is behind it. It adds one in the place of a peer."""
    seen: list[Any] = []

    def exchange(self: Inboxes, part: Tensor, stream: Tensor | None = None, *_: Any) -> Tensor:
        seen.append((self.by_words, len(part), stream is not None))
        return part.add_(1.0)

    monkeypatch.setattr(Inboxes, "exchange", exchange)
    return seen


@pytest.fixture
def peers() -> PeerMemory:
    control, failed = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    ways = [inboxes(torch.int64, 4, control, failed), inboxes(torch.int32, 16, control, failed)]
    made = PeerMemory(ways, None)
    made.borders = (Border(2 * 32, 0), Border(8 * 32, 1), Border(12 * 32, None), Border(100 * 32, 1))
    return made


def test_a_sum_goes_the_way_that_was_measured_for_its_size(peers: PeerMemory, told: list[Any]) -> None:
    group = Group((4, 6), 0, peers=peers)
    for rows in (1, 2, 3, 8):
        assert all_reduce(torch.zeros(rows, 8), group).sum() == 8 * rows
    stream, weight = torch.zeros(3, 8), torch.ones(8)
    normed, _ = sum_add_norm(torch.zeros(3, 8), stream, weight, 0.0, group=group, ops=Ops())
    assert normed.sum() == 24
    assert told == [(True, 1, False), (True, 2, False), (False, 3, False), (False, 8, False), (False, 3, True)]


@pytest.mark.parametrize("rows", [9, 17, 200])
def test_others_are_left_to_the_process_group(rows: int, peers: PeerMemory, told: list[Any]) -> None:
    """What NCCL is faster at, what the inboxes have no room for, and what is larger than all that was measured."""
    with pytest.raises(AssertionError, match="have not joined"):
        all_reduce(torch.zeros(rows, 8), Group((4, 6), 0, peers=peers))
    assert not peers.sum_add_norm(torch.zeros(rows, 8), torch.zeros(rows, 8), torch.ones(8), 0.0)
    assert not peers.sum_add_norm(torch.zeros(2, 8), torch.zeros(8, 2).t(), torch.ones(8), 0.0)
    assert not told


def test_before_anything_is_measured_nothing_is_summed(peers: PeerMemory, told: list[Any]) -> None:
    peers.borders = ()
    assert not peers.sum(torch.zeros(1, 8)) and not told


def test_a_rank_that_was_awaited_in_vain_is_named(peers: PeerMemory) -> None:
    peers.check((4, 6))
    peers.ways[0].failed.fill_(2)
    with pytest.raises(EngineError, match="rank 4 waited in vain for rank 6 in a sum over the ranks"):
        peers.check((4, 6))
