"""A trace of steps on a GPU has the kernels of graphs, and the steps that they belong to."""

import gzip
import json
from pathlib import Path

import anyio
import pytest
import torch

from engine import AsyncEngine, SamplingParams
from engine.messages.questions import Profile

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
TERMS = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "vocab_size": 1000,
}


def test_a_trace_has_steps_and_kernels(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TERMS))

    async def traced() -> str:
        async with AsyncEngine(model=str(tmp_path), load="dummy", device="cuda", kv_tokens=4096) as engine:
            await engine.front.ready()
            await engine.front.ask(Profile(str(tmp_path / "traces"), 8))
            params = SamplingParams(temperature=0.5, max_tokens=20, ignore_eos=True)
            await engine.generate([[1, 2, 3], [4, 5]], params)
            return await engine.front.ask(Profile())

    with gzip.open(anyio.run(traced)) as file:
        events = json.load(file)["traceEvents"]
    steps = [
        event for event in events if str(event["name"]).startswith("step ") and event.get("cat") == "user_annotation"
    ]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    assert 8 <= len(steps) <= 10
    assert len(kernels) > 10 * len(steps), "kernels that a graph launches are in the trace too"
    assert any("draw" in event["name"] for event in kernels)
