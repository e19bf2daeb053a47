"""When experts move, and at which step a layer's new arrangement is used; nothing travels, as there are no ranks."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from engine.errors import RequestError
from engine.layers.model import Model
from engine.options.parallel import ParallelOptions
from engine.parallel.collectives import Group
from engine.parallel.placement import Placement, first_placement
from engine.worker import experts, rebalance
from engine.worker.experts import ExpertWatch
from engine.worker.rebalance import Rebalancer

EVEN, HOT = [10] * 8, [80, 70, 60, 50, 1, 1, 1, 1]


class Layer:
    """Eight experts on two ranks."""

    path = "mlp.experts"
    everywhere = None

    def __init__(self) -> None:
        self.placement = first_placement(8, 2)
        self.build = SimpleNamespace(mesh=SimpleNamespace(ep=2), device=torch.device("cpu"))

    def place(self, placement: Placement) -> None:
        self.placement = placement

    def stored(self) -> list[None]:
        return [None]


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(rebalance, "transfer", lambda layer, moves: ([], []))
    return [Layer(), Layer(), Layer()]


def options(**terms: Any) -> ParallelOptions:
    return ParallelOptions(**{"ep": 2, "tp": 2, "rebalance_threshold": 1.5, "rebalance_tokens": 100, **terms})


def counts(*lines: list[int]) -> np.ndarray:
    return np.array(lines, np.int64)


def test_layers_move_one_after_the_other(layers: list[Any]) -> None:
    """Each is used two steps after its weights have left; a step looks at one, and one that would gain
    little stays."""
    moving, first = Rebalancer(layers, options()), first_placement(8, 2)
    moving.observe(counts(HOT, EVEN, HOT), 100)
    assert moving.waiting == 3
    said = []
    for _ in range(7):
        moving.step()
        said.append([not np.array_equal(layer.placement, first) for layer in layers])
    yes, no = True, False
    assert said == [[no] * 3, [no] * 3, *[[yes, no, no]] * 3, *[[yes, no, yes]] * 2]
    assert moving.moved == 2 and moving.waiting == 0
    assert sorted(layers[0].placement.ravel().tolist()) == list(range(8))


@pytest.mark.parametrize(
    ("lines", "tokens", "terms", "moves"),
    [
        ((HOT, HOT, HOT), 99, {}, False),  # too few tokens
        ((HOT, HOT, HOT), 100, {}, True),
        ((EVEN, EVEN, EVEN), 1000, {}, False),
        ((HOT, HOT, HOT), 100, {"rebalance_threshold": 2.0}, False),  # they have 1.97 times the mean
        ((HOT, HOT, HOT), 100, {"rebalance_threshold": None}, False),
        ((HOT, HOT, HOT), 100, {"rebalance_threshold": None, "redundant_experts": 2}, True),
    ],
)
def test_when_experts_move(
    layers: list[Any], lines: tuple[list[int], ...], tokens: int, terms: dict[str, Any], moves: bool
) -> None:
    moving = Rebalancer(layers, options(**terms))
    moving.observe(counts(*lines), tokens)
    assert bool(moving.waiting) is moves


def test_windows_add_up_until_there_are_enough_tokens(layers: list[Any]) -> None:
    moving = Rebalancer(layers, options())
    for _ in range(3):
        moving.observe(counts(HOT, HOT, HOT), 30)
        assert not moving.waiting
    moving.observe(counts(HOT, HOT, HOT), 30)
    assert moving.waiting == 3
    moving.observe(counts(EVEN, EVEN, EVEN), 1000)
    assert moving.waiting == 3, "what comes meanwhile is not looked at"


def test_what_was_even_is_forgotten(layers: list[Any]) -> None:
    moving = Rebalancer(layers, options())
    moving.observe(counts(EVEN, EVEN, EVEN) * 100, 100)
    moving.observe(counts(HOT, HOT, HOT), 100)
    assert moving.waiting == 3


def test_no_stage_moves_where_another_one_still_does(layers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    routers = {
        f"layers.{number}.mlp.gate": SimpleNamespace(
            routing=SimpleNamespace(experts=8, top_k=1), counts=torch.zeros(8, dtype=torch.int64)
        )
        for number in range(3)
    }
    for layer in layers:
        layer.group = Group((0,), 0)
    monkeypatch.setattr(experts, "routers_of", lambda model: routers)
    monkeypatch.setattr(experts, "experts_of", lambda model: layers)
    other = ["a rebalance is under way: 2 layers are still to be rearranged; ask later"]
    watch = ExpertWatch(cast("Model", None), lambda own: [own, (other[0], 2)], options())
    for router in routers.values():
        router.counts += torch.tensor(HOT)
    with pytest.raises(RequestError, match="under way: 2 layers"):
        watch.rebalance()
    assert not watch.rebalancer.waiting
    other[0] = ""
    assert watch.rebalance() == 3 + 2 and watch.rebalancer.waiting == 3
