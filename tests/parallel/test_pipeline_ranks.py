"""Stages in processes of their own: a model in a pipeline gives the greedy ids of the whole one, in float32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recurrent
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from oracle import tiny
from rank_replies import prompts
from test_tensor_parallel import EXPERTS, LATENT, MODELS

from engine.messages.control import Ask
from engine.messages.questions import CountAction, CountExperts, ExpertCounts
from engine.messages.step import NOTHING, TOKEN, StepDone, StepPlan
from engine.parallel.groups import Groups
from engine.parallel.pipeline import join_stages
from engine.plugin.registry import resolve
from engine.plugin.testing import ModelHarness
from engine.testing.ranks import Ranks, open_ranks
from engine.testing.steps import step_plan
from engine.worker.experts import ExpertWatch, alone
from engine.worker.profiling import StepProfiler
from engine.worker.questions import Questions

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (f"{MODELS}.llama:Llama", "Llama", {}),
    "tied": (f"{MODELS}.llama:Llama", "Llama", {"tie_word_embeddings": True}),
    "two kinds of layers": (f"{MODELS}.gemma:Gemma3", "Gemma3", {"head_dim": 8, "sliding_window": 7}),
    "mixture": (f"{MODELS}.qwen3_moe:Qwen3Moe", "Qwen3Moe", EXPERTS),
    "latent attention": (f"{MODELS}.deepseek:Deepseek", "DeepseekV3", {**LATENT, "q_lora_rank": 20}),
    "recurrent layers": ("recurrent:ToyRecurrent", "", {}),
}
FEW = ("llama", "recurrent layers")  # beside the matrix
MATRIX = pytest.mark.matrix
STEPS, AGAIN = 12, 6
LOGPROBS = 3


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with open_ranks(tmp_path_factory.mktemp("ranks"), tp=1, pp=2) as opened:
        opened.run(meet)
        yield opened


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with open_ranks(tmp_path_factory.mktemp("ranks"), tp=2, pp=2) as opened:
        opened.run(meet)
        yield opened


PIPELINE: Any = None  # of a rank's process


def meet(groups: Groups) -> None:
    global PIPELINE
    PIPELINE = join_stages(groups)


def plans(asked: list[list[int]]) -> list[StepPlan]:
    """Two lanes: the first and the third prompt, of which the first comes in chunks, and the second. A lane's next step
    is planned, and launched, before the one of the other lane is over. In the midst of it slot 1 has a new request: the
    token on its way to that slot would stand in the new prompt."""
    first, second, third = (len(ids) for ids in asked)
    made = [
        [(0, 0, 10, NOTHING), (2, 0, third, TOKEN)],
        [(0, 10, first - 10, TOKEN), (1, 0, second, TOKEN)],
    ]
    for step in range(STEPS):
        made.append([(2, third + step, 1, TOKEN), (0, first + step, 1, TOKEN)])
        after = step - AGAIN
        if after == 0:
            made.append([(1, 0, first, TOKEN)])
        else:
            made.append([(1, second + step if after < 0 else first + after - 1, 1, TOKEN)])
    return [step_plan(number, rows) for number, rows in enumerate(made)]


def replies(groups: Groups | None, model: str, file: Path, logprobs: int) -> tuple[list[list[int]], NDArray[Any]]:
    """What is drawn in each step, and the log-probabilities of that and of the first prompt."""
    config, tensors = torch.load(file, weights_only=False)
    harness = ModelHarness(resolve(model), config, tensors, groups=groups, pipeline=PIPELINE if groups else None)
    runner, asked = harness.runner, prompts(config["vocab_size"])
    admitted = harness.admit(asked)
    admits = tuple(
        replace(
            admit,
            sampling=replace(admit.sampling, logprobs=logprobs, prompt_logprobs=logprobs if not admit.slot else -1),
            prompt_len=len(admit.ids) // 4,
        )
        for admit in admitted.admits
    )
    again = replace(admits[1], ids=np.array(asked[0][::-1], "<i4").tobytes())
    done: list[StepDone] = []
    under_way = []
    for number, plan in enumerate(plans(asked)):
        if number == 0:
            plan = replace(plan, admits=admits, pages=admitted.pages)
        if number == 3 + 2 * AGAIN:
            plan = replace(plan, admits=(again,))
        under_way.append(runner.launch(plan))
        if len(under_way) == 3:
            done.append(runner.finish(under_way.pop(0)))
    done += [runner.finish(step) for step in under_way]
    if runner.stage is not None:
        runner.stage.settle()
    scores = b"".join(part.logprobs for each in done for part in (*each.prompt_logprobs, *each.logprobs))
    return [np.frombuffer(each.tokens, "<i4").tolist() for each in done], np.frombuffer(scores, "<f4")


def counted(groups: Groups | None, model: str, file: Path) -> ExpertCounts:
    """How often experts were chosen for the tokens of some steps."""
    config, tensors = torch.load(file, weights_only=False)
    harness = ModelHarness(resolve(model), config, tensors, groups=groups, pipeline=PIPELINE if groups else None)
    runner, asked = harness.runner, prompts(config["vocab_size"])
    gathered = alone if runner.stage is None else runner.stage.pipeline.gathered
    questions = Questions(ExpertWatch(runner.model, gathered), StepProfiler(runner.device), lambda: 0)

    def ask(action: CountAction) -> ExpertCounts:
        question = CountExperts(action)
        return question.read(questions.answer(Ask(1, question.packed())).value)

    assert ask("start").counting
    admitted = harness.admit(asked)
    for plan in plans(asked)[:4]:
        whole = replace(plan, admits=admitted.admits, pages=admitted.pages) if plan.step == 0 else plan
        runner.finish(runner.launch(whole))
    if runner.stage is not None:
        runner.stage.settle()
    return ask("stop")


def test_counts_of_experts_are_those_of_all_stages(two: Ranks, tmp_path: Path) -> None:
    model, family, changes = CASES["mixture"]
    torch.save(tiny(family, **changes)[:2], tmp_path / "model")
    wanted = counted(None, model, tmp_path / "model")
    assert wanted.layers == (0, 1, 2) and sum(np.frombuffer(wanted.counts, "<i8")) == 3 * 3 * (21 + 9 + 14 + 3)
    assert two.run(counted, model, tmp_path / "model") == [wanted, wanted]


def check(ranks: Ranks, case: str, folder: Path, logprobs: int) -> None:
    model, family, changes = CASES[case]
    file = folder / "model"
    torch.save(tiny(family, **changes)[:2] if family else (recurrent.CONFIG, recurrent.weights()), file)
    said, scores = replies(None, model, file, logprobs)
    assert len({token for reply in said for token in reply}) > 2  # decided, and not all alike
    answers = ranks.run(replies, model, file, logprobs)
    last = answers[len(answers) // 2 :]
    assert all(tokens == said for tokens, _ in last)
    assert all(not any(tokens) for tokens, _ in answers[: len(answers) // 2])
    assert len(scores) == (len(prompts(9)[0]) - 1 + sum(len(tokens) for tokens in said) if logprobs >= 0 else 0)
    for _, found in last:
        np.testing.assert_allclose(found, scores, atol=1e-4)


@pytest.mark.parametrize("logprobs", [-1, LOGPROBS])
@pytest.mark.parametrize("case", [case if case in FEW else pytest.param(case, marks=MATRIX) for case in CASES])
def test_two_stages_reply_as_one(case: str, logprobs: int, two: Ranks, tmp_path: Path) -> None:
    check(two, case, tmp_path, logprobs)


@pytest.mark.parametrize("case", [case if case == "mixture" else pytest.param(case, marks=MATRIX) for case in CASES])
def test_two_stages_of_two_ranks_reply_as_one(case: str, four: Ranks, tmp_path: Path) -> None:
    check(four, case, tmp_path, LOGPROBS)
