"""Paged attention by FlashInfer's kernels (https://docs.flashinfer.ai), for NVIDIA GPUs from Ampere on.

    a step's rows:  1 1 1 1 1 1 | 300 1 512        lengths
                    decode      | extend
                    FA2, split  | FA3 on Hopper where there is enough work for it, else FA2

The rows of one token that a step begins with go to the FA2 kernel, which packs the query heads of a key head into one
tile and splits long contexts among processors; so do all rows of captured steps. A kernel call wants its pages in one
list (engine/kernels/attention/page_lists.py) and a plan, which FlashInfer makes on the host from lengths and copies to
the device. One plan serves all layers. It is called below FlashInfer's wrapper classes, as those own 8 MiB of device
and of pinned memory each, and reuse the pinned part while a copy from it may be under way.

Left out: cascades over shared prefixes, the decode kernel without tensor cores (better only for a single row), soft
caps, queries in FP8.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.plugin import ConfigError, kernels
from engine.plugin.layers import AttentionShape, Batch, Mirror
from engine_plugins.attention.flashinfer.modules import (
    CAUSAL,
    DTYPES,
    FA3_TILE,
    NHD,
    NORMAL,
    check_installed,
    hardware,
    load_modules,
    prefill_module,
)
from engine_plugins.attention.into import AttentionInto

logger = logging.getLogger("engine.attention")

HEAD_DIMS = (64, 128, 256)
PLAN_BYTES = 8 << 20  # of a step that is not captured: FlashInfer's own size
FLOAT_BYTES = 256 << 20  # partial sums of split contexts; grows where a captured step needs more
MOST_FLOAT_BYTES = 1 << 30
CAPTURED_ROWS = 64  # of a captured step with prompts; where more are of one token, these want a kernel of their own


@dataclass(frozen=True, slots=True)
class Kernel:
    """`module` has FlashInfer's `plan` and `paged_run`; `name` is fa2 or fa3."""

    name: str
    module: Any


class RowLists:
    """Views of a tensor [3 * R + 2] int32, which holds what `row_lists` returns, end to end."""

    def __init__(self, numbers: Tensor) -> None:
        rows = len(numbers) // 3
        self.queries, self.pages, self.last = numbers.split([rows + 1, rows + 1, rows])


@dataclass(slots=True)
class Launch:
    """A kernel call, the same in every layer, for the tokens `begin` .. `end` of the step."""

    kernel: Kernel
    begin: int
    end: int
    causal: bool
    lists: RowLists
    pages: Tensor  # int32: of row r, pages[lists.pages[r] : lists.pages[r + 1]]
    floats: Tensor  # uint8
    numbers: Tensor  # uint8: the plan on the device
    info: Any = None  # the plan on the host


@dataclass(slots=True)
class CapturedLaunch:
    """A launch whose tensors a CUDA graph reads, with what fills them. `most` bounds its tokens for FlashInfer."""

    launch: Launch
    mirror: Mirror
    page_table: Tensor
    slots: Tensor
    most: int


class FlashInferAttention(AttentionInto):
    """Serves bfloat16 and float16, each with a cache of its own type or float8_e4m3fn, and head sizes 64, 128, 256.

    It loads FlashInfer's compiled modules when it is set up, or compiles them where there is a compiler."""

    def set_up(self) -> None:
        shape, device, dtype = self.shape, self.device, self.dtype
        check_served(shape, device, dtype, self.kv_dtype)
        check_installed()
        capability, self._processors = hardware(device)
        if capability < (8, 0):
            raise ConfigError(f"attention flashinfer needs an Ampere GPU or later, not compute capability {capability}")
        names = self._choose_kernels(hopper=capability[0] == 9)
        if "fa3" in names:
            self.most_graph_tokens = 1024  # FA3 is the faster one then, and captured by the hybrid alone
        self._kernels = load_kernels(names, dtype, self.kv_dtype, shape.head_dim, windowed=shape.window is not None)
        self._programmatic = capability[0] >= 9  # dependent launch
        self._window_left = -1 if shape.window is None else shape.window - 1
        self._list_pages = kernels.list_pages
        self._floats = torch.zeros(max(FLOAT_BYTES, self._eager_bytes()), dtype=torch.uint8, device=device)
        self._numbers = [torch.empty(PLAN_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
        pinned = device.type == "cuda"
        turns = 2 * self.steps_in_flight  # plans whose copies may be under way: two a step
        self._pinned = [torch.empty(PLAN_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(turns)]
        self._turn = 0
        self._pages = torch.empty(0, dtype=torch.int32, device=device)  # of captured steps; only one of them runs

    def _choose_kernels(self, hopper: bool) -> list[str]:
        """Those that are loaded. FA3 is for Hopper, and reads an FP8 cache for FP8 queries only."""
        return ["fa2", "fa3"] if hopper and self.kv_dtype == self.dtype else ["fa2"]

    def _eager_bytes(self) -> int:
        """FA2 splits contexts only while tiles and pieces, of at most 128 queries, keep to two a processor."""
        return 2 * self._processors * (self.shape.query_heads // self.shape.kv_heads) * 128 * 129 * 4

    def prepare(self, batch: Batch) -> list[Launch]:
        decode = leading_ones(batch.lengths)
        parts = ((0, decode), (decode, len(batch.lengths)))
        return [self.launch_rows(batch, first, end, part) for part, (first, end) in enumerate(parts) if first < end]

    def launch_rows(self, batch: Batch, first: int, end: int, part: int = 0) -> Launch:
        """For the rows `first` .. `end` - 1; those before `first` have one token each. A step has two parts at most."""
        queries, pages, last = row_lists(batch.starts[first:end], batch.lengths[first:end], self.page_size)
        lists = RowLists(self.upload(np.concatenate((queries, pages, last))))
        listed = torch.empty(int(pages[-1]), dtype=torch.int32, device=self.device)
        self._list_pages(batch.page_table, batch.slots[first:end], lists.pages, listed)
        tokens = int(queries[-1])
        extends = tokens > end - first
        kernel = self._kernels[self._extend_kernel(batch.lengths[first:end]) if extends else "fa2"]
        launch = Launch(kernel, first, first + tokens, extends, lists, listed, self._floats, self._numbers[part])
        launch.info = self._plan(launch, queries, pages, batch.starts[first:end] + batch.lengths[first:end], tokens)
        return launch

    def _extend_kernel(self, lengths: np.ndarray) -> str:
        return "fa3" if "fa3" in self._kernels and self.fills_device(lengths) else "fa2"

    def fills_device(self, lengths: np.ndarray) -> bool:
        """Whether FA3 has enough to do: it takes a tile of 128 queries of one head at a time, and splits no context."""
        return int((-(-lengths // FA3_TILE)).sum()) * self.shape.query_heads >= self._processors

    def _plan(
        self,
        launch: Launch,
        queries: np.ndarray,
        pages: np.ndarray,
        ends: np.ndarray,
        most: int,
        captured: bool = False,
    ) -> Any:
        shape, self._turn = self.shape, (self._turn + 1) % len(self._pinned)
        arguments: list[Any] = [launch.floats, launch.numbers, self._pinned[self._turn]]
        arguments += [torch.from_numpy(part) for part in (queries, pages, ends.astype(np.int32))]
        arguments += [most, len(ends), shape.query_heads, shape.kv_heads, self.page_size, captured]
        arguments += [shape.head_dim, shape.head_dim, launch.causal, self._window_left]
        if launch.kernel.name == "fa2":
            arguments += [-1, False, 0]  # no fixed splits, splits allowed, no other kernel beside it
        return launch.kernel.module.plan(*arguments)

    def capture(self, batch: Batch) -> CapturedLaunch | None:
        return self._capture(batch, len(batch.slots), causal=False)

    def capture_prompts(self, batch: Batch) -> CapturedLaunch | None:
        if len(batch.slots) > CAPTURED_ROWS:
            return None
        # FlashInfer sizes tiles by most - rows + 1, the longest row it thinks possible.
        return self._capture(batch, len(batch.ids) + len(batch.slots), causal=True)

    def _capture(self, batch: Batch, most: int, causal: bool) -> CapturedLaunch | None:
        rows, shape = len(batch.slots), self.shape
        padded = padded_tiles(most, rows, shape, self._processors)
        needed = float_bytes(most, rows, shape, self._processors)
        if needed > MOST_FLOAT_BYTES:
            logger.info("flashinfer would take %d MiB for a captured step of %d rows", needed >> 20, rows)
            return None
        if needed > len(self._floats):
            self._floats = torch.zeros(needed, dtype=torch.uint8, device=self.device)
        return self._captured_launch(batch, "fa2", most, causal, 16 * (padded + most + rows) + 4096)

    def _captured_launch(self, batch: Batch, kernel: str, most: int, causal: bool, size: int) -> CapturedLaunch:
        """With a plan of `size` bytes."""
        rows = len(batch.slots)
        if rows * batch.page_table.shape[1] > len(self._pages):
            self._pages = torch.empty(rows * batch.page_table.shape[1], dtype=torch.int32, device=self.device)
        mirror = Mirror(-(-(3 * rows + 2) // 2), self.device)
        lists = RowLists(mirror.device.view(torch.int32)[: 3 * rows + 2])
        numbers = torch.empty(size, dtype=torch.uint8, device=self.device)
        launch = Launch(self._kernels[kernel], 0, len(batch.ids), causal, lists, self._pages, self._floats, numbers)
        return CapturedLaunch(launch, mirror, batch.page_table, batch.slots, most)

    def refill(self, plan: CapturedLaunch, slots: np.ndarray, starts: np.ndarray) -> None:
        self._refill(plan, starts, np.ones_like(starts))

    def refill_prompts(
        self, plan: CapturedLaunch, starts: np.ndarray, lengths: np.ndarray, offsets: np.ndarray
    ) -> None:
        more = len(plan.slots) - len(starts)
        self._refill(plan, np.pad(starts, (0, more)), np.pad(lengths, (0, more)), int(offsets[0]))

    def _refill(self, plan: CapturedLaunch, starts: np.ndarray, lengths: np.ndarray, first: int = 0) -> None:
        """`first`: where the first row's tokens begin in the step."""
        launch, rows = plan.launch, len(starts)
        host = plan.mirror.host().view(np.int32)[: 3 * rows + 2]
        queries, pages = host[: rows + 1], host[rows + 1 : 2 * rows + 2]
        queries[:], pages[:], host[2 * rows + 2 :] = row_lists(starts, lengths, self.page_size)
        queries += first
        plan.mirror.send()
        launch.info = self._plan(launch, queries, pages, starts + lengths, plan.most, captured=True)
        self._list_pages(plan.page_table, plan.slots, launch.lists.pages, launch.pages)

    def attend_into(self, out: Tensor, query: Tensor, cache: Tensor, plan: Sequence[Launch] | CapturedLaunch) -> None:
        keys, values = cache.unbind(1)
        for launch in [plan.launch] if isinstance(plan, CapturedLaunch) else plan:
            self._run(launch, query[launch.begin : launch.end], keys, values, out[launch.begin : launch.end])

    def _run(self, launch: Launch, query: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        launch.kernel.module.paged_run(
            float_workspace_buffer=launch.floats,
            int_workspace_buffer=launch.numbers,
            plan_info_vec=launch.info,
            q=query,
            paged_k_cache=keys,
            paged_v_cache=values,
            qo_indptr=launch.lists.queries,
            paged_kv_indptr=launch.lists.pages,
            paged_kv_indices=launch.pages,
            paged_kv_last_page_len=launch.lists.last,
            o=out,
            maybe_lse=None,
            mask_mode=CAUSAL if launch.causal else NORMAL,
            layout=NHD,
            window_left=self._window_left,
            enable_pdl=self._programmatic,
            maybe_custom_mask=None,
            maybe_mask_indptr=None,
            maybe_alibi_slopes=None,
            maybe_prefix_len_ptr=None,
            maybe_token_pos_in_items_ptr=None,
            maybe_max_item_len_ptr=None,
            logits_soft_cap=0.0,
            sm_scale=self.shape.scale,
            scale_q=None,
            scale_k=None,
            scale_v=None,
            rope_scale=1.0,
            rope_theta=1e4,
            token_pos_in_items_len=0,
            workspace_size=len(launch.floats),
        )


def leading_ones(lengths: np.ndarray) -> int:
    """How many rows of one token a step begins with."""
    longer = lengths != 1
    return int(longer.argmax()) if longer.any() else len(lengths)


def row_lists(starts: np.ndarray, lengths: np.ndarray, page_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where rows' tokens begin in a list of all [R + 1], and their pages [R + 1]; positions in the last page [R].

    All int32. A row of no tokens has no pages."""
    ends = starts + lengths
    pages = np.where(lengths > 0, -(-ends // page_size), 0)
    queries, listed = np.zeros((2, len(starts) + 1), np.int32)
    np.cumsum(lengths, out=queries[1:])
    np.cumsum(pages, out=listed[1:])
    return queries, listed, ((ends - 1) % page_size + 1).astype(np.int32)


def tile_size(most: int, rows: int, shape: AttentionShape) -> int:
    """Queries times heads of a group in FA2's tile of a captured step: FA2DetermineCtaTileQ in its utils.cuh."""
    packed = (most - rows + 1) * (shape.query_heads // shape.kv_heads)
    if packed > 64 and shape.head_dim < 256:
        return 128
    return 64 if packed > 16 else 16


def padded_tiles(most: int, rows: int, shape: AttentionShape, processors: int) -> int:
    """Tiles for which FlashInfer plans a captured step: PrefillSplitQOKVIndptr in its scheduler.cuh."""
    packed = most * (shape.query_heads // shape.kv_heads)
    return max(2 * processors // shape.kv_heads, -(-packed // tile_size(most, rows, shape)) + rows - 1)


def float_bytes(most: int, rows: int, shape: AttentionShape, processors: int) -> int:
    """For partial sums of a captured step: vectors and a number of each query, in each tile."""
    tiles = padded_tiles(most, rows, shape, processors) * tile_size(most, rows, shape)
    return tiles * shape.query_heads * (shape.head_dim + 1) * 4 + 64


def check_served(shape: AttentionShape, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """Raises ConfigError for what the kernels do not compute."""
    if device.type != "cuda":
        raise ConfigError(f"attention flashinfer runs on GPUs, not on {device}; say --plugins torch")
    if dtype not in DTYPES or kv_dtype not in (dtype, torch.float8_e4m3fn):
        raise ConfigError(
            f"attention flashinfer computes in bfloat16 or float16 and caches that or float8_e4m3fn, "
            f"not {kv_dtype} for {dtype}"
        )
    if shape.head_dim not in HEAD_DIMS:
        raise ConfigError(f"attention flashinfer takes head sizes of 64, 128 and 256, not {shape.head_dim}")


def load_kernels(
    names: list[str], dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, windowed: bool
) -> dict[str, Kernel]:
    """The modules for `names`, compiled first where they are not yet. Raises ConfigError where they cannot be had."""
    # types of queries, cache, output, indices; head sizes; no positions of its own, window, no soft cap, float32 scores
    terms = (dtype, kv_dtype, dtype, torch.int32, head_dim, head_dim, 0, windowed, False, False)
    loaded = load_modules("attention flashinfer", {name: prefill_module(name, *terms) for name in names})
    return {name: Kernel(name, module) for name, module in loaded.items()}
