"""The model of docs/plugins.md, as it stands there, keeps the contract of models."""

import re
from pathlib import Path

import pytest
import torch

from engine.plugin.testing import MODEL_SCENARIOS, check_model

GUIDE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
SIZE, HEADS, VOCABULARY = 8, 2, 16
CONFIG = {"hidden_size": SIZE, "num_attention_heads": HEADS, "vocab_size": VOCABULARY}


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tall = dict.fromkeys(("embed_tokens", "lm_head"), (VOCABULARY, SIZE))
    square = {f"{name}_proj": (SIZE, SIZE) for name in "qkvo"}
    return {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in (tall | square).items()}


@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
def test_the_model_of_the_guide(scenario: str) -> None:
    (source,) = re.findall(r"```python\n(from engine\.plugin\.layers import .*?)```", GUIDE, re.DOTALL)
    names: dict[str, type] = {}
    exec(source, names)
    tensors = weights()

    def reference(ids: list[int]) -> torch.Tensor:
        weight = {name.removesuffix(".weight"): tensor.double() for name, tensor in tensors.items()}
        hidden = weight["embed_tokens"][ids]
        parts = (hidden @ weight[f"{name}_proj"].T for name in "qkv")
        query, key, value = (part.view(len(ids), HEADS, -1).transpose(0, 1) for part in parts)
        scores = (query @ key.transpose(1, 2) / (SIZE // HEADS) ** 0.5).masked_fill(
            torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1), -torch.inf
        )
        attended = (scores.softmax(-1) @ value).transpose(0, 1).reshape(len(ids), SIZE)
        return ((hidden + attended @ weight["o_proj"].T) @ weight["lm_head"].T).float()

    check_model(names["OneLayer"], CONFIG, tensors, reference, scenario)
