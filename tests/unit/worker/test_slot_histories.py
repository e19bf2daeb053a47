"""A scheduler and a runner together: a request gets what it gets alone, whoever had its slot and its pages before.

Few slots and few pages, so that requests take turns, wait, are cut into chunks and are retracted. The model looks at a
token and the one before it, which it reads from the cache, and says the same of them in every step to the last bit."""

from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.grammars.engines import Engines, grammar_engines
from engine.kernels.cpu.calls import kernels
from engine.layers.attention import AttentionBackend
from engine.layers.batch import Batch
from engine.layers.build import Build
from engine.layers.model import Model
from engine.messages.assets import Bound, Load
from engine.messages.grammars import GRAMMAR, PackedGrammar
from engine.messages.request import Admit
from engine.messages.step import Logprobs, SlotAdmit
from engine.params.grammar import Grammar
from engine.params.sampling import Sampling
from engine.plugin.registry import Plugins
from engine.plugin.specs import KVGroup, KVSpec, Vocabulary
from engine.plugin.testing import ModelHarness
from engine.sched import Scheduler
from engine.testing.steps import step_plan
from engine.worker.backends import Backends
from engine.worker.memory import allocate
from engine.worker.runner import Runner
from engine.worker.sampling.grammars import Grammars
from engine_plugins.models.llama import Llama
from engine_plugins.policies.order import FirstComeFirstServed

CPU = torch.device("cpu")
SLOTS, PAGES, PAGE, LONGEST = 2, 9, 4, 32
END = 26
WORDS = Vocabulary([*(bytes([97 + letter]) for letter in range(26)), b"<end>"], frozenset({END}), (END,))
SIZE = len(WORDS.tokens)
GRAMMARS = {1: "[a-d]{3,9}", 2: "(ab|cd)+x", 3: "z{12}"}


class Pairs(Model):
    """Logits are a function of the last two tokens."""

    def __init__(self, config: dict[str, Any], build: Build) -> None:
        super().__init__(config, build)
        self.vocab_size = SIZE
        generator = torch.Generator().manual_seed(0)
        self.table = (torch.randn(SIZE + 1, SIZE, SIZE, generator=generator) * 4).round() / 2

    def embed(self, batch: Batch) -> Tensor:
        return batch.ids[:, None]

    def run(self, hidden: Tensor, batch: Batch, first: int, last: int) -> Tensor:
        """[T, 2]: each token, and the one before it as the cache has it; SIZE before the first."""
        tokens = batch.caches[0][0].view(-1)
        tokens[batch.places] = hidden[:, 0].to(tokens.dtype)
        slots = batch.slots.repeat_interleave(batch.row_offsets.diff())
        earlier = (batch.positions - 1).clamp(min=0)
        before = tokens[batch.page_table[slots, earlier // PAGE].to(torch.int64) * PAGE + earlier % PAGE]
        return torch.stack((tokens[batch.places], torch.where(batch.positions > 0, before, SIZE)), dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        last, before = hidden.to(torch.int64).unbind(1)
        return self.table[before, last]

    def kv_spec(self) -> KVSpec:
        return KVSpec(PAGE, (KVGroup(1, (PAGE,), "float32"),))


def no_attention(*_: Any) -> AttentionBackend:
    raise AssertionError("the model does not attend")


@cache
def engines() -> Engines:
    return Engines(grammar_engines(Plugins.load(("llguidance",))), WORDS, threads=1, whitespace=True)


class Device:
    """A scheduler and its runner, two steps in flight."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(
            PAGES,
            PAGE,
            SLOTS,
            max_model_len=LONGEST,
            max_step_tokens=7,
            policy=FirstComeFirstServed(),
            prefix_cache=True,
            max_waiting=100,
        )
        build = Build(
            dtype=torch.float32, device=CPU, page_size=PAGE, max_model_len=LONGEST, attention_backend=no_attention
        )
        model = Pairs({}, build)
        with ThreadPoolExecutor(1) as thread:
            grammars = Grammars(engines(), thread, WORDS, slots=SLOTS, device=CPU, kernels=build.kernels.logits)
            for number, source in GRAMMARS.items():
                payload = msgspec.msgpack.encode(PackedGrammar("llguidance", Grammar("regex", source), b""))
                grammars.load(Load(GRAMMAR, number, payload), lambda _: None)
        size = {"slots": SLOTS, "max_model_len": LONGEST, "page_size": PAGE}
        self.runner = Runner(model, allocate(model.kv_spec(), PAGES, CPU), CPU, grammars=grammars, **size)
        self.launched: deque[Any] = deque()
        self.finished: deque[Any] = deque()
        self.said: dict[str, list[Any]] = {}

    def admit(self, rid: str, request: tuple[Admit, int]) -> None:
        admit, grammar = request
        self.said[rid] = []
        bound = (Bound(GRAMMAR, grammar),) if grammar else ()
        self.scheduler.admit(msgspec.structs.replace(admit, rid=rid), bound)

    def step(self) -> bool:
        """Launches a step and takes the result of the one before in; False where there is nothing to do."""
        plan, in_flight = self.scheduler.plan(), len(self.launched) + len(self.finished)
        if plan is not None:
            self.launched.append(self.runner.launch(plan, self.catch_up))
        if in_flight:
            self.commit()
        return plan is not None or in_flight > 0

    def catch_up(self) -> None:
        while self.launched:
            self.finished.append(self.runner.finish(self.launched.popleft()))

    def commit(self) -> None:
        if not self.finished:
            self.finished.append(self.runner.finish(self.launched.popleft()))
        done = self.finished.popleft()
        for rid, cause in self.scheduler.stuck(done):
            self.said[rid].append(cause)
            self.scheduler.abort(rid)
        if (told := self.scheduler.commit(done)) is None:
            return
        tokens = deque(array("i", told.tokens))
        for rid, count in zip(told.rids, array("i", told.counts), strict=True):
            self.said[rid] += [tokens.popleft() for _ in range(count)]
        for scores in (*told.logprobs, *told.prompt_logprobs):
            self.said[told.rids[scores.row]].append(unplaced(scores))

    def run(self) -> None:
        for _ in range(1000):
            if not self.step():
                return
        raise AssertionError("the requests do not come to an end")


def unplaced(scores: Logprobs) -> tuple[bytes, ...]:
    return scores.logprobs, scores.ranks, scores.top_ids, scores.top_logprobs


def packed(ids: list[int]) -> bytes:
    return np.array(ids, "<i4").tobytes()


@st.composite
def requests(draw: st.DrawFn) -> tuple[Admit, int]:
    def maybe(strategy: st.SearchStrategy[Any], otherwise: Any) -> Any:
        return draw(strategy) if draw(st.booleans()) else otherwise

    def ids(least: int, most: int, few: int) -> st.SearchStrategy[list[int]]:
        return st.lists(st.integers(0, few - 1), min_size=least, max_size=most)

    biases = maybe(st.dictionaries(st.integers(0, END), st.sampled_from([-100.0, 3.0])), {})
    min_tokens = maybe(st.integers(1, 4), 0)
    sampling = Sampling(
        temperature=maybe(st.sampled_from([0.5, 2.0]), 0.0),
        top_k=maybe(st.integers(1, SIZE), 0),
        top_p=maybe(st.sampled_from([0.3, 0.9]), 1.0),
        min_p=maybe(st.sampled_from([0.05, 0.5]), 0.0),
        seed=draw(st.integers(0, 5)),
        presence_penalty=maybe(st.just(2.0), 0.0),
        frequency_penalty=maybe(st.just(-1.0), 0.0),
        repetition_penalty=maybe(st.just(1.5), 1.0),
        bias_ids=packed([*biases]),
        biases=np.array([*biases.values()], "<f4").tobytes(),
        min_tokens=min_tokens,
        stop_ids=packed([END, 3]) if min_tokens else b"",
        bad_words=tuple(map(packed, maybe(st.lists(ids(1, 4, SIZE), min_size=1, max_size=20), []))),
        allowed_ids=packed(maybe(ids(1, 20, SIZE), [])),
        logprobs=maybe(st.integers(0, 2), -1),
        prompt_logprobs=maybe(st.integers(0, 2), -1),
    )
    # Prompts of few tokens begin alike, and so share pages.
    admit = Admit("", packed(draw(ids(1, 18, 2))), sampling, (END, 3), draw(st.integers(1, 12)))
    return admit, draw(st.sampled_from([0, 0, *GRAMMARS]))


def alone(request: tuple[Admit, int]) -> list[Any]:
    device = Device()
    device.admit("alone", request)
    device.run()
    return device.said["alone"]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(arrivals=st.lists(st.tuples(requests(), st.integers(0, 6), st.booleans()), min_size=2, max_size=7))
def test_a_request_gets_what_it_gets_alone(arrivals: list[tuple[tuple[Admit, int], int, bool]]) -> None:
    """Each arrival is a request, the steps until the next one comes, and whether its client then goes away."""
    device, gone = Device(), set()
    for number, (request, steps, leaves) in enumerate(arrivals):
        device.admit(str(number), request)
        for _ in range(steps):
            device.step()
        if leaves:
            device.scheduler.stop(str(number))
            gone.add(number)
    device.run()
    device.scheduler.check_integrity()
    for number, (request, _, _) in enumerate(arrivals):
        expected, said = alone(request), device.said[str(number)]
        assert said == (expected[: len(said)] if number in gone else expected)


def test_the_requests_are_retracted_share_pages_and_change_slots() -> None:
    """What the test above is about does happen on such a device."""
    device = Device()
    sampling = Sampling(1.0, 0, 1.0, 0.0, 0)
    for number in range(6):
        device.admit(str(number), (Admit("", packed([0, 1] * 6), sampling, (), 18), 0))
    device.run()
    counts = device.scheduler.counts()
    assert counts["retractions_total"] and counts["cached_tokens_total"]
    assert all(len(said) == 18 for said in device.said.values())


LLAMA = {
    "vocab_size": SIZE,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


def harness(backend: str) -> ModelHarness:
    """A tiny seeded llama on this attention backend."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    layer = {f"self_attn.{name}_proj.weight": (64 if name in "qo" else 32, 64) for name in "qkvo"}
    layer |= {"mlp.gate_proj.weight": (48, 64), "mlp.up_proj.weight": (48, 64), "mlp.down_proj.weight": (64, 48)}
    layer |= {"input_layernorm.weight": (64,), "post_attention_layernorm.weight": (64,)}
    shapes = {f"model.layers.{number}.{name}": shape for number in range(2) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (SIZE, 64), "lm_head.weight": (SIZE, 64), "model.norm.weight": (64,)}
    tensors = {name: random(*shape) for name, shape in shapes.items()}
    return ModelHarness(Llama, LLAMA, tensors, attention=Backends(Plugins.load((backend,)), "cpu").build)  # type: ignore[arg-type]


def replies(device: ModelHarness) -> list[tuple[bytes, Any, Any]]:
    """What three rows of different lengths are told, prompts in chunks and then six tokens each."""
    prompts = [[3, 1, 4, 1, 5, 9, 2], [6], [2, 7, 1, 8, 2]]
    asked = {"frequency_penalty": 1.0, "bad_words": (packed([1, 2]), packed([5])), "logprobs": 2, "prompt_logprobs": 1}
    sampling = Sampling(0.8, 12, 0.9, 0.01, 5, **asked)
    admits = tuple(SlotAdmit(slot, packed(ids), sampling, len(ids)) for slot, ids in enumerate(prompts))
    pages = [(slot, index, int(device.order[4 * slot + index])) for slot in range(3) for index in range(4)]
    steps = [[(0, 0, 4, 0), (1, 0, 1, 1)], [(0, 4, 3, 1), (1, 1, 1, 1), (2, 0, 5, 1)]]
    steps += [[(slot, length + at, 1, 1) for slot, length in enumerate((7, 2, 5))] for at in range(6)]
    done = []
    for number, rows in enumerate(steps):
        first = (admits, pages) if number == 0 else ()
        done.append(device.runner.finish(device.runner.launch(step_plan(number, rows, *first))))
    return [(step.tokens, step.logprobs, step.prompt_logprobs) for step in done]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_nothing_is_read_of_what_lies_in_tables_and_pages(backend: str) -> None:
    """Other tokens in the slots, other pages in their lines, other keys and values in the pages."""
    if backend == "cpu" and kernels() is None:
        pytest.skip("there is no C compiler here")
    used, fresh = harness(backend), harness(backend)
    runner = used.runner
    runner.tokens.random_(0, SIZE)
    runner.page_table.random_(0, len(used.order))
    for group in runner.caches:
        for layer in group:
            layer.normal_()
    runner.unscored[:] = 0, 30
    assert replies(used) == replies(fresh)
    assert replies(used) == replies(fresh), "nor does what they left themselves"
