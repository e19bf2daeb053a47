"""Every built-in attention backend against attention in float64."""

import dataclasses

import numpy as np
import pytest
import torch

from engine.layers import AttentionShape
from engine.plugin.registry import Plugins, resolve
from engine.plugin.testing import ATTENTION_CASES, AttentionCase, check_attention
from engine.worker.steps.batch import build_batch
from engine.worker.steps.rows import Rows
from engine_plugins.attention.torch.mha import TorchAttention

ON_CPU = [entry for entry in Plugins.load().attention.values() if "cpu" in entry.devices]


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
@pytest.mark.parametrize("entry", ON_CPU, ids=lambda entry: entry.name)
def test_attention_is_that_of_the_definition(entry, case):
    check_attention(resolve(entry.target), case)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("entry", ON_CPU, ids=lambda entry: entry.name)
def test_attention_over_random_steps(entry, seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    kv_heads = pick(1, 2, 3)
    rows = tuple((pick(0, 0, 1, 15, 16, 17, 40), pick(1, 1, 1, 2, 9, 16, 33)) for _ in range(pick(1, 2, 5)))
    heads = (kv_heads * pick(1, 2, 3, 4), kv_heads)
    size, window = pick(1, 4, 16), pick(None, 1, 5, 16, 17, 40)
    case = AttentionCase(page_size=size, heads=heads, head_dim=pick(16, 64, 80), rows=rows, window=window)
    check_attention(resolve(entry.target), case, seed=seed)


def test_attention_in_bfloat16():
    case = AttentionCase(page_size=16, heads=(9, 3), head_dim=64, rows=((0, 33), (70, 1), (5, 12)))
    check_attention(TorchAttention, case, dtype=torch.bfloat16, tolerance=2e-2)


class Maskless(TorchAttention):
    """Decode rows see whole pages, whatever was left in them."""

    def prepare(self, batch):
        return dataclasses.replace(super().prepare(batch), mask=None)


def test_the_contract_check_finds_a_wrong_backend():
    with pytest.raises(AssertionError, match="off by"):
        check_attention(Maskless, ATTENTION_CASES[0])


class Boundless(TorchAttention):
    """Sees one position more than the window holds."""

    def __init__(self, shape, *rest):
        window = None if shape.window is None else shape.window + 1
        super().__init__(dataclasses.replace(shape, window=window), *rest)


@pytest.mark.parametrize("case", [case for case in ATTENTION_CASES if case.window not in (None, 99)], ids=str)
def test_the_contract_check_finds_a_window_that_is_one_too_wide(case):
    with pytest.raises(AssertionError, match="off by"):
        check_attention(Boundless, case)


def test_only_the_pages_of_the_window_are_gathered():
    shape = AttentionShape(layers=1, query_heads=1, kv_heads=1, head_dim=8, scale=1.0, window=6)
    backend = TorchAttention(shape, 4, torch.device("cpu"), torch.float32)
    rows = np.array([[0, 100, 1, 1], [1, 3, 1, 1], [2, 90, 4, 1]])
    tokens, table = torch.zeros(3, 101, dtype=torch.int32), torch.arange(78, dtype=torch.int32).view(3, 26)
    plan = backend.prepare(build_batch(Rows.of(rows), tokens, table, 4, ()))
    assert (plan.halves[0] // 2)[0].tolist() == [23, 24, 25]  # of positions 95 to 100
    (prefill,) = plan.prefills
    assert (prefill.halves[0] // 2).tolist() == [52 + 21, 52 + 22, 52 + 23]  # of positions 85 to 93


def test_the_layout_of_a_page_counts_its_bytes():
    shape = AttentionShape(layers=30, query_heads=9, kv_heads=3, head_dim=64, scale=0.125)
    group = TorchAttention(shape, 16, torch.device("cpu"), torch.bfloat16).kv_group()
    assert group.page_bytes == 30 * 2 * 16 * 3 * 64 * 2
