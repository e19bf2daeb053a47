"""Layers of a model on ranks that are processes, without an engine: for rows of bench/engine/ranks.py.

`mixture_times` is a mixture by each way in which tokens reach experts, as a start measures it (engine/worker/ways.py).
`head_times` is the head where attention runs in copies: whole on each, as the engine has it; or divided over them, so
that each gathers the states of all, makes its tokens' logits, and sends these to where they belong, or no more than the
best one. On GPUs these run in CUDA graphs. Left out: drawing, which is the same work either way but for what travels.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from engine.kernels import choose
from engine.layers.build import Build
from engine.parallel.collectives import all_gather
from engine.parallel.groups import Groups
from engine.parallel.peers import graph_time
from engine.plugin.registry import Plugins
from engine.plugin.terms import Terms
from engine.testing.ranks import open_ranks
from engine.worker.backends import quantization
from engine.worker.ways import measured, mixture_of

HEADS = ("whole", "divided, all logits back", "divided, the best back")


@dataclass(frozen=True, slots=True)
class Source:
    plugins: Plugins
    terms: Terms

    @property
    def language(self) -> Terms:
        return self.terms


def on_ranks(ranks: int, gpus: bool, function: Callable[..., list[list[float]]], *arguments: Any) -> list[list[float]]:
    """What `function` finds on as many ranks, each with a copy of attention and experts of its own."""
    with TemporaryDirectory() as folder, open_ranks(Path(folder), tp=ranks, dp=ranks, ep=ranks, gpus=gpus) as opened:
        found: list[list[float]] = opened.run(function, *arguments)[0]
    return found


def mixture_times(groups: Groups, config: dict[str, Any], plugins: str, sizes: list[int]) -> list[list[float]]:
    """As `measured`, of the model that `config` describes."""
    source = Source(Plugins.load(tuple(filter(None, plugins.split(",")))), Terms(config))
    shape = mixture_of(source)
    assert shape is not None, "the model has no mixture"
    build = Build(
        dtype=torch.float32 if groups.device.type == "cpu" else torch.bfloat16,
        device=groups.device,
        page_size=16,
        max_model_len=1024,
        attention_backend=_none,
        quantization=quantization(source.plugins, source.terms),
        mesh=groups.mesh,
        groups=groups,
    )
    return measured(shape, build, sizes)


def _none(*_: object) -> Any:
    raise AssertionError("an MLP does not attend")


@torch.inference_mode()
def head_times(groups: Groups, size: int, vocab: int, rows: list[int]) -> list[list[float]]:
    """Microseconds of the head of `vocab` tokens for so many rows of each copy, in the order of `HEADS`."""
    copies, device = groups.along("dp"), groups.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    linear = choose(device, dtype).dense.linear
    share = -(-vocab // copies.size)
    generator = torch.Generator(device).manual_seed(0)
    whole = torch.randn(share * copies.size, size, generator=generator, device=device).to(dtype)
    own = whole[copies.place * share :][:share].clone()

    def sent(part: Tensor) -> Tensor:
        import torch.distributed as distributed

        out = torch.empty_like(part)
        distributed.all_to_all_single(out, part, group=copies.joined())
        return out

    def all_back(hidden: Tensor) -> Tensor:
        logits = sent(linear(all_gather(hidden, copies), own, None))  # of own rows, one rank's tokens after the other's
        return logits.unflatten(0, (copies.size, -1)).transpose(0, 1).flatten(1).contiguous()

    def best_back(hidden: Tensor) -> Tensor:
        scores, ids = linear(all_gather(hidden, copies), own, None).max(-1)
        found = sent(torch.stack((scores.to(torch.float64), ids.to(torch.float64) + share * copies.place), 1))
        by_rank = found.unflatten(0, (copies.size, -1))
        return by_rank[..., 1].gather(0, by_rank[..., 0].argmax(0, keepdim=True))[0]

    times = torch.zeros(len(rows), len(HEADS), device=device)
    for line, count in enumerate(rows):
        hidden = torch.randn(count, size, generator=generator.manual_seed(1 + copies.place), device=device).to(dtype)
        wanted = linear(hidden, whole, None)
        torch.testing.assert_close(all_back(hidden), wanted)
        assert (best_back(hidden) == wanted.argmax(-1)).to(torch.float32).mean() > 0.9  # but for equals
        for column, way in enumerate((lambda hidden: linear(hidden, whole, None), all_back, best_back)):
            times[line, column] = _microseconds(partial(way, hidden), device)
    found: list[list[float]] = groups.slowest(times).tolist()
    return found


def _microseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return graph_time(call)
    call()
    began = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - began)
