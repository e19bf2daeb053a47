"""Tiny models that see, on a GPU, say what they say on a CPU: towers, positions, spans that see each other. Captured
steps that show something leave what the same steps leave without a graph."""

from typing import Any

import numpy as np
import pytest
import torch
from seeing import END, IMAGE, START, TURNING, VIDEO, Seen, gemma3, llava_onevision, picture, qwen2_5_vl, qwen3_vl

from engine.conversation.media import Placed
from engine.layers.vision import Segments
from engine.messages.step import TOKEN
from engine.worker.steps.rows import Rows
from engine_plugins.attention.torch.mha import TorchAttention
from engine_plugins.attention.triton.mha import TritonAttention
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


HEADS_OF_16 = {"head_dim": 16, "rope_parameters": {**TURNING, "mrope_section": [4, 2, 2]}}  # the fewest of the kernels
LINE = tuple[int, int, int]  # a row of a step: slot, start, length


def prompts_that_show(device: str, attention: Any) -> tuple[Seen, list[Placed]]:
    """A picture; text; a clip and a picture. Each has a slot of a model whose first layers read levels of the tower."""
    described: dict[str, Any] = {"image_processor": SIZE, "video_processor": SIZE}
    seen = Seen(qwen3_vl(HEADS_OF_16), Qwen3VL, Processor3, attention, device, **described)
    one, other, clip = (seen.processor.prepare(each) for each in (*PICTURES, picture(4, 30, 26, frames=5, fps=2.0)))
    ids = [1, 2, START, IMAGE, END, 5], [1, 2, 3, 7, 11], [1, START, VIDEO, END, 5, 7, START, IMAGE, END, 6]
    return seen, seen.admit([(ids[0], [one]), (ids[1], []), (ids[2], [clip, other])])


def steps_that_show(placed: list[Placed]) -> list[list[LINE]]:
    """Whole prompts and parts of them, after steps that left other embeddings behind: parts of pictures, a slice of a
    clip with the start of the next one, what is left. The last step is of a token behind each prompt."""
    whole = [(slot, 0, len(each.ids)) for slot, each in enumerate(placed)]
    (picture_at, _), *_ = placed[0].spans[0]
    (_, _), (second, count), (third, _), *_ = placed[2].spans[0]  # the slices of the clip
    return [
        whole,
        [whole[2], (1, 0, 3)],
        [(0, 0, picture_at + 3), (2, 0, second)],
        [(2, second, third + 2 - second), (0, picture_at + 3, whole[0][2] - picture_at - 3), (1, 3, 2)],
        [(2, third + 2, whole[2][2] - third - 2)],
        [(2, second + 1, count - 1)],
        [(slot, length, 1) for slot, _, length in whole],
    ]


@torch.inference_mode()
def test_captured_steps_show_on_a_gpu_what_prompts_show() -> None:
    """Kernel by kernel first, then by graphs, on caches that have nothing of the former."""
    seen, placed = prompts_that_show(DEVICE, TritonAttention)
    runner, steps = seen.harness.runner, steps_that_show(placed)
    assert runner.capture(seen.harness.each * seen.harness.slots) and runner.media is not None
    rows = [Rows.of(np.array([[*line, TOKEN] for line in step])) for step in steps]
    assert [runner.media.shows(each) for each in rows] == [True] * 6 + [False]
    wanted = [seen.model.logits(runner.compute(each)[0]).float() for each in rows]
    for cache in (each for group in runner.caches for each in group):
        cache.zero_()
    for step, each, logits_ in zip(steps, rows, wanted, strict=True):
        forward = runner.forward(each)
        assert forward.batch is None, f"{step} was replayed"
        got = seen.model.logits(forward.hidden).float()
        torch.testing.assert_close(got, logits_, atol=2e-3, rtol=0, msg=lambda said, step=step: f"{step}: {said}")
        lasts = np.cumsum([length for _, _, length in step]) - 1
        assert got[lasts].argmax(-1).tolist() == logits_[lasts].argmax(-1).tolist()


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
