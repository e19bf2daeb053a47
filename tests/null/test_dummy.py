"""Dummy weights: a model from config.json alone, without tokenizer or tensors."""

import json
from pathlib import Path

import pytest

from engine import ConfigError, Engine, SamplingParams
from engine.worker.graphs import ladder

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
