"""Captured steps with prompts of the FlashInfer backend and of the hybrid, and plans made ahead of the device, against
float64.

What it shares with other backends is in test_attention.py. Tolerance: bfloat16 rounds the softmax's weights and the
output once each, of size about one.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.layers import AttentionShape, Batch, Mirror
from engine_plugins.attention.flashinfer.mha import FlashInferAttention
from engine_plugins.attention.hybrid import HybridAttention, HybridPlan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
DEVICE = torch.device("cuda")
TOLERANCE = 2.5e-2
SLOTS, LINE, PAGE = 12, 40, 16  # slots, pages of each, positions of a page


class Steps:
    """A backend, random pages, and a captured step of `rows` rows in `tokens` tokens."""

    def __init__(
        self, rows: int, tokens: int, *, prompts: bool, backend: type[HybridAttention] | type[FlashInferAttention]
    ) -> None:
        self.shape = AttentionShape(layers=1, query_heads=16, kv_heads=4, head_dim=128, scale=128**-0.5)
        try:
            self.backend = backend(self.shape, PAGE, DEVICE, torch.bfloat16)
        except ConfigError as error:
            pytest.skip(str(error))
        generator = torch.Generator(DEVICE).manual_seed(tokens)
        pages = torch.randn(SLOTS * LINE, 2, PAGE, 4, 128, generator=generator, device=DEVICE)
        self.cache = pages.to(torch.bfloat16)
        self.query = torch.randn(tokens, 16, 128, generator=generator, device=DEVICE).to(torch.bfloat16)
        self.table = torch.randperm(SLOTS * LINE, generator=generator, device=DEVICE).to(torch.int32).view(SLOTS, LINE)
        self.rows, self.numbers = rows, Mirror(3 * rows + 1, DEVICE)
        slots, starts, offsets = self.numbers.device.split([rows, rows, rows + 1])
        nothing, empty = slots[:0], np.empty(0, np.int64)
        batch = Batch(
            ids=torch.zeros(tokens, dtype=torch.int64, device=DEVICE), positions=nothing, places=nothing,
            page_table=self.table, slots=slots, row_starts=starts, row_offsets=offsets,
            starts=empty, lengths=empty, offsets=empty, caches=(),
        )  # fmt: skip
        plan = self.backend.capture_prompts(batch) if prompts else self.backend.capture(batch)
        self.plan: Any = plan
        if prompts:
            self.backend.refill_prompts(plan, empty, empty, np.zeros(1, np.int64))
        else:
            self.backend.refill(plan, np.zeros(rows, np.int64), np.zeros(rows, np.int64))
        self.backend.attend(self.query, self.cache, plan)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self.backend.attend(self.query, self.cache, plan)

    def send(self, slots: np.ndarray, starts: np.ndarray, offsets: np.ndarray) -> None:
        host, count = self.numbers.host(), len(slots)
        host[:], host[:count], host[self.rows : self.rows + count] = 0, slots, starts
        host[2 * self.rows :] = offsets[-1]
        host[2 * self.rows :][: count + 1] = offsets
        self.numbers.send()

    def wanted(self, tokens: slice, slot: int, start: int, length: int) -> Tensor:
        """[length, query_heads * head_dim] of one row, in float64."""
        halves = self.cache[self.table[slot].long()].double().transpose(0, 1).flatten(1, 2)[:, : start + length]
        key, value = halves.repeat_interleave(4, dim=2)
        scores = torch.einsum("qhd,khd->hqk", self.query[tokens].double(), key) * self.shape.scale
        unseen = torch.ones(scores.shape[1:], dtype=torch.bool, device=DEVICE).triu(start + 1)
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


@pytest.mark.parametrize(
    ("backend", "rows", "tokens"),
    [
        *((FlashInferAttention, 64, tokens) for tokens in (32, 256, 1024)),
        *((HybridAttention, 64, tokens) for tokens in (256, 1024, 1536)),
        (HybridAttention, 257, 4096),
    ],
)
def test_a_captured_step_with_prompts_follows_its_numbers(backend: Any, rows: int, tokens: int) -> None:
    """Rows of one token in front, then prompts, some of one token too."""
    steps, generator = Steps(rows, tokens, prompts=True, backend=backend), np.random.default_rng(tokens)
    assert isinstance(steps.plan, HybridPlan) == (backend is HybridAttention and tokens > 1024)
    for ones, count in ((0, 1), (3, 4), (4, 9), (0, 2), (5, 5)):
        lengths = np.ones(count, np.int64)
        if count > ones:
            lengths[ones:] = generator.integers(1, max(tokens // count // 2, 2), count - ones)
            lengths[-1] = 1 if count == 9 else lengths[-1]
            lengths[0] += tokens - lengths.sum() if count == 2 else 0  # as many tokens as there can be
        lengths = np.minimum(lengths, LINE * PAGE)
        starts = generator.integers(0, LINE * PAGE - lengths + 1)
        slots, offsets = generator.permutation(SLOTS)[:count], np.concatenate(([0], np.cumsum(lengths)))
        steps.send(slots, starts, offsets)
        steps.backend.refill_prompts(steps.plan, starts, lengths, offsets)
        steps.out.fill_(torch.nan)
        steps.graph.replay()
        for row in range(count):
            tokens_of = slice(int(offsets[row]), int(offsets[row + 1]))
            wanted = steps.wanted(tokens_of, int(slots[row]), int(starts[row]), int(lengths[row]))
            assert (steps.out[tokens_of].double() - wanted).abs().max() < TOLERANCE


def test_plans_may_be_made_while_the_device_is_at_earlier_steps() -> None:
    steps, generator = Steps(6, 6, prompts=False, backend=FlashInferAttention), np.random.default_rng(0)
    starts, slots = (
        generator.integers(0, LINE * PAGE, (3, 6)),
        np.array([generator.permutation(SLOTS)[:6] for _ in "123"]),
    )
    outs = []
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # about a tenth of a second, in which the host gets ahead
    for step in range(3):
        steps.send(slots[step], starts[step], np.arange(7))
        steps.backend.refill(steps.plan, slots[step], starts[step])
        steps.graph.replay()
        outs.append(steps.out.clone())
    for step, out in enumerate(outs):
        for row in range(6):
            wanted = steps.wanted(slice(row, row + 1), int(slots[step][row]), int(starts[step][row]), 1)
            assert (out[row].double() - wanted).abs().max() < TOLERANCE
