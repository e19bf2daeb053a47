"""Grammars on a GPU: masks filled while graphs replay, in a batch with rows that are free, give what a CPU gives."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Engine, SamplingParams
from engine_plugins.checkpoints.echo import EchoCheckpoint

pytest.importorskip("llguidance")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
PROMPTS = [[97, 98, number] for number in range(40)]
SCHEMA = json.dumps(
    {
        "type": "array",
        "minItems": 2,
        "maxItems": 3,
        "items": {
            "type": "object",
            "required": ["id", "name"],
            "properties": {"id": {"type": "integer", "maximum": 99}, "name": {"type": "string", "maxLength": 5}},
        },
    }
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny seeded llama whose tokens are bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=256,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).float().eval().save_pretrained(folder)
    echo = EchoCheckpoint.open("echo")
    assert echo is not None
    echo.text().tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def asked(seed: int) -> SamplingParams:
    """Of every four, three under a grammar."""
    form: dict[str, Any] = ({}, {"json_schema": SCHEMA}, {"regex": "[a-f]{2,9}-[0-9]+x"}, {"choice": ("yes", "no")})[
        seed % 4
    ]
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=120, **form)


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": False}, {"max_step_tokens": 16}, {"kv_tokens": 2048}], ids=str)
def test_replies_are_of_their_forms_and_those_of_a_cpu(model: Path, options: dict[str, Any]) -> None:
    params = [asked(seed) for seed in range(len(PROMPTS))]
    with Engine(
        model=str(model), device="cuda", dtype="float32", **{"max_model_len": 256, "kv_tokens": 8192, **options}
    ) as engine:
        replies = engine.generate(PROMPTS, params)
    for seed, reply in enumerate(replies):
        if reply.finish != "stop" or seed % 4 == 0:
            continue
        if seed % 4 == 1:
            value = json.loads(reply.text)
            assert 2 <= len(value) <= 3 and all(len(item["name"]) <= 5 and item["id"] <= 99 for item in value)
        else:
            assert re.fullmatch("[a-f]{2,9}-[0-9]+x" if seed % 4 == 2 else "yes|no", reply.text), reply.text
    assert sum(reply.finish == "stop" for seed, reply in enumerate(replies) if seed % 4 == 3) == len(PROMPTS) // 4
    with Engine(model=str(model), device="cpu", max_model_len=256) as engine:
        expected = engine.generate(PROMPTS[:8], params[:8])
    same = sum(reply.ids == other.ids for reply, other in zip(replies, expected, strict=False))
    assert same >= 6, "float32 on a GPU rounds otherwise than on a CPU, but not so often"


def test_masks_are_compiled_before_requests_come(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Engine(model=str(model), device="cuda", dtype="bfloat16", max_model_len=256, kv_tokens=2048) as engine:
        for more in ({}, {"logprobs": 2}, {"top_p": 0.9}):
            assert engine.generate(PROMPTS[0], SamplingParams(max_tokens=5, choice=("yes",), **more)).text == "yes"
    assert "_bitmask_kernel" not in capfd.readouterr().err, "the log tells of kernels that are compiled later"


def test_a_row_that_no_token_is_left_for_ends_alone(model: Path) -> None:
    from engine import RequestError

    stuck = SamplingParams(max_tokens=5, choice=("yes",), allowed_token_ids=(1, 2))
    with Engine(model=str(model), device="cuda", dtype="float32", max_model_len=256, kv_tokens=2048) as engine:
        with pytest.raises(RequestError, match="leave no token"):
            engine.generate(PROMPTS[0], stuck)
        assert engine.generate(PROMPTS[0], SamplingParams(max_tokens=5, choice=("yes",))).text == "yes"
