"""Dummy weights: a model from config.json alone, without tokenizer or tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import ConfigError, Engine, SamplingParams, WorkerError
from engine.kernels.logits import reference
from engine.plugin.testing import ModelHarness
from engine.worker import runner
from engine.worker.start import Sizes, peak_bytes
from engine.worker.steps.graphs import ladder
from engine_plugins.models.echo import Echo

TERMS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": 1000,
}


def test_the_profile_run_asks_for_all_that_a_step_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peak is that of the largest step only if every row filters, penalises and wants log-probabilities."""
    asked: dict[str, list[int]] = {}
    harness = ModelHarness(Echo, {}, {})

    def watch(module: Any, name: str) -> None:
        function = getattr(module, name)

        def watched(*given: Any) -> Any:
            asked.setdefault(name, []).append(len(next(each for each in given if isinstance(each, torch.Tensor))))
            return function(*given)

        monkeypatch.setattr(module, name, watched)

    for module, names in (
        (harness.runner._logits, ("penalize", "edit", "apply_bitmask")),
        (runner, ("score", "score_prompt")),
        (reference, ("filtered", "_top_k", "_top_p")),
    ):
        for name in names:
            watch(module, name)
    peaks = iter((100, 5000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    model, cpu = harness.runner.model, torch.device("cpu")
    held = -(-(48 + 1) // 4) * model.kv_spec().page_bytes
    assert peak_bytes(model, cpu, Sizes(slots=5, step_tokens=48), max_model_len=64) == 4900 - held
    for name in ("penalize", "edit", "apply_bitmask", "score", "filtered", "_top_k", "_top_p"):
        assert asked[name][:2] == [5, 5], f"{name}: a step with prompts, and one of decode rows"
    assert asked["score_prompt"][0] == 5 * (48 // 5 - 1)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(TERMS))
    return str(tmp_path)


def test_dummy_weights_answer_the_same_in_each_run(folder: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    replies = []
    for _ in range(2):
        with Engine(model=folder, load="dummy", threads=1) as engine:
            replies.append(engine.generate([[1, 2, 999], [5]], params))
    assert [reply.ids for reply in replies[0]] == [reply.ids for reply in replies[1]]
    assert [len(reply.ids) for reply in replies[0]] == [6, 6]
    assert len({*replies[0][0].ids, *replies[0][1].ids}) > 2, "a model that says one thing only is no benchmark"


def test_a_quantization_named_on_a_checkpoint_without_one(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    with Engine(model=folder, load="dummy", threads=1, plugins=("fp8",)) as engine:
        (reply,) = engine.generate([[1, 2, 999]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert len(reply.ids) == 3
    assert "quantization fp8 (named in --plugins" in capfd.readouterr().err


def test_a_quantization_that_nobody_knows(tmp_path: Path) -> None:
    terms = TERMS | {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(terms))
    with pytest.raises(WorkerError, match="quant_method is 'awq', which no quantization reads; known: fp8 reads fp8"):
        Engine(model=str(tmp_path), load="dummy", threads=1)


def test_without_dummy_weights_a_tokenizer_is_asked_for(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer.json|no .safetensors"):
        Engine(model=folder, threads=1)


@pytest.mark.parametrize("most", [1, 3, 64, 100, 256, 1000])
def test_the_ladder_of_graphs_wastes_little(most: int) -> None:
    sizes = ladder(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most and sizes[0] == 1
    for rows in range(9, most + 1):
        size = next(size for size in sizes if size >= rows)
        assert size <= max(16, rows * 1.5), f"{rows} rows run as {size}"
