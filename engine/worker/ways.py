"""By which way tokens reach the experts of other ranks: as `--ep-exchange` says, or as is measured when ranks start.

A mixture of the model, with made-up weights, is run for a few sizes of a step, by gathering as it would be without any
other way, and by each of the ways of parallel/ways.py. All ranks take the times of the slowest one, so they decide
alike. The other ways cost something of themselves: each copy of attention then holds the shared expert whole. So they
are only had where steps become faster by them: by `LEAST_GAIN`, in the geometric mean over the sizes.

On a GPU, what can be captured is timed in CUDA graphs. Where all ranks have the same tokens, because attention does not
run in copies, nothing is measured: then all-to-all only adds messages. Left out: uneven routing, for which any way
waits for the busiest rank.
"""

import gc
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from engine.layers.batch import Batch, Spread
from engine.layers.build import Build
from engine.layers.decoder import CausalLM, DecoderShape
from engine.layers.dispatch import Dispatch
from engine.layers.model import Layer, Model
from engine.layers.moe import SparseMLP
from engine.options.parallel import ParallelOptions
from engine.parallel.peers import graph_time
from engine.parallel.ways import CAPTURED, WAYS, Ways
from engine.plugin.registry import Plugins
from engine.plugin.terms import Terms
from engine.worker.choices import model_for

logger = logging.getLogger("engine.worker")

SIZES = (1, 16, 64, 256, 1024, 4096)  # tokens of a rank that are measured, and as many as its largest step has
LEAST_GAIN = 0.05
REPEATS = 5
Call = Callable[[Tensor, Batch], Tensor]


class Source(Protocol):
    """What a model is made of (engine/worker/start.py)."""

    @property
    def plugins(self) -> Plugins: ...

    @property
    def terms(self) -> Terms: ...

    @property
    def language(self) -> Terms: ...


def choose_ways(options: ParallelOptions, source: Source, build: Build, most: int) -> Ways | None:
    """The ways of a start with these `options`, whose largest step has `most` tokens of a copy of attention; None where
    all tokens are gathered, or all ranks have them."""
    if options.ep_exchange == "all-to-all":
        return Ways.always("places")
    if options.ep_exchange == "gather" or not options.whole_experts or options.dp_attention == 1:
        return None
    if (shape := mixture_of(source)) is None:
        return None
    each = -(-most // build.mesh.extent("attention_tp"))
    sizes = sorted({min(size, each) for size in (*SIZES, each)})
    times = measured(shape, build, sizes)
    found = decided(sizes, times)
    if build.mesh.rank == 0:  # all have agreed on it
        logger.info("tokens to experts of %d ranks: %s (%s)", build.mesh.ep, found or "gather", _told(sizes, times))
    return found


def mixture_of(source: Source) -> DecoderShape | None:
    """What the model's decoder is like, if it has mixtures of experts and may have copies of attention."""
    model = source.plugins.code("models", model_for(source.plugins, source.terms.words("architectures")).name)
    if not issubclass(model, CausalLM) or not model.in_copies:
        return None
    shape: DecoderShape = model.decoder_shape(source.language)
    return shape if shape.mixture is not None and shape.mixture.layers else None


@torch.inference_mode()
def measured(shape: DecoderShape, build: Build, sizes: list[int]) -> list[list[float]]:
    """Microseconds of a mixture in steps of each size, in tokens of a rank: by gathering, as it is without ways, then
    by each of `WAYS`. All ranks call this, and get the same."""
    groups = build.groups
    assert shape.mixture is not None and groups is not None
    layer, sharers = min(shape.mixture.layers), build.mesh.extent("attention_tp")
    own = replace(build, deferred=False)
    without = made_up(shape.mlp(own, layer), layer, build.device)
    mlp = made_up(shape.mlp(replace(own, ways=Ways.always("gather")), layer), layer, build.device)
    assert isinstance(mlp, SparseMLP)
    calls: list[Call] = [without.forward, *(Dispatch(mlp, own, Ways.always(way), summed=shape.summed) for way in WAYS)]
    captured = [True, *(way in CAPTURED for way in WAYS)]
    times = []
    for size in (sizes[0], *sizes):  # once more at first, as what is run first takes longer
        steps = [made_up_step(size * sharers, shape.hidden_size, own, captured=each) for each in captured]
        runs = [partial(call, *step) for call, step in zip(calls, steps, strict=True)]
        times.append([_microseconds(run, each) for run, each in zip(runs, captured, strict=True)])
    del without, mlp, calls, runs
    gc.collect()  # what is in the place of a `forward` holds the module, which holds it: their memory is for weights
    if build.device.type == "cuda":
        torch.cuda.empty_cache()
    agreed: list[list[float]] = groups.slowest(torch.tensor(times[1:], device=build.device)).tolist()
    return agreed


def _told(sizes: list[int], times: list[list[float]]) -> str:
    names = ("gather", "gather with the shared expert whole", *WAYS[1:])
    parts = []
    for size, line in zip(sizes, times, strict=True):
        took = (f"{name} {each:.0f}" for name, each in zip(names, line, strict=True))
        parts.append(f"us of {size} tokens a rank: {', '.join(took)}")
    return "; ".join(parts)


def decided(sizes: list[int], times: list[list[float]]) -> Ways | None:
    """The fastest way of each size by what was `measured`; None where gathering alone is as good."""
    captured = [min(line[1 : 1 + len(CAPTURED)]) / line[0] for line in times]
    others = [min(line[1:]) / line[0] for line in times]
    gains = [math.log(each) for each in captured + others]
    if statistics.mean(gains) > math.log(1 - LEAST_GAIN):
        return None
    return Ways.fastest(sizes, [line[1:] for line in times])


def made_up(mlp: nn.Module, layer: int, device: torch.device) -> nn.Module:
    """`mlp` of that layer with weights at random, the same on all ranks where all hold them."""
    generator = torch.Generator(device)
    named = [(path, each) for path, each in mlp.named_modules() if isinstance(each, Layer)]
    for number, (path, each) in enumerate(named):
        each.named(f"model.layers.{layer}.mlp.{path}")
        each.fill_at_random(generator.manual_seed(number))
    for _, each in named:
        each.loaded()
    return mlp


def made_up_step(tokens: int, width: int, build: Build, *, captured: bool) -> tuple[Tensor, Batch]:
    """Hidden states [tokens, width] of each copy of attention, and a step of them, of which an MLP sees no more than
    this."""
    generator = torch.Generator(build.device).manual_seed(build.mesh.coordinates["dp"])
    hidden = torch.randn(tokens, width, generator=generator, device=build.device).to(build.dtype)
    none = torch.empty(0, dtype=torch.int64, device=build.device)
    lengths = np.empty(0, np.int64) if captured else np.array([tokens])
    names = ("ids", "positions", "places", "page_table", "slots", "row_starts", "row_offsets")
    parts: dict[str, Any] = dict.fromkeys(names, none) | {"starts": lengths, "lengths": lengths, "offsets": lengths}
    return hidden, Batch(**parts, caches=(), spread=Spread.of((tokens,) * build.mesh.dp, build.device))


def _microseconds(call: Callable[[], Tensor], captured: bool) -> float:
    """Of a call: on a GPU in a CUDA graph, if it can be `captured`; else as the host sees it."""
    device = call().device
    if device.type == "cuda" and captured:
        return graph_time(call)
    times = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - began))
    return statistics.median(times)


def exchange_of(model: Model) -> str:
    """How tokens reach the experts of other ranks, for people; nothing where there are none."""
    mixtures = [layer for layer in model.modules() if isinstance(layer, SparseMLP)]
    if not mixtures or mixtures[0].experts.build.mesh.ep == 1:
        return ""
    return str(mixtures[0].experts.build.ways or "gather")
