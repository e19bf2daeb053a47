"""Contract checks of models: a prompt whole, in chunks, in a batch, cached or in a used slot gives one reply.

Imports torch."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from engine.layers.attention import Backend
from engine.layers.build import Build, Scheme
from engine.layers.model import Model
from engine.messages.step import SlotAdmit, StepPlan
from engine.parallel.groups import Groups
from engine.parallel.mesh import ALONE
from engine.parallel.pipeline import Pipeline
from engine.parallel.ways import Ways
from engine.params.sampling import Sampling
from engine.plugin.registry import Plugins
from engine.plugin.terms import Terms
from engine.testing.steps import step_plan
from engine.testing.tensors import assert_close
from engine.worker.backends import Backends
from engine.worker.memory import allocate
from engine.worker.runner import Runner
from engine.worker.steps.copies import Copy
from engine.worker.steps.results import Step
from engine.worker.steps.rows import Rows

# ── models ───────────────────────────────────────────────────────────────────────────────────

Reference = Callable[[list[int]], Tensor]  # ids to logits [len(ids), vocab_size]


class ModelHarness:
    """A model with caches and tables, driven as the worker drives it; request i has slot i.

    Pages of the requests are scattered. `tensors` maps names in the checkpoint to weights. With `groups` it is one rank
    of several, which all do the same; with a `pipeline` one of its stages, of which the last has the tokens. Where
    attention runs in copies, each has `slots` slots, and its ranks have its tokens.
    """

    page_size = 4
    slots = 4

    def __init__(
        self,
        model: type[Model],
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        attention: type[Backend] | None = None,
        quantization: Scheme | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_model_len: int = 64,
        groups: Groups | None = None,
        pipeline: Pipeline | None = None,
        redundant_experts: int = 0,
        ways: Ways | None = None,
    ) -> None:
        build = Build(
            dtype=dtype,
            device=torch.device(device),
            page_size=self.page_size,
            max_model_len=max_model_len,
            attention_backend=attention or Backends(Plugins.load(), torch.device(device).type).build,
            mesh=groups.mesh if groups is not None else ALONE,
            groups=groups,
            quantization=quantization,
            redundant_experts=redundant_experts,
            ways=ways,
            deferred=True,
        )
        built = model(Terms(config), build)
        with torch.inference_mode():
            built.load(tensors.items())
        self.each = -(-max_model_len // self.page_size)
        scratch_page = self.each * self.slots
        caches = allocate(built.kv_spec(), scratch_page + 1, build.device)
        mesh = build.mesh
        copy = Copy(mesh.coordinates["dp"], mesh.dp, self.slots) if mesh.dp > 1 else None
        self.runner = Runner(
            built,
            caches,
            build.device,
            slots=self.slots,
            max_model_len=max_model_len,
            page_size=self.page_size,
            pipeline=pipeline,
            copy=copy,
        )
        if copy is None:
            self.runner.page_table[-1] = scratch_page
        self.order = np.random.default_rng(0).permutation(self.each * self.slots)

    def admit(
        self,
        prompts: Iterable[list[int]],
        cached: Mapping[int, tuple[int, int]] | None = None,
        slots: Sequence[int] | None = None,
    ) -> StepPlan:
        """A plan without rows that gives prompts `slots`, by default the first ones, and pages. `cached` maps a slot to
        (owner, count): its first `count` pages are those of slot `owner`."""
        greedy = Sampling(0.0, 0, 1.0, 0.0, 0)
        named = zip(range(self.slots) if slots is None else slots, prompts, strict=False)
        admits = tuple(SlotAdmit(slot, np.array(ids, "<i4").tobytes(), greedy) for slot, ids in named)
        pages = self.order.reshape(self.slots, self.each).copy()
        for slot, (owner, count) in (cached or {}).items():
            pages[slot, :count] = pages[owner, :count]
        triples = [
            (admit.slot, index, pages[admit.slot % self.slots, index]) for admit in admits for index in range(self.each)
        ]
        return step_plan(0, [], admits, triples)

    @torch.inference_mode()
    def logits(self, rows: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """Logits at every position of a step's rows (slot, start, length): [length, vocab_size] each."""
        hidden, _ = self.runner.compute(Rows.of(np.array([[*row, 0] for row in rows])))
        return list(self.runner.model.logits(hidden).cpu().split([length for _, _, length in rows]))

    def greedy(
        self, prompts: Sequence[list[int]], count: int, ahead: int = 3, slots: Sequence[int] | None = None
    ) -> list[list[int]]:
        """The next `count` ids of each prompt, which have `slots`, ascending; of several copies of attention, those of
        this one. Steps are launched without looking at the results of those before, as the engine does, and `ahead` of
        them."""
        slots = range(len(prompts)) if slots is None else slots
        plan = self.admit(prompts, slots=slots)
        steps: deque[Step] = deque()
        done: list[np.ndarray] = []

        def finish_first() -> None:
            done.append(np.frombuffer(self.runner.finish(steps.popleft()).tokens, "<i4"))

        for step in range(count):
            rows = [
                (slot, len(ids) + step - 1, 1, 1) if step else (slot, 0, len(ids), 1)
                for slot, ids in zip(slots, prompts, strict=True)
            ]
            if len(steps) == ahead:
                finish_first()
            steps.append(self.runner.launch(replace(step_plan(step, rows), admits=plan.admits, pages=plan.pages)))
            plan = StepPlan(0)
        while steps:
            finish_first()
        return np.stack(done, axis=1).tolist()


def _whole(harness: ModelHarness, reference: Reference, prompts: list[list[int]], tolerance: float) -> None:
    harness.runner.apply(harness.admit(prompts[:1]))
    (got,) = harness.logits([(0, 0, len(prompts[0]))])
    assert_close(got, reference(prompts[0]), tolerance, "a whole prompt's logits")


def _chunked(harness: ModelHarness, reference: Reference, prompts: list[list[int]], tolerance: float) -> None:
    harness.runner.apply(harness.admit(prompts[:1]))
    bounds = [0, 1, 6, 8, len(prompts[0]) - 1, len(prompts[0])]
    got = torch.cat([harness.logits([(0, start, end - start)])[0] for start, end in pairwise(bounds)])
    assert_close(got, reference(prompts[0]), tolerance, f"the logits of a prompt in chunks that end at {bounds[1:]}")


def _batched(harness: ModelHarness, reference: Reference, prompts: list[list[int]], tolerance: float) -> None:
    harness.runner.apply(harness.admit(prompts))
    first = harness.logits([(0, 0, 5), (1, 0, len(prompts[1]) - 1)])
    rest = [(2, 0, len(prompts[2])), (1, len(prompts[1]) - 1, 1), (0, 5, len(prompts[0]) - 5)]
    two, one, zero = harness.logits(rest)
    for slot, got in enumerate((torch.cat((first[0], zero)), torch.cat((first[1], one)), two)):
        assert_close(got, reference(prompts[slot]), tolerance, f"the logits of row {slot} of a mixed batch")


def _cached(harness: ModelHarness, reference: Reference, prompts: list[list[int]], tolerance: float) -> None:
    """Slot 1 finds its first pages computed by slot 0 before, slot 2 by slot 0 in the same step. A model with states
    never gets cached pages."""
    if harness.runner.states:
        return
    owner = prompts[0]
    ids = [owner, owner[:8] + prompts[1], owner[:12] + prompts[2]]
    harness.runner.apply(harness.admit(ids, cached={1: (0, 2), 2: (0, 3)}))
    harness.logits([(0, 0, 8)])
    rows = [(2, 12, len(ids[2]) - 12), (1, 8, len(ids[1]) - 8), (0, 8, len(owner) - 8)]
    for (slot, start, _), got in zip(rows, harness.logits(rows), strict=True):
        where = f"the logits of slot {slot}, whose first {start} tokens are cached"
        assert_close(got, reference(ids[slot])[start:], tolerance, where)


def _reused(harness: ModelHarness, reference: Reference, prompts: list[list[int]], tolerance: float) -> None:
    """The slots had other requests, one of which ended within its prompt."""
    harness.runner.apply(harness.admit(prompts[1:]))
    harness.logits([(0, 0, 4), (1, 0, len(prompts[2]))])
    harness.runner.apply(harness.admit(prompts[:2]))
    rows = [(1, 0, len(prompts[1])), (0, 0, len(prompts[0]))]
    for (slot, _, _), got in zip(rows, harness.logits(rows), strict=True):
        assert_close(got, reference(prompts[slot]), tolerance, f"the logits of slot {slot}, which had another request")


def _padded(harness: ModelHarness, reference: Reference, prompts: list[list[int]], tolerance: float) -> None:
    """Beside rows of the scratch slot, as captured steps have them; slot 1 waits for a step."""
    harness.runner.apply(harness.admit(prompts[:2]))
    padding, lengths = [(harness.slots, 0, 1)] * 2, [len(ids) for ids in prompts]
    steps = [[(0, 0, 5), (1, 0, lengths[1] - 1)], [(0, 5, lengths[0] - 5)], [(1, lengths[1] - 1, 1)]]
    parts: dict[int, list[Tensor]] = {0: [], 1: []}
    for rows in steps:
        for (slot, _, _), got in zip(rows, harness.logits([*rows, *padding]), strict=False):
            parts[slot].append(got)
    for slot, computed in parts.items():
        got = torch.cat(computed)
        assert_close(got, reference(prompts[slot]), tolerance, f"the logits of slot {slot} beside padding")


def _greedy(harness: ModelHarness, reference: Reference, prompts: list[list[int]], tolerance: float) -> None:
    count = 10
    done = harness.greedy(prompts, count)
    for slot, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(reference(ids)[-1].argmax()))
        got = done[slot]
        assert got == ids[len(prompt) :], f"greedy ids of row {slot} are {got}, not {ids[len(prompt) :]}"


_SCENARIOS = {
    "whole": _whole,
    "chunked": _chunked,
    "batched": _batched,
    "cached": _cached,
    "reused": _reused,
    "padded": _padded,
    "greedy": _greedy,
}
MODEL_SCENARIOS: tuple[str, ...] = tuple(_SCENARIOS)


def check_model(
    model: type[Model],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    reference: Reference,
    scenario: str,
    *,
    attention: type[Backend] | None = None,
    quantization: Scheme | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-4,
) -> None:
    """Runs one of MODEL_SCENARIOS: a whole prompt, one in chunks, among other rows, with cached pages, in a slot that
    had another request, beside padding, and greedy decoding; compares logits, or ids, with `reference` (ids to logits
    [len(ids), vocab_size]).

    `config` is in config.json's terms; 16 tokens of vocabulary and 64 positions are enough. `attention` is by
    default the built-in choice for `device`. With a `quantization`, `reference` is of the weights as they are stored.
    """
    harness = ModelHarness(
        model, config, tensors, attention=attention, quantization=quantization, device=device, dtype=dtype
    )
    generator = np.random.default_rng(1)
    vocab_size = harness.runner.model.vocab_size
    prompts = [generator.integers(0, vocab_size, length).tolist() for length in (21, 9, 14)]
    _SCENARIOS[scenario](harness, reference, prompts, tolerance)
