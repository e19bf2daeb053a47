"""Steps as CUDA graphs: one for each size of a ladder, replayed with other numbers, so that the host costs a copy and
a launch where kernels launched one by one would cost hundreds.

    host numbers ── pinned ──> Mirror ══ graph: gather ids, places ─ model ─ hidden ══╦═ graph: head, draw ══> tokens
                                                                                      ╚══> head, what rows ask for, draw

A graph reads slots and positions from one place and gathers the rest from the worker's tables itself. It ends with the
hidden states. A decode step has others for what follows where no row asks for more than a temperature, one without and
one with the masks of grammars, and so costs the host two launches. Missing rows and tokens are those of the scratch
slot, whose keys and values go to the scratch page, and whose states are its own. All graphs share one memory pool, as
only one of them runs at a time.

Where attention runs in copies, all ranks replay the graph of the same size, which fits the copy with the most. What
they exchange has that size, and the counts of all copies are among the numbers.

`DecodeGraphs` are for steps of one token a row; `PromptGraphs` for steps with prompts whose kernels would take longer
to launch than to run: a thousand tokens of any model, and more of a small one. What a prompt shows is put in place
before the replay: embeddings in lines, one a token, which all graphs share, and a mark at those that count. Left out:
larger prompts, spans whose tokens see each other, and what copies of attention show.
"""

import bisect
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.layers.attention import Prefix
from engine.layers.batch import NO_STATES, Batch, CapturedMedia, Mirror, Spread, upload
from engine.layers.model import Model
from engine.worker.memory import Caches
from engine.worker.steps.prefixes import LEAST_ROWS
from engine.worker.steps.rows import Rows
from engine.worker.steps.shown import NOTHING_SHOWN, Shown
from engine.worker.weights import weight_bytes

NOTHING = np.empty(0, np.int64)
FEW_ROWS = 64  # steps with prompts of fewer rows than that have a finer ladder of tokens
FEW_ROWS_TOKENS = (32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
ALL_ROWS_TOKENS = (256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192)
SMALL_PROMPTS = 1024  # up to so many tokens steps with prompts have graphs in any model
# Tokens times the bytes of a layer's weights, up to which kernels take less time than their launches: an H200 computes
# 8,192 tokens of Qwen3-0.6B, 43 MB a layer, in 14 ms, and a slow core launches them in 23.
WORK_TO_LAUNCH = 4e11


def ladder(most: int) -> list[int]:
    """Row counts that get a graph: small ones each, larger ones in steps that waste little; `most` is the last."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 4097, 64)]
    return [step for step in steps if step < most] + [most]


def shared_ladder(most: int) -> list[int]:
    """Row counts that get a graph for steps with shared prefixes: fewer, as what is saved there is large."""
    return sorted({min(size, most) for size in (LEAST_ROWS, 2 * LEAST_ROWS, *range(64, most + 64, 64))})


@dataclass(frozen=True, slots=True)
class Tables:
    """What graphs are captured over. The last lines of `tokens` and `page_table` are the scratch slot's."""

    model: Model
    caches: Caches
    tokens: Tensor  # [slots + 1, positions] int32
    page_table: Tensor  # [slots + 1, P] int32
    page_size: int
    counts_real: bool = False  # whether a step says how many of its tokens are no padding
    # From hidden states [R, H], slots and positions [2, R], and lines of masks [R] or None, to tokens [R], where this
    # can be captured; and whether there are masks.
    draw: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    masks: bool = False
    states: Mapping[str, tuple[Tensor, ...]] = field(default_factory=lambda: NO_STATES)
    enters: bool = False  # whether hidden states come from the stage before
    copies: int = 0  # of attention, where there are several: a step ends with the tokens of each
    shifts: Tensor | None = None  # [slots + 1] int64: by how much rotary embedding shifts the tokens of a slot
    shown_size: int = 0  # numbers of an embedding of what prompts show, with all its levels; 0 where none come in

    def entering(self, size: int) -> Tensor | None:
        """Where the hidden states of a step of `size` tokens will come in, [size, H]; None where it embeds them."""
        if not self.enters:
            return None
        return torch.zeros(size, self.model.width, dtype=self.model.dtype, device=self.tokens.device)

    @property
    def scratch(self) -> int:
        return len(self.tokens) - 1

    def captures(self, plans: tuple[Any, ...]) -> bool:
        """Whether steps with these `plans` of the attention backends can be captured. What recurrent layers do can be,
        by their contract; of a model that has neither it is not known."""
        return all(plan is not None for plan in plans) and bool(plans or self.states)

    def batch(
        self,
        token_slots: Tensor,
        positions: Tensor,
        slots: Tensor,
        starts: Tensor,
        offsets: Tensor,
        plans: Any,
        counts: Tensor | None = None,
        shifts: Tensor | None = None,
    ) -> Batch:
        """A step of T tokens, in R rows, and of `counts` [copies] in all copies. Rotary embedding shifts its tokens by
        `shifts` [3, T], or as their slots say. Its host arrays are empty: they would not hold at the next replay."""
        spread = Spread.captured(counts, len(token_slots)) if self.copies and counts is not None else None
        real = None
        if self.counts_real:
            real = (counts if spread is not None and counts is not None else token_slots != self.scratch).sum().view(1)
        if shifts is None and self.shifts is not None:
            shifts = self.shifts[token_slots]
        page = self.page_table[token_slots, positions // self.page_size].to(torch.int64)
        return Batch(
            ids=self.tokens[token_slots, positions].to(torch.int64),
            positions=positions,
            places=page * self.page_size + positions % self.page_size,
            page_table=self.page_table,
            slots=slots,
            row_starts=starts,
            row_offsets=offsets,
            starts=NOTHING,
            lengths=NOTHING,
            offsets=NOTHING,
            caches=self.caches,
            states=self.states,
            plans=plans,
            real=real,
            turns=None if shifts is None else positions + shifts,
            spread=spread,
        )


@dataclass(frozen=True, slots=True)
class Drawing:
    """The graph that draws tokens from what another leaves, under masks of those `lines`."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor  # [R] int64
    lines: Mirror | None


@dataclass(frozen=True, slots=True)
class Captured:
    """One graph, what it reads, and what it leaves; those that draw tokens from that, the second one under masks."""

    graph: torch.cuda.CUDAGraph
    numbers: Mirror
    plans: tuple[Any, ...]
    hidden: Tensor  # [T, H]
    entering: Tensor | None  # [T, H]: what it reads that the stage before has passed on
    drawings: tuple[Drawing, ...] = ()

    def enter(self, hidden: Tensor | None) -> None:
        """The next replay is of these hidden states, of some or all of its tokens."""
        if self.entering is not None:
            assert hidden is not None
            self.entering[: len(hidden)].copy_(hidden)


class StepGraphs(ABC):
    """The graphs of steps of one kind, by size."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._graphs: dict[int, Captured] = {}
        self._sizes: list[int] = []

    @property
    def most(self) -> int:
        """The largest size that is captured; 0 where none is."""
        return self._sizes[-1] if self._sizes else 0

    @torch.inference_mode()
    def _capture(self, sizes: list[int], pool: Any) -> bool:
        """Captures those of `sizes`, which ascend, that the attention backends can. False where there are none."""
        for size in reversed(sizes):  # the largest first: the others fit into its memory
            if (graph := self._captured(size, pool)) is not None:
                self._graphs[size] = graph
        self._sizes = [size for size in sizes if size in self._graphs]
        return bool(self._sizes)

    @abstractmethod
    def _captured(self, size: int, pool: Any) -> Captured | None:
        """The graph of one size; None where an attention backend says that it cannot be captured."""


class DecodeGraphs(StepGraphs):
    """Steps of one token a row, for a ladder of row counts.

    `shared` ones are for steps in which rows share prefixes (prefixes.py), where the attention backends make use of
    that."""

    def __init__(self, tables: Tables, shared: bool = False) -> None:
        super().__init__(tables)
        self._shared = shared
        self._last: Captured | None = None  # that was replayed

    def capture(self, most: int, pool: Any) -> bool:
        """Captures the ladder up to `most` rows. False when an attention backend's steps cannot be captured."""
        return self._capture(shared_ladder(most) if self._shared else ladder(most), pool)

    def _captured(self, size: int, pool: Any) -> Captured | None:
        backends = self._tables.model.backends
        numbers = Mirror(2 * size + self._tables.copies, self._tables.tokens.device)
        slots, positions, counts = _split(numbers.host(), size)
        slots[:], positions[:], counts[:] = self._tables.scratch, 0, 0
        numbers.send()
        batch = self._batch(numbers.device, size, ())
        plans = tuple(backend.capture_shared(batch) if self._shared else backend.capture(batch) for backend in backends)
        if not self._tables.captures(plans):
            return None
        self._refill(plans, slots, positions, ())
        entering = self._tables.entering(size)
        graph, hidden = captured(lambda: self._tables.model(self._batch(numbers.device, size, plans), entering), pool)
        drawings = []
        if (draw := self._tables.draw) is not None:
            for lines in (None, *([Mirror(size, numbers.device.device)] if self._tables.masks else [])):
                on_device = numbers.device[: 2 * size].view(2, size)
                run = partial(draw, hidden, on_device, None if lines is None else lines.device)
                drawings.append(Drawing(*captured(run, pool), lines))
        return Captured(graph, numbers, plans, hidden, entering, tuple(drawings))

    def _batch(self, numbers: Tensor, size: int, plans: tuple[Any, ...]) -> Batch:
        slots, positions, counts = _split(numbers, size)
        offsets = torch.arange(size + 1, device=slots.device)
        return self._tables.batch(slots, positions, slots, positions, offsets, plans, counts)

    def fits(self, rows: Rows) -> bool:
        """Whether the step of `rows` is one of these."""
        return rows.most_rows <= self.most and rows.decode

    def _refill(
        self, plans: tuple[Any, ...], slots: np.ndarray, starts: np.ndarray, prefixes: Sequence[Prefix]
    ) -> None:
        for backend, plan in zip(self._tables.model.backends, plans, strict=True):
            if self._shared:
                backend.refill_shared(plan, slots, starts, prefixes)
            else:
                backend.refill(plan, slots, starts)

    def replay(
        self, rows: Rows, prefixes: Sequence[Prefix] = (), entering: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs the step: hidden states [R, H], and the device's copy of slots and positions [2, R]; good until the next
        replay. `prefixes` are what rows share, `entering` the hidden states that the stage before has passed on."""
        count = len(rows)
        size = self._sizes[bisect.bisect_left(self._sizes, rows.most_rows)]
        chosen = self._graphs[size]
        slots, positions, counts = _split(chosen.numbers.host(), size)
        slots[count:], positions[count:] = self._tables.scratch, 0
        slots[:count], positions[:count] = rows.slots, rows.starts
        if rows.among is not None:
            counts[:] = rows.among.tokens
        chosen.numbers.send()
        self._refill(chosen.plans, slots, positions, prefixes)
        chosen.enter(entering)
        chosen.graph.replay()
        self._last = chosen
        return chosen.hidden[:count], chosen.numbers.device[: 2 * size].view(2, size)[:, :count]

    @property
    def draws(self) -> bool:
        """Whether `draw` can be called."""
        return self._tables.draw is not None

    def draw(self, count: int, lines: np.ndarray | None) -> Tensor:
        """Tokens [count] int64 of the step that was replayed last, good until the next replay. No row of it may ask for
        more than a temperature; with `lines` [count] of the table of masks, they are drawn under these."""
        assert self._last is not None
        drawing = self._last.drawings[lines is not None]
        if lines is not None:
            assert drawing.lines is not None
            host = drawing.lines.host()
            host[:count], host[count:] = lines, 0
            drawing.lines.send()
        drawing.graph.replay()
        return drawing.tokens[:count]


class PromptGraphs(StepGraphs):
    """Steps with prompts of fewer rows than `rows`, which may also be of one token, for the sizes `tokens`."""

    def __init__(self, tables: Tables, rows: int, tokens: Sequence[int]) -> None:
        super().__init__(tables)
        self._rows = rows
        self._tokens = tokens
        self._shown = torch.empty(0)  # a line for each token of a step, and maybe more

    @property
    def model(self) -> Model:
        return self._tables.model

    def sizes(self, most: int) -> list[int]:
        """Tokens of the steps to capture where there are `most` at most."""
        return captured_sizes(self._tokens, most)

    def lines(self, most: int) -> Tensor:
        """Where captured steps of up to `most` tokens find what prompts show: [tokens of the largest, shown_size]."""
        tables, count = self._tables, max(self.sizes(most), default=0)
        return torch.zeros(count, tables.shown_size, dtype=tables.model.dtype, device=tables.tokens.device)

    def capture(self, most: int, pool: Any, lines: Tensor | None = None) -> bool:
        """Captures steps of up to `most` tokens, over these or more `lines`, or some of their own. False where none
        is."""
        self._shown = self.lines(most) if lines is None else lines
        made = self._capture(self.sizes(most), pool)
        if not made:
            self._shown = torch.empty(0)
        return made

    def _captured(self, size: int, pool: Any) -> Captured | None:
        backends = self._tables.model.backends
        numbers = Mirror(sum(self._parts(size)), self._tables.tokens.device)
        self._fill(numbers.host(), size, Rows.of(np.zeros((0, 4), np.int64)))
        numbers.send()
        plans = tuple(backend.capture_prompts(self._batch(numbers.device, size, ())) for backend in backends)
        if not self._tables.captures(plans):
            return None
        for backend, plan in zip(backends, plans, strict=True):
            backend.refill_prompts(plan, NOTHING, NOTHING, np.zeros(1, np.int64))
        entering = self._tables.entering(size)
        graph, hidden = captured(lambda: self._tables.model(self._batch(numbers.device, size, plans), entering), pool)
        return Captured(graph, numbers, plans, hidden, entering)

    def _parts(self, size: int) -> list[int]:
        """How many numbers there are of each kind: slots and positions of tokens; slots, starts and offsets of rows;
        the tokens of each copy of attention; by how much each token is turned; and whether it is shown."""
        rows, tables = self._rows, self._tables
        turned = 0 if tables.shifts is None else 3 * size
        return [size, size, rows, rows, rows + 1, tables.copies, turned, size if tables.shown_size else 0]

    def _batch(self, numbers: Tensor, size: int, plans: tuple[Any, ...]) -> Batch:
        token_slots, positions, slots, starts, offsets, counts, shifts, shown = numbers.split(self._parts(size))
        turned = shifts.view(3, size) if len(shifts) else None
        batch = self._tables.batch(token_slots, positions, slots, starts, offsets, plans, counts, turned)
        if not len(shown):
            return batch
        embeddings, *levels = self._shown[:size].split(self._tables.model.width, dim=1)
        return replace(batch, media=CapturedMedia(shown[:, None] != 0, embeddings, tuple(levels)))

    def _fill(self, numbers: np.ndarray, size: int, rows: Rows, what: Shown = NOTHING_SHOWN) -> np.ndarray:
        """Writes a step; returns its offsets [R + 1]."""
        ends = np.cumsum(self._parts(size))[:-1]
        token_slots, positions, slots, starts, offsets, counts, shifts, shown = np.split(numbers, ends)
        counts[:] = 0 if rows.among is None else rows.among.tokens
        shifts[:], shown[:] = 0, 0
        if what.shifts is not None:
            shifts.reshape(3, size)[:, : what.shifts.shape[1]] = what.shifts
        if len(shown):
            shown[what.places] = 1
        row_slots, row_starts, lengths = rows.slots, rows.starts, rows.lengths
        count, total = len(rows), int(lengths.sum())
        token_slots[total:], positions[total:] = self._tables.scratch, 0
        slots[count:], starts[count:], offsets[0], offsets[count:] = self._tables.scratch, 0, 0, total
        slots[:count], starts[:count], offsets[1 : count + 1] = row_slots, row_starts, np.cumsum(lengths)
        row = np.repeat(np.arange(count), lengths)
        token_slots[:total] = row_slots[row]
        positions[:total] = row_starts[row] + np.arange(total) - offsets[row]
        filled: np.ndarray = offsets[: count + 1].copy()
        return filled

    def fits(self, rows: Rows) -> bool:
        """Whether the step of `rows` is one of these, unless spans are whole that it shows."""
        fits = rows.most_rows < self._rows and rows.most_tokens <= self.most
        return fits and not rows.drafts.any() and (rows.among is None or not rows.among.shows)

    def replay(
        self, rows: Rows, entering: Tensor | None = None, shown: Shown = NOTHING_SHOWN
    ) -> tuple[Tensor, np.ndarray]:
        """Runs the step: hidden states [T, H] of the rows' tokens, good until the next replay, and offsets [R + 1].
        `entering` are the hidden states that the stage before has passed on."""
        total = int(rows.lengths.sum())
        size = self._sizes[bisect.bisect_left(self._sizes, rows.most_tokens)]
        chosen = self._graphs[size]
        offsets = self._fill(chosen.numbers.host(), size, rows, shown)
        chosen.numbers.send()
        if shown.embeddings is not None:
            places = upload(shown.places, self._shown.device)
            self._shown.index_copy_(0, places, shown.embeddings.to(self._shown.dtype))
        for backend, plan in zip(self._tables.model.backends, chosen.plans, strict=True):
            backend.refill_prompts(plan, rows.starts, rows.lengths, offsets)
        chosen.enter(entering)
        chosen.graph.replay()
        return chosen.hidden[:total], offsets


def _split(numbers: Any, size: int) -> tuple[Any, Any, Any]:
    """Of a decode step of `size` rows: slots, positions, and the tokens of each copy of attention, if there are any."""
    return numbers[:size], numbers[size : 2 * size], numbers[2 * size :]


def prompt_graphs(tables: Tables) -> tuple[PromptGraphs, ...]:
    """The graphs of steps with prompts, none of them captured: the first that fits is the one to take."""
    return tuple(PromptGraphs(tables, rows, tokens) for rows, tokens in prompt_ladders(tables.scratch))


def capture_prompts(graphs: Sequence[PromptGraphs], most: int, pool: Any) -> None:
    """Captures steps of up to `most` tokens for which graphs pay, the largest first. All find what prompts show in the
    same lines, as only one of them runs at a time."""
    most = min(most, most_prompt_tokens(graphs[0].model))
    lines = max(graphs, key=lambda each: each.sizes(most)[-1:]).lines(most)
    for each in reversed(graphs):
        each.capture(most, pool, lines)


def prompt_ladders(slots: int) -> list[tuple[int, Sequence[int]]]:
    """The graphs of steps with prompts where there are `slots`: of fewer rows than so many, for so many tokens."""
    others = [size for size in ALL_ROWS_TOKENS if slots >= FEW_ROWS or size > FEW_ROWS_TOKENS[-1]]
    return [(FEW_ROWS, FEW_ROWS_TOKENS), (slots + 1, others)]


def captured_sizes(tokens: Sequence[int], most: int) -> list[int]:
    """Those of the ladder `tokens` that are captured where a step has `most` tokens, which is the last one then."""
    most = min(most, tokens[-1])
    return [*(size for size in tokens if size < most), most] if most >= tokens[0] else []


def most_captured(slots: int, most: int) -> int:
    """Tokens of the largest step with prompts that is captured, of `most` at most; 0 where none is."""
    return max((size for _, tokens in prompt_ladders(slots) for size in captured_sizes(tokens, most)), default=0)


def most_prompt_tokens(model: Model) -> int:
    """Tokens of the largest step with prompts for which a graph pays: whose launches take longer than its kernels, and
    whose attention has no faster way without."""
    layers = max(sum(group.layers for group in model.kv_spec().groups), len(model.held))  # not all of them may attend
    most = max(SMALL_PROMPTS, WORK_TO_LAUNCH * layers / max(weight_bytes(model), 1))
    return int(min([most, model.most_graph_tokens, *(backend.most_graph_tokens for backend in model.backends)]))


def captured(run: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of `run`, and what it leaves."""
    run()  # compiles and loads what a capture cannot
    graph, collecting = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()  # a graph of a runner that is no more, freed meanwhile, would end the capture
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = run()
    finally:
        if collecting:
            gc.enable()
    return graph, out
