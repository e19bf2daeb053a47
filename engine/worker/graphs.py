"""Decode steps as CUDA graphs: one for each row count of a ladder, replayed with other numbers.

A graph reads `inputs` [2, rows] (each row's slot and position) from one place, gathers ids and places from the worker's
tables itself, and ends with the hidden states, so a step costs the host one copy and one launch:

    host numbers ── pinned ──> inputs ══ graph: gather ids, places ─ model ─ hidden [rows, H] ══> head, sampler

A step of fewer rows than its graph is padded with rows of the scratch slot: position 0, whose keys and values go to the
scratch page. The graphs share one memory pool, as only one of them runs at a time. Left out: steps with prompts.
"""

import bisect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.layers.batch import Batch
from engine.layers.model import Model
from engine.worker.kv import Caches

AHEAD = 4  # host buffers: a step's copy is over before its buffer comes round again, as fewer steps are in flight
NOTHING = np.empty(0, np.int64)


def ladder(most: int) -> list[int]:
    """Row counts that get a graph: small ones each, larger ones in steps that waste little; `most` is the last."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 4097, 64)]
    return [step for step in steps if step < most] + [most]


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    """A captured step of `rows` rows."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor  # [2, rows] int64: slots, positions
    plans: tuple[Any, ...]
    hidden: Tensor  # [rows, H]


class DecodeGraphs:
    """The graphs of one model over the worker's tables; `captured` with all of a ladder, or none where not possible.

    `tokens` and `page_table` are the Runner's; their last line is the scratch slot's.
    """

    def __init__(self, model: Model, caches: Caches, tokens: Tensor, page_table: Tensor, page_size: int) -> None:
        self._model = model
        self._caches = caches
        self._tokens = tokens
        self._page_table = page_table
        self._page_size = page_size
        self._graphs: dict[int, DecodeGraph] = {}
        self._sizes: list[int] = []
        self._hosts: list[Tensor] = []
        self._turn = 0

    @torch.inference_mode()
    def capture(self, most: int) -> bool:
        """Captures the ladder up to `most` rows. False when an attention backend's steps cannot be captured."""
        pool = torch.cuda.graph_pool_handle()
        sizes = ladder(most)
        for size in reversed(sizes):  # the largest first: the others fit into its memory
            graph = self._captured(size, pool)
            if graph is None:
                return False
            self._graphs[size] = graph
        self._sizes = sizes
        self._hosts = [torch.empty(2, most, dtype=torch.int64, pin_memory=True) for _ in range(AHEAD)]
        return True

    def _captured(self, size: int, pool: Any) -> DecodeGraph | None:
        device = self._tokens.device
        inputs = torch.zeros(2, size, dtype=torch.int64, device=device)
        inputs[0] = len(self._tokens) - 1
        plans = tuple(backend.capture(self._batch(inputs)) for backend in self._model.backends)
        if not plans or any(plan is None for plan in plans):
            return None
        starts = np.zeros(size, np.int64)
        for backend, plan in zip(self._model.backends, plans, strict=True):
            backend.refill(plan, starts)
        self._model(self._batch(inputs, plans))  # compiles and loads what a capture cannot
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            hidden = self._model(self._batch(inputs, plans))
        return DecodeGraph(graph, inputs, plans, hidden)

    def _batch(self, inputs: Tensor, plans: tuple[Any, ...] = ()) -> Batch:
        """The step that `inputs` say. Its host arrays are empty: they would not hold at the next replay."""
        slots, positions = inputs.unbind(0)
        size = len(slots)
        page = self._page_table[slots, positions // self._page_size].to(torch.int64)
        rows = torch.arange(size + 1, device=slots.device)
        return Batch(
            ids=self._tokens[slots, positions].to(torch.int64),
            positions=positions,
            places=page * self._page_size + positions % self._page_size,
            page_table=self._page_table,
            slots=slots,
            row_starts=positions,
            row_offsets=rows,
            sampled=rows[:-1],
            starts=NOTHING,
            lengths=NOTHING,
            offsets=NOTHING,
            caches=self._caches,
            plans=plans,
        )

    def fits(self, rows: int) -> bool:
        """Whether a step of so many decode rows has a graph."""
        return bool(self._sizes) and rows <= self._sizes[-1]

    def replay(self, slots: np.ndarray, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Runs a decode step. Row r computes position `starts[r]` of `slots[r]`, both [R] int64.

        Returns hidden states [R, H] and the device's copy of both arguments [2, R], good until the next replay.
        """
        count = len(slots)
        graph = self._graphs[self._sizes[bisect.bisect_left(self._sizes, count)]]
        size = graph.inputs.shape[1]
        self._turn = (self._turn + 1) % AHEAD
        host = self._hosts[self._turn].view(-1)[: 2 * size].view(2, size)
        numbers = host.numpy()
        numbers[0, count:], numbers[1, count:] = len(self._tokens) - 1, 0
        numbers[0, :count], numbers[1, :count] = slots, starts
        graph.inputs.copy_(host, non_blocking=True)
        for backend, plan in zip(self._model.backends, graph.plans, strict=True):
            backend.refill(plan, numbers[1])
        graph.graph.replay()
        return graph.hidden[:count], graph.inputs[:, :count]
