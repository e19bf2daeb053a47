"""How often each expert is chosen, where experts lie, and how that changes.

    steps  ──────────────|────────────────|────────────────|───>
    counts  always, on the device         read, and looked at a few steps later: a window
                                                           └─> loads of ranks, balance, drift

Routers count on the device, in tensors of their own, at the addresses that CUDA graphs know. At the end of each window
of steps the counts are copied to the host behind the step before, and looked at once that is over: no step waits. What
was counted between a start and a stop, or by now, is a reading that waits for the steps launched before. Left out: what
is done about ranks that are busier than others (rebalance.py).
"""

import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import RequestError
from engine.layers.model import Model
from engine.layers.moe import Experts, Router, SparseMLP
from engine.messages.questions import CountAction, ExpertCounts, ExpertMap, ExpertWindow
from engine.messages.step import STEPS_IN_FLIGHT
from engine.options.parallel import ParallelOptions
from engine.parallel.collectives import Group, all_reduce, broadcast
from engine.parallel.placement import Placement, imbalance, rank_loads
from engine.worker.rebalance import Rebalancer

NONE = "the model has no experts to choose from; ask a server with a mixture of experts"
WINDOW = 256  # steps
KEPT = 120  # windows that are remembered
Counts = NDArray[np.int64]  # [layers, experts]
Gathered = Callable[[object], list[Any]]  # makes a list of what each stage of a pipeline gives


def routers_of(model: Model) -> dict[str, Router]:
    """By their paths, in order."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, Router)}


def experts_of(model: Model) -> list[Experts]:
    """Those of the model's routers, in their order."""
    found = {layer.gate: layer.experts for layer in model.modules() if isinstance(layer, SparseMLP)}
    return [found[router] for router in routers_of(model).values() if router in found]


def alone(own: object) -> list[Any]:
    """What each stage gives, where there is one."""
    return [own]


def layer_numbers(paths: Iterable[str]) -> tuple[int, ...]:
    """The number in each path, as in model.layers.3.mlp.gate; or which router of the model it is."""
    found = [re.search(r"\.(\d+)\.", path) for path in paths]
    return tuple(index if match is None else int(match[1]) for index, match in enumerate(found))


@dataclass(frozen=True, slots=True)
class Reading:
    """Counts on their way to the host, as they stood after `step` steps."""

    step: int
    counts: Tensor  # [layers, experts], pinned where they come from a GPU
    copied: torch.cuda.Event | None

    def wait(self) -> Counts:
        if self.copied is not None:
            self.copied.synchronize()
        numbers: Counts = self.counts.numpy()
        return numbers


@torch.inference_mode()
def read(routers: Iterable[Router], step: int, group: Group | None = None, *, parts: bool = False) -> Reading:
    """Begins to copy what `routers` have counted, behind what the device has been told to do; with a `group`, what
    those of its first rank have, or what all of its ranks have together, where each counts `parts`."""
    counts = torch.stack([router.counts for router in routers])
    if group is not None:
        all_reduce(counts, group) if parts else broadcast(counts, group)
    if counts.device.type == "cpu":
        return Reading(step, counts, None)
    host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True).copy_(counts, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return Reading(step, host, copied)


def drift(before: Counts, now: Counts) -> float:
    """The total variation distance of the two distributions of each layer, in the mean over layers: 0 to 1."""
    shares = [counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) for counts in (before, now)]
    return float(np.abs(shares[0] - shares[1]).sum(axis=1).mean()) / 2


def balance(counts: Counts, placements: Iterable[Placement]) -> float:
    """The largest load of a rank over the mean one, in the mean over layers."""
    pairs = zip(counts, placements, strict=True)
    return float(np.mean([imbalance(rank_loads(line, placement)) for line, placement in pairs]))


class ExpertWatch:
    """What this rank knows of the experts of its layers, from now on: what steps of warming up chose is forgotten."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Model,
        gathered: Gathered = alone,
        parallel: ParallelOptions = ParallelOptions(),  # noqa: B008
        window: int = WINDOW,
    ) -> None:
        self._routers = routers_of(model)
        self._experts = experts_of(model)
        self._gathered = gathered
        self._group = self._experts[0].group if self._experts else None
        self._parts = any(layer.everywhere is not None for layer in self._experts)  # a rank counts its own tokens
        self.rebalancer = Rebalancer(self._experts, parallel)
        self._window = window
        self._steps = 0
        self._reading: Reading | None = None
        count = next((router.routing.experts for router in self._routers.values()), 0)
        self._choices = sum(router.routing.top_k for router in self._routers.values())  # of a token
        self._last: Counts = np.zeros((len(self._routers), count), np.int64)  # at the end of the last window
        self._before: Counts | None = None  # what the last window counted
        self._windows: deque[ExpertWindow] = deque(maxlen=KEPT)
        self._arranged = np.zeros_like(self._last)  # counts at the last rebalance that was asked for
        self._began: Counts | None = None
        self._ended: Counts | None = None
        for router in self._routers.values():
            router.counts.zero_()

    def step(self) -> None:
        """Called before each step is launched: on all ranks of a stage at the same one."""
        if not self._routers:
            return
        if self._reading is not None and self._steps - self._reading.step >= STEPS_IN_FLIGHT:
            self._close(self._reading)
            self._reading = None
        if self._steps and self._steps % self._window == 0:
            self._reading = self._read()
        self._steps += 1
        self.rebalancer.step()

    def _read(self) -> Reading:
        """Where experts lie on several ranks, all read the same, and so decide alike."""
        group = self._group if self.rebalancer.divided else None
        return read(self._routers.values(), self._steps, group, parts=self._parts)

    def _now(self) -> Counts:
        """What has been chosen so far. Where each rank counts its own tokens, all must ask at once."""
        return (self._read() if self._parts else read(self._routers.values(), self._steps)).wait()

    def _close(self, reading: Reading) -> None:
        """The window that ended with `reading` becomes a figure of the past."""
        counts = reading.wait()
        new, self._last = counts - self._last, counts
        if total := int(new.sum()):
            moved = 0.0 if self._before is None else drift(self._before, new)
            even = balance(new, self._placements()) if self._experts else 1.0
            self._windows.append(ExpertWindow(reading.step, total, even, moved))
            self._before = new
            if self._experts:
                self.rebalancer.observe(new, total / self._choices)

    def _placements(self) -> list[Placement]:
        return [layer.placement for layer in self._experts]

    # ── what is asked ────────────────────────────────────────────────────────────────────────

    @torch.inference_mode()
    def count(self, action: CountAction) -> ExpertCounts:
        """Does `action`, and tells the counts of all stages. Raises RequestError for a model without experts."""
        stages = self._of_stages(self._counted(action) if self._routers else None)
        layers = tuple(layer for _, own, _ in stages for layer in own)
        return ExpertCounts(stages[0][0], layers, b"".join(counts for _, _, counts in stages))

    def _counted(self, action: CountAction) -> tuple[bool, tuple[int, ...], bytes]:
        """Whether this stage counts, its layers, and their counts between a start and a stop."""
        now = self._now()
        if action == "start":
            self._began, self._ended = now, None
        elif action == "stop" and self._ended is None:
            self._ended = now
        end = now if self._ended is None else self._ended
        since = np.zeros_like(now) if self._began is None else end - self._began
        counting = self._began is not None and self._ended is None
        return counting, layer_numbers(self._routers), since.astype("<i8").tobytes()

    @torch.inference_mode()
    def look(self, *, now: bool = True) -> ExpertMap:
        """Where the experts of all stages lie and how busy they are. Raises RequestError as `count`."""
        return joined(self._of_stages(self._map(now=now) if self._experts else None))

    def _map(self, *, now: bool) -> ExpertMap:
        counts = self._now() if now else self._last
        placements = np.stack(self._placements())
        loads = [rank_loads(line, placement) for line, placement in zip(counts, placements, strict=True)]
        return ExpertMap(
            layer_numbers(self._routers),
            placements.shape[1],
            placements.astype("<i4").tobytes(),
            counts.astype("<i8").tobytes(),
            np.stack(loads).astype("<f8").tobytes(),
            tuple(self._windows),
            self.rebalancer.moved,
            self.rebalancer.waiting,
        )

    def rebalance(self) -> int:
        """Has all layers of all stages arranged for what was chosen since this was last asked for, or since the start:
        how many layers. They move with the next steps. Raises RequestError, and moves nothing on any stage, where one
        has nothing to do or a rebalance is under way on it."""
        now = self._read().wait() if self.rebalancer.divided else self._arranged
        stages = self._of_stages((self._refusal(now), len(self._experts)) if self._experts else None)
        if cause := next((cause for cause, _ in stages if cause), ""):
            raise RequestError(cause)
        if self._experts:
            self.rebalancer.begin(now - self._arranged)
            self._arranged = now
        return sum(layers for _, layers in stages)

    def _refusal(self, now: Counts) -> str:
        """Why the experts of this stage cannot be rearranged, of which `now` has been counted; empty where they can."""
        if not self.rebalancer.divided:
            return "all experts lie on one group of devices; start the server with --ep 2 or more"
        if self.rebalancer.waiting:
            return f"a rebalance is under way: {self.rebalancer.waiting} layers are still to be rearranged; ask later"
        if not (now - self._arranged).any():
            return "no token has chosen an expert since, so nothing is known of their loads; ask later"
        return ""

    def _of_stages(self, own: Any) -> list[Any]:
        found = [each for each in self._gathered(own) if each is not None]
        if not found:
            raise RequestError(NONE)
        return found


def joined(stages: list[ExpertMap]) -> ExpertMap:
    """One map of all stages. They have windows of the same steps: those that all have are put together, weighed by
    their layers."""
    if len(stages) == 1:
        return stages[0]
    weights = [len(stage.layers) for stage in stages]
    windows = []
    shared = min(len(stage.windows) for stage in stages)
    for same in zip(*(stage.windows[len(stage.windows) - shared :] for stage in stages), strict=True):
        even, moved = (
            float(np.average([getattr(window, name) for window in same], weights=weights))
            for name in ("balance", "drift")
        )
        windows.append(ExpertWindow(same[0].step, sum(window.choices for window in same), even, moved))
    return ExpertMap(
        layers=tuple(layer for stage in stages for layer in stage.layers),
        ranks=stages[0].ranks,
        placement=b"".join(stage.placement for stage in stages),
        counts=b"".join(stage.counts for stage in stages),
        loads=b"".join(stage.loads for stage in stages),
        windows=tuple(windows),
        moved=sum(stage.moved for stage in stages),
        waiting=sum(stage.waiting for stage in stages),
    )
