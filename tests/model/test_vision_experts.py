"""Qwen3-VL's mixtures: how checkpoints lay out experts that are one tensor, in float32 and in FP8 blocks."""

from typing import Any

import pytest
import torch
from seeing import qwen3_vl_moe
from torch import Tensor

from engine import ConfigError
from engine.layers import experts_apart
from engine.plugin.kernels import dequantize, quantize_blocks
from engine.plugin.testing import ModelHarness
from engine_plugins.models.qwen3_vl import Qwen3VLMoe
from engine_plugins.quantization.fp8 import Fp8

COUNT, SIZE, INNER = 3, 8, 4  # 2 * INNER is SIZE, so that gate and up look alike either way round
IDS = [5, 17, 3, 88, 41, 2, 9]


def test_experts_of_one_tensor_are_those_of_many_either_way_round() -> None:
    up, down = torch.randn(COUNT, 2 * INNER, SIZE), torch.randn(COUNT, SIZE, INNER)
    straight = {"a.experts.gate_up_proj": up, "a.experts.down_proj": down, "a.gate.weight": torch.ones(1)}
    turned = {name: each.transpose(1, 2) if each.dim() == 3 else each for name, each in straight.items()}
    for form in (straight, turned):
        apart = dict(experts_apart(form.items(), COUNT, SIZE, INNER))
        assert len(apart) == 3 * COUNT + 1 and apart["a.gate.weight"] is straight["a.gate.weight"]
        for expert in range(COUNT):
            for part, wanted in (("gate", up[expert, :INNER]), ("up", up[expert, INNER:]), ("down", down[expert])):
                view = apart[f"a.experts.{expert}.{part}_proj.weight"]
                assert tuple(view.shape) == tuple(wanted.shape)
                assert torch.equal(view[:], wanted) and torch.equal(view[1:3, 1:4], wanted[1:3, 1:4])


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("gate_up_proj", (COUNT, 2 * INNER, SIZE + 1), r"has shape \(3, 8, 9\) .* calls for \(3, 8, 8\), or"),
        ("down_proj", (COUNT + 1, SIZE, INNER), r"has shape \(4, 8, 4\)"),
        ("gate_up_proj_scale_inv", (COUNT,), r"has shape \(3,\) in the checkpoint; scales of 3 experts"),
        ("gate_up_proj_scale_inv", (COUNT, 3, 1), r"has shape \(3, 3, 1\)"),
    ],
)
def test_other_shapes_are_refused(name: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        list(experts_apart([(f"a.experts.{name}", torch.zeros(shape))], COUNT, SIZE, INNER))


def in_fp8(model: Any, turned: bool) -> dict[str, Tensor]:
    """A checkpoint of `model`, whose decoder's matrices become what FP8 blocks of 128 x 128 stand for."""
    stored = {}
    for name, parameter in model.state_dict().items():
        stored[name] = parameter
        if "layers" not in name or parameter.dim() == 1 or name.endswith("gate.weight"):
            continue
        pairs = [quantize_blocks(matrix) for matrix in (parameter if parameter.dim() == 3 else parameter[None])]
        parameter.copy_(torch.stack([dequantize(*pair) for pair in pairs]).reshape(parameter.shape))
        both = [torch.stack(each) if parameter.dim() == 3 else each[0] for each in zip(*pairs, strict=True)]
        if parameter.dim() == 3 and turned:
            both = [each.transpose(1, 2).contiguous() for each in both]
        stored[name], stored[f"{name}_scale_inv"] = both
    return stored


@pytest.mark.parametrize("turned", [False, True])
@torch.inference_mode()
def test_fp8_blocks_of_the_decoder_beside_a_tower_that_is_left(turned: bool) -> None:
    theirs = qwen3_vl_moe(text={"moe_intermediate_size": 128, "hidden_size": 144}, out_hidden_size=144)
    stored = in_fp8(theirs, turned)
    left = [name for name, _ in theirs.named_modules() if name.startswith("model.visual")]
    terms = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", *left]}
    harness = ModelHarness(Qwen3VLMoe, theirs.config.to_dict(), stored, quantization=Fp8(terms))
    harness.runner.apply(harness.admit([IDS]))
    torch.testing.assert_close(
        harness.logits([(0, 0, len(IDS))])[0], theirs(torch.tensor([IDS])).logits[0], atol=5e-4, rtol=0
    )
    ours, its = harness.runner.model.visual.state_dict(), theirs.model.visual.state_dict()
    assert all(torch.equal(ours[name], its[name]) for name in ours if "patch_embed" not in name)
