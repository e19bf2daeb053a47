"""The whole engine on a GPU: a tiny seeded llama in float32 gives the greedy ids that transformers gives on a CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import Engine, SamplingParams
from engine_plugins.checkpoints.echo import EchoCheckpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
ON_A_GPU: dict[str, Any] = {"device": "cuda", "kv_tokens": 8192}  # little, so that others can run beside
LENGTHS = (3, 17, 40, 64, 5, 40)
NEW = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], list[list[int]]]:
    """A checkpoint, prompts, and the ids that follow them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=256,
    )
    llama = LlamaForCausalLM(config).float().eval()
    for weight in llama.parameters():
        if weight.dim() == 2:
            weight.data.normal_(0, 0.08)
    folder = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(folder)
    echo = EchoCheckpoint.open("echo")
    assert echo is not None
    echo.text().tokenizer.save(str(folder / "tokenizer.json"))
    prompts = [torch.randint(0, 256, (length,)).tolist() for length in LENGTHS]
    wanted = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(NEW):
                ids.append(int(llama(torch.tensor([ids])).logits[0, -1].argmax()))
            wanted.append(ids[len(prompt) :])
    return folder, prompts, wanted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_step_tokens": 7},
        {"kv_tokens": 192, "max_model_len": 128, "max_running": 6},
        {"placement": "split", "page_size": 1},
    ],
    ids=["whole", "chunked", "few pages", "split, single-token pages"],
)
def test_greedy_ids_are_those_of_transformers(model: Any, options: dict[str, Any]) -> None:
    folder, prompts, wanted = model
    params, before = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True), torch.cuda.is_initialized()
    with Engine(model=str(folder), dtype="float32", **(ON_A_GPU | options)) as engine:
        assert [engine.generate(prompt, params).ids for prompt in prompts] == wanted
        assert [reply.ids for reply in engine.generate(prompts, params)] == wanted
    assert torch.cuda.is_initialized() == before, "the front process must leave the GPU to the worker"


def test_a_seeded_reply_does_not_depend_on_its_neighbours(model: Any) -> None:
    """In float32: matrix products of other sizes are rounded otherwise, which in bfloat16 may show in a token."""
    folder, prompts, _ = model
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=16, ignore_eos=True)
    with Engine(model=str(folder), **ON_A_GPU, dtype="float32") as engine:
        alone = engine.generate(prompts[1], params)
        assert engine.generate([*prompts, prompts[1]], params)[-1].ids == alone.ids


@pytest.mark.parametrize(
    ("options", "error"),
    [({}, 0.1), ({"cuda_graphs": False}, 0.1), ({"kv_dtype": "fp8"}, 0.4)],
    ids=["graphs", "eager", "fp8 cache"],
)
def test_bfloat16_with_and_without_graphs_and_with_an_fp8_cache(
    model: Any, options: dict[str, Any], error: float
) -> None:
    """The first token's log-probability is that of float32 but for rounding, in each way to compute it.

    Keys and values in E4M3 move those of such random models by 0.05 to 0.3: the next test knows by how much."""
    folder, prompts, _ = model
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=5)
    with Engine(model=str(folder), **ON_A_GPU, dtype="float32") as engine:
        exact = [reply.logprobs[0] for reply in engine.generate(prompts, params)]
    with Engine(model=str(folder), **ON_A_GPU, dtype="bfloat16", **options) as engine:
        replies = engine.generate(prompts, params)
    for reply, first in zip(replies, exact, strict=True):
        near = {top.id: top.logprob for top in first.top}
        assert reply.ids[0] in near
        assert abs(reply.logprobs[0].logprob - near[reply.ids[0]]) < error


def test_an_fp8_cache_is_keys_and_values_rounded_to_e4m3(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, against transformers with both rounded. A number between two of E4M3's may go the other way."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    folder, prompts, _ = model
    attend: Callable[..., Any] = modeling_llama.eager_attention_forward

    def rounded(module: Any, query: Tensor, *keys_and_values: Tensor, **terms: Any) -> Any:
        *pair, mask = keys_and_values
        return attend(module, query, *(part.to(torch.float8_e4m3fn).to(part.dtype) for part in pair), mask, **terms)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", rounded)
    llama = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    with torch.inference_mode():
        wanted = [llama(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=1)
    with Engine(model=str(folder), **ON_A_GPU, dtype="float32", kv_dtype="fp8") as engine:
        replies = engine.generate(prompts, params)
    for reply, scores in zip(replies, wanted, strict=True):
        assert abs(reply.logprobs[0].logprob - float(scores[reply.ids[0]])) < 0.05
        assert float(scores.max() - scores[reply.ids[0]]) < 0.05
