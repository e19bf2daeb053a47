"""Tiny models that see, on a GPU, say what they say on a CPU: towers, positions, spans that see each other."""

from typing import Any

import pytest
import torch
from seeing import END, IMAGE, START, VIDEO, Seen, gemma3, llava_onevision, picture, qwen2_5_vl, qwen3_vl

from engine.layers.vision import Segments
from engine_plugins.attention.torch.mha import TorchAttention
from engine_plugins.media.gemma3 import Gemma3 as GemmaProcessor
from engine_plugins.media.llava_onevision import LlavaOnevision as LlavaProcessor
from engine_plugins.media.qwen2_5_vl import Qwen25VL as Processor25
from engine_plugins.media.qwen3_vl import Qwen3VL as Processor3
from engine_plugins.models.gemma3_vl import Gemma3VL
from engine_plugins.models.llava_onevision import LlavaOnevision
from engine_plugins.models.qwen2_5_vl import Qwen25VL
from engine_plugins.models.qwen3_vl import Qwen3VL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
DEVICE = "cuda"

SIZE = {"size": {"shortest_edge": 64, "longest_edge": 2048}}
PICTURES = picture(1, 40, 52), picture(2, 70, 33)
FAMILIES = {
    "qwen2.5": (qwen2_5_vl, Qwen25VL, Processor25, IMAGE),
    "qwen3": (qwen3_vl, Qwen3VL, Processor3, IMAGE),
    "gemma3": (gemma3, Gemma3VL, GemmaProcessor, START),
    "llava": (llava_onevision, LlavaOnevision, LlavaProcessor, IMAGE),
}


def logits(family: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a prompt with two pictures, and a clip where the family takes one, whole and in two chunks."""
    make, ours, processor, mark = FAMILIES[family]
    described: dict[str, Any] = {"image_processor": SIZE, "video_processor": SIZE} if "qwen" in family else {}
    seen = Seen(make(), ours, processor, TorchAttention, device, **described)
    shown, ids = list(PICTURES), [1, 2, mark, END, 5, mark, 6]
    if family != "gemma3":
        shown.append(picture(4, 30, 26, frames=5, fps=2.0))
        ids += [VIDEO, 7]
    (placed,) = seen.admit([(ids, [seen.processor.prepare(each) for each in shown])])
    return seen.cut(placed), seen.cut(placed, [4])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_sees_what_a_cpu_sees(family: str) -> None:
    wanted, _ = logits(family, "cpu")
    for got in logits(family, DEVICE):
        torch.testing.assert_close(got, wanted, atol=2e-3, rtol=0)


def test_runs_of_several_lengths_attend_as_each_alone() -> None:
    torch.manual_seed(0)
    lengths = [64, 48, 36, 64, 1, 200]
    qkv = torch.randn(sum(lengths), 6, 80, device=DEVICE, dtype=torch.bfloat16)
    query, key, value = qkv.split(2, dim=1)
    got = Segments(lengths, torch.device(DEVICE)).attend(query, key, value)
    parts = [Segments([length], torch.device(DEVICE)) for length in lengths]
    split = [each.split(lengths) for each in (query, key, value)]
    wanted = torch.cat([part.attend(*rows) for part, *rows in zip(parts, *split, strict=True)])
    torch.testing.assert_close(got.float(), wanted.float(), atol=2e-2, rtol=0)
