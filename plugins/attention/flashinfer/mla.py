"""Latent attention by FlashInfer's kernels (https://docs.flashinfer.ai), for NVIDIA GPUs from Ampere on.

    a step's rows:  absorbed ─ MLA kernel (FA3's way on Hopper, else FA2's), which divides contexts among processors
                    expanded ─ FA3's kernel for separate keys and values on Hopper, else Triton's

Captured decode steps of a few rows are Triton's too: FlashInfer's kernel waits for all processors between its halves,
which takes longer than so little work. Both of FlashInfer's kernels read a plan, which it makes on the host from
lengths and copies to the device; one serves all layers. The MLA kernel wants the pages of all rows in one list
(engine/kernels/attention/page_lists.py). It is called below FlashInfer's wrapper classes, for the reasons that
mha.py gives. Left out: FA2 for expanded rows.
"""

import logging
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.plugin import ConfigError, kernels
from engine.plugin.layers import Batch, LatentShape, Mirror
from engine_plugins.attention.flashinfer.modules import (
    CAUSAL,
    DTYPES,
    FA3_TILE,
    NHD,
    NORMAL,
    check_installed,
    fa3_plan_bytes,
    hardware,
    load_modules,
    mla_module,
    prefill_module,
)
from engine_plugins.attention.triton.mla import Plan, TritonLatentAttention

logger = logging.getLogger("engine.attention")

NAME = "latent attention flashinfer"
DIMS = (512, 64)  # of latents and of what is rotated: the only ones that FlashInfer is used with
PLAN_BYTES = 1 << 20  # of the MLA kernel's plan: 9 lists of WORKS numbers, and a few of one a processor
WORKS = 16384  # tiles of queries by pieces of contexts that a plan has room for, whether it says so or not
TILES = 12288  # of a launch, so that with the pieces of those that are cut there are fewer than WORKS
TILE = 64  # queries times heads that a processor takes at a time; two work together where rows have more
FEW_ROWS = 8  # of a captured decode step that is Triton's
LN2 = 0.6931471805599453


@dataclass(slots=True)
class Launch:
    """A call of the MLA kernel, the same in every layer, for the step's tokens `begin` .. `end`."""

    begin: int
    end: int
    causal: bool
    pages: Tensor  # int32: of all rows, end to end
    numbers: Tensor  # uint8: the plan on the device
    info: Any = None  # the plan on the host


@dataclass(slots=True)
class CapturedLaunch:
    """A launch whose tensors a CUDA graph reads, with what fills them. `offsets` are of the rows' pages."""

    launch: Launch
    offsets: Mirror
    page_table: Tensor
    slots: Tensor
    grid: list[int] = field(default_factory=list)  # what a graph holds of the plan, and so may not change


@dataclass(frozen=True, slots=True)
class RaggedLaunch:
    """A call of FA3's kernel for expanded rows."""

    queries: Tensor  # [R + 1] int32: where rows' queries begin, and end
    keys: Tensor  # [R + 1] int32
    causal: bool
    numbers: Tensor
    info: Any


class FlashInferLatentAttention(TritonLatentAttention):
    """Serves bfloat16 and float16 with a cache of the same type, and on Hopper bfloat16 with float8_e4m3fn; latents of
    512 and 64 numbers.

    It loads FlashInfer's compiled modules when it is set up, or compiles them where there is a compiler."""

    few_rows = FEW_ROWS

    def set_up(self) -> None:
        shape, device, dtype = self.shape, self.device, self.dtype
        check_dims(shape, device, dtype, self.kv_dtype)
        check_installed()
        super().set_up()
        capability, self._processors = hardware(device)
        name = kernel_name(capability, dtype, self.kv_dtype)
        self._module = load_mla(name, dtype, self.kv_dtype)
        self._ragged = load_ragged(shape, dtype) if name == "fa3" else None
        logger.info("expanded rows attend by %s", "FlashInfer's FA3 kernel" if self._ragged else "Triton's kernel")
        self._programmatic = capability[0] >= 9  # dependent launch
        self._join_keys = kernels.join_keys
        self._list_pages = kernels.list_pages
        self._pinned_turns = [self._pinned(PLAN_BYTES) for _ in range(self.steps_in_flight)]  # of captured steps
        self._turn = 0
        # Shared by all launches: kernels run one after the other, as do the copies of captured steps' plans.
        self._floats = torch.zeros(self._partial_bytes(), dtype=torch.uint8, device=device)
        self._numbers = torch.empty(PLAN_BYTES, dtype=torch.uint8, device=device)
        self._pages = torch.empty(0, dtype=torch.int32, device=device)

    def _partial_bytes(self) -> int:
        """Two tiles of vectors and sums a processor, or of pairs of them: MLAPlan in FlashInfer's scheduler.cuh."""
        return 2 * self._processors * TILE * (2 * self.shape.latent_dim + 4) + 64

    def _pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    @property
    def _pairs(self) -> bool:
        """Whether processors work in pairs, as FlashInfer decides by the mean of rows' queries times heads."""
        return self.shape.query_heads > TILE

    def prepare_absorbed(self, batch: Batch) -> Any:
        tiles = -(-batch.lengths * self.shape.query_heads // TILE)
        groups = np.cumsum(tiles) // TILES
        borders = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(tiles)]
        return [self._launch(batch, first, end) for first, end in pairwise(borders)]

    def _launch(self, batch: Batch, first: int, end: int) -> Launch:
        """For the rows `first` .. `end` - 1."""
        starts, lengths = batch.starts[first:end], batch.lengths[first:end]
        pages = page_offsets(starts, lengths, self.page_size)
        listed = torch.empty(int(pages[-1]), dtype=torch.int32, device=self.device)
        self._list_pages(batch.page_table, batch.slots[first:end], self.upload(pages), listed)
        begin = int(batch.offsets[first])
        numbers = torch.empty(PLAN_BYTES, dtype=torch.uint8, device=self.device)
        launch = Launch(begin, int(batch.offsets[end]), bool((lengths > 1).any()), listed, numbers)
        pinned = self._pinned(PLAN_BYTES)
        self._plan(launch, pinned, batch.offsets[first : end + 1] - begin, pages, starts + lengths)
        keep_until_copied(pinned, numbers)
        return launch

    def _plan(self, launch: Launch, pinned: Tensor, queries: np.ndarray, pages: np.ndarray, ends: np.ndarray) -> None:
        rows = [torch.from_numpy(part.astype(np.int32)) for part in (queries, pages, ends)]
        heads = self.shape.query_heads
        launch.info = self._module.plan(
            self._floats, launch.numbers, pinned, *rows, heads, self.shape.latent_dim, launch.causal
        )

    def capture(self, batch: Batch) -> Any:
        return super().capture(batch) if len(batch.slots) <= self.few_rows else self._capture(batch, causal=False)

    def capture_prompts(self, batch: Batch) -> Any:
        return self._capture(batch, causal=True)

    def _capture(self, batch: Batch, causal: bool) -> CapturedLaunch:
        rows, most = len(batch.slots), len(batch.slots) * batch.page_table.shape[1]
        if most > len(self._pages):
            self._pages = torch.empty(most, dtype=torch.int32, device=self.device)
        launch = Launch(0, len(batch.ids), causal, self._pages, self._numbers)
        return CapturedLaunch(launch, Mirror(rows // 2 + 1, self.device), batch.page_table, batch.slots)

    def refill(self, plan: Any, slots: np.ndarray, starts: np.ndarray) -> None:
        if not isinstance(plan, Plan):  # Triton's reads all that it needs on the device
            self._refill(plan, starts, np.ones_like(starts), np.arange(len(starts) + 1))

    def refill_prompts(self, plan: Any, starts: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> None:
        if not len(starts):  # a plan needs a row: one that sees nothing
            starts, lengths, offsets = np.array([-1]), np.array([1]), np.array([0, 1])
        if not self._pairs:  # whether processors work in pairs is part of a graph: empty rows keep the mean down
            more = max(-(-int(offsets[-1]) * self.shape.query_heads // TILE) - len(starts), 0)
            starts, lengths = np.pad(starts, (0, more)), np.pad(lengths, (0, more))
            offsets = np.pad(offsets, (0, more), mode="edge")
        self._refill(plan, starts, lengths, offsets)

    def _refill(self, plan: CapturedLaunch, starts: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> None:
        launch, rows = plan.launch, len(plan.slots)
        pages = page_offsets(starts, lengths, self.page_size)
        host = plan.offsets.host().view(np.int32)
        host[: rows + 1] = pages[-1]
        host[: min(rows + 1, len(pages))] = pages[: rows + 1]
        plan.offsets.send()
        listed = plan.offsets.device.view(torch.int32)[: rows + 1]
        self._list_pages(plan.page_table, plan.slots, listed, launch.pages)
        self._turn = (self._turn + 1) % len(self._pinned_turns)
        self._plan(launch, self._pinned_turns[self._turn], offsets, pages, starts + lengths)
        info = list(launch.info)
        assert plan.grid in ([], info), f"a plan of {info}, and the graph was captured with {plan.grid}"
        plan.grid = info

    def attend(self, query: Tensor, rotated: Tensor, cache: Tensor, plan: Any) -> Tensor:
        if isinstance(plan, Plan):
            return super().attend(query, rotated, cache, plan)
        launches = [plan.launch] if isinstance(plan, CapturedLaunch) else plan
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        latent, rope = cache.split([self.shape.latent_dim, self.shape.rope_dim], dim=2)
        for launch in launches:
            part = slice(launch.begin, launch.end)
            self._module.run(
                self._floats, launch.numbers, launch.info, query[part], rotated[part], latent, rope, launch.pages,
                out[part], None, CAUSAL if launch.causal else NORMAL, self.shape.query_heads, self.page_size,
                self.shape.scale, False, 1.0, 1.0,
            )  # fmt: skip
        return out

    def prepare_expanded(self, queries: np.ndarray, keys: np.ndarray, causal: bool) -> Any:
        if self._ragged is None:
            return super().prepare_expanded(queries, keys, causal)
        shape, rows = self.shape, len(queries)
        ends = np.zeros((2, rows + 1), np.int32)
        np.cumsum(np.stack((queries, keys)), axis=1, out=ends[:, 1:])
        works = int((-(-queries // FA3_TILE)).sum()) * shape.query_heads
        size = fa3_plan_bytes(works, self._processors)
        numbers, pinned = torch.empty(size, dtype=torch.uint8, device=self.device), self._pinned(size)
        host = [torch.from_numpy(part) for part in (*ends, keys.astype(np.int32))]
        info = self._ragged.plan(
            self._floats, numbers, pinned, *host, int(ends[0, -1]), rows, shape.query_heads, shape.query_heads,
            1, False, shape.key_dim + shape.rope_dim, shape.value_dim, causal, -1,
        )  # fmt: skip
        keep_until_copied(pinned, numbers)
        on_device = self.upload(ends)
        return RaggedLaunch(on_device[0], on_device[1], causal, numbers, info)

    def attend_expanded(
        self, query: Tensor, key: Tensor, rotated: Tensor, value: Tensor, plan: Any
    ) -> tuple[Tensor, Tensor]:
        if self._ragged is None:
            return super().attend_expanded(query, key, rotated, value, plan)
        key = self._join_keys(key, rotated)
        out = query.new_empty(*query.shape[:2], value.shape[2])
        sums = query.new_empty(query.shape[:2], dtype=torch.float32)
        self._ragged.ragged_run(
            float_workspace_buffer=self._floats,
            int_workspace_buffer=plan.numbers,
            plan_info_vec=plan.info,
            q=query,
            k=key,
            v=value,
            qo_indptr=plan.queries,
            kv_indptr=plan.keys,
            o=out,
            maybe_lse=sums,
            mask_mode=CAUSAL if plan.causal else NORMAL,
            layout=NHD,
            window_left=-1,
            enable_pdl=self._programmatic,
            maybe_custom_mask=None,
            maybe_mask_indptr=None,
            maybe_alibi_slopes=None,
            maybe_prefix_len_ptr=None,
            maybe_token_pos_in_items_ptr=None,
            maybe_max_item_len_ptr=None,
            logits_soft_cap=0.0,
            sm_scale=self.shape.scale,
            rope_scale=1.0,
            rope_theta=1e4,
            token_pos_in_items_len=0,
        )
        return out, sums.mul_(LN2)  # its logarithms are of base 2


def page_offsets(starts: np.ndarray, lengths: np.ndarray, page_size: int) -> np.ndarray:
    """Where the pages of each row begin in a list of all, [R + 1] int32. A row of no tokens has no pages."""
    offsets = np.zeros(len(starts) + 1, np.int32)
    np.cumsum(np.where(lengths > 0, -(-(starts + lengths) // page_size), 0), out=offsets[1:])
    return offsets


def keep_until_copied(pinned: Tensor, numbers: Tensor) -> None:
    """Torch gives pinned memory to others once it is free and torch's own copies from it are over. FlashInfer copies
    from it unseen by torch: one more copy, after that, of the same numbers to the same place, makes torch wait."""
    numbers[:16].copy_(pinned[:16], non_blocking=True)


def check_dims(shape: LatentShape, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """Raises ConfigError for what the kernels do not compute."""
    if device.type != "cuda":
        raise ConfigError(f"latent attention flashinfer runs on GPUs, not on {device}; say --plugins torch")
    if dtype not in DTYPES or kv_dtype not in (dtype, torch.float8_e4m3fn):
        raise ConfigError(
            f"latent attention flashinfer computes in bfloat16 or float16 and caches that or float8_e4m3fn, "
            f"not {kv_dtype} for {dtype}"
        )
    if (shape.latent_dim, shape.rope_dim) != DIMS:
        raise ConfigError(
            f"latent attention flashinfer takes latents of {DIMS[0]} + {DIMS[1]} numbers, "
            f"not {shape.latent_dim} + {shape.rope_dim}"
        )


def kernel_name(capability: tuple[int, int], dtype: torch.dtype, kv_dtype: torch.dtype) -> str:
    """The way that the MLA kernel goes. Raises ConfigError for a GPU or a cache that it does not serve."""
    if capability < (8, 0):
        raise ConfigError(
            f"latent attention flashinfer needs an Ampere GPU or later, not compute capability {capability}"
        )
    name = "fa3" if capability[0] == 9 else "fa2"
    if kv_dtype != dtype and (name != "fa3" or dtype != torch.bfloat16):
        raise ConfigError(
            f"latent attention flashinfer reads a cache of {kv_dtype} on Hopper GPUs and for bfloat16 only, not for "
            f"{dtype} on compute capability {capability}; say --plugins triton"
        )
    return name


def load_mla(name: str, dtype: torch.dtype, kv_dtype: torch.dtype) -> Any:
    """The module of the MLA kernel, compiled first where it is not yet. Raises ConfigError where it cannot be had."""
    terms = (dtype, kv_dtype, dtype, torch.int32, *DIMS, False)  # … output, indices, latents, no profiler
    return load_modules(NAME, {name: mla_module(name, *terms)})[name]


def load_ragged(shape: LatentShape, dtype: torch.dtype) -> Any:
    """FA3's module for expanded rows. Raises ConfigError as `load_mla`."""
    # types of queries, keys, output, indices; head sizes; no positions of its own, window, soft cap, float32 scores
    dims = (shape.key_dim + shape.rope_dim, shape.value_dim)
    terms = (dtype, dtype, dtype, torch.int32, *dims, 0, False, False, False)
    return load_modules(NAME, {"fa3": prefill_module("fa3", *terms)})["fa3"]
