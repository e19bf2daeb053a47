"""A model whose tokens are sent to the ranks of their experts, as a rank of several runs it. It imports little, because
each rank does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_attention import PlainAttention, captured
from rank_replies import replaying

from engine.kernels.experts.reference import MoeOps
from engine.layers.build import Build
from engine.layers.dispatch import Dispatch
from engine.layers.moe import SparseMLP
from engine.options.parallel import ParallelOptions
from engine.parallel.exchange import Exchange
from engine.parallel.groups import Groups
from engine.parallel.ways import Ways
from engine.plugin.registry import resolve
from engine.plugin.terms import Terms
from engine.testing.models import ModelHarness
from engine.worker import rebalance
from engine.worker.experts import ExpertWatch, experts_of, routers_of
from engine.worker.steps import graphs
from engine.worker.ways import exchange_of, made_up, made_up_step, measured
from engine_plugins.models.deepseek import Deepseek
from engine_plugins.quantization.fp8 import Fp8

PROMPTS = [[(7 * i + 3 * j) % 89 for i in range(length)] for j, length in enumerate((21, 9, 14))]
COUNT = 14
LAYER = 1  # which has a mixture
MIXED = Ways((4, 64), ("gather", "places"), ("gather", "counts"))  # decode steps, and steps with prompts
Said = tuple[list[list[int]], list[list[int]]]


def replies(groups: Groups | None, model: str, file: Path, ways: Ways | None, options: dict[str, Any]) -> Said:
    """What the model of `file` says to each prompt, of several copies to those of this one; and how often each expert
    of each layer was chosen, by any rank's tokens.

    Of the options, `slots` are the prompts', and `redundant` is how many copies of experts there are; if it `captures`,
    each step replays a graph; if it `moves`, experts lie elsewhere after every few steps."""
    config, tensors = torch.load(file, weights_only=False)
    redundant, moves = options.get("redundant", 0), options.get("moves", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "captured", captured)
        patch.setattr(rebalance, "LEAST_GAIN", -1.0)  # whatever is counted, they move
        harness = ModelHarness(
            resolve(model),
            config,
            tensors,
            attention=PlainAttention if options.get("captures") else None,
            groups=groups,
            redundant_experts=redundant,
            ways=ways,
        )
        if options.get("captures"):
            replaying(harness)
        watch = watched(harness, redundant) if moves else ExpertWatch(harness.runner.model)
        watch.count("start")
        said = harness.greedy(PROMPTS, COUNT, slots=options.get("slots"))
        counts = np.frombuffer(watch.count("stop").counts, "<i8").reshape(len(routers_of(harness.runner.model)), -1)
    assert not moves or watch.rebalancer.moved >= len(experts_of(harness.runner.model))
    return said, counts.tolist()


def watched(harness: ModelHarness, redundant: int) -> ExpertWatch:
    """One that looks on as steps are launched, and moves experts."""
    options = ParallelOptions(rebalance_threshold=1.0, rebalance_tokens=1, redundant_experts=redundant)
    watch, launch = ExpertWatch(harness.runner.model, parallel=options, window=3), harness.runner.launch

    def launched(*arguments: Any) -> Any:
        watch.step()
        return launch(*arguments)

    harness.runner.launch = launched  # type: ignore[method-assign]
    return watch


@torch.inference_mode()
def sent_as_fp8(groups: Groups, model: str, file: Path) -> tuple[float, list[list[str]]]:
    """How far a mixture's results are from those of hidden states that travel whole, over their norm; and the types in
    which either travels."""
    config, tensors = torch.load(file, weights_only=False)
    harness = ModelHarness(resolve(model), config, tensors, groups=groups, ways=Ways.always("places"))
    mlp = next(layer for layer in harness.runner.model.modules() if isinstance(layer, SparseMLP))
    hidden, batch = made_up_step(5, config["hidden_size"], mlp.experts.build, captured=True)
    packed, kinds = Exchange._packed, list[list[str]]()

    def seen(exchange: Exchange, states: torch.Tensor) -> list[torch.Tensor]:
        parts = packed(exchange, states)
        kinds.append([str(part.dtype) for part in parts])
        return parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "_packed", seen)
        whole = mlp(hidden, batch)
        patch.setattr(MoeOps, "rounds", lambda *_: True)
        rounded = mlp(hidden, batch)
    return float((rounded - whole).norm() / whole.norm()), kinds


def measured_here(
    groups: Groups, model: str, file: Path, sizes: list[int]
) -> tuple[list[list[float]], tuple[str, str], list[str]]:
    """What the ranks measure for the model of `file`; how it says that tokens travel, with ways and without; and what
    was measured, in order."""
    config, tensors = torch.load(file, weights_only=False)
    family = resolve(model)
    found = [ModelHarness(family, config, tensors, groups=groups, ways=way).runner.model for way in (None, MIXED)]
    ran: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_by_gathering", "_by_sending"):
            patch.setattr(Dispatch, name, noted(getattr(Dispatch, name), ran))
        times = measured(family.decoder_shape(Terms(config)), found[0].lm_head.build, sizes)
    return times, (exchange_of(found[0]), exchange_of(found[1])), ran


def noted(method: Callable[..., Any], ran: list[str]) -> Callable[..., Any]:
    def called(*arguments: Any, **named: Any) -> Any:
        ran.append(f"{len(arguments[1])} {method.__name__} {named.get('fixed', '')}".strip())
        return method(*arguments, **named)

    return called


@torch.inference_mode()
def mixture_by(
    groups: Groups, config: dict[str, Any], every: list[Ways], tokens: int, fp8: bool, captures: bool
) -> list[torch.Tensor]:
    """What a mixture of the DeepSeek of that `config` makes of this rank's tokens by each of the ways: in float32 on a
    CPU, and in a CUDA graph that is replayed if it `captures`."""
    shape, made = Deepseek.decoder_shape(Terms(config)), []
    for ways in every:
        build = Build(
            dtype=torch.float32 if groups.device.type == "cpu" else torch.bfloat16,
            device=groups.device,
            page_size=4,
            max_model_len=64,
            attention_backend=PlainAttention,
            quantization=Fp8({"quant_method": "fp8", "weight_block_size": [128, 128]}) if fp8 else None,
            mesh=groups.mesh,
            groups=groups,
            ways=ways,
        )
        mlp = made_up(shape.mlp(build, LAYER), LAYER, groups.device)
        hidden, batch = made_up_step(tokens, shape.hidden_size, build, captured=captures)
        out = mlp(hidden, batch)
        if captures:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out = mlp(hidden, batch)
            out.zero_()
            graph.replay()
        made.append(out.to(torch.float32).cpu())
    return made
