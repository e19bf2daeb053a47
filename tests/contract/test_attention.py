"""Every built-in attention backend against attention in float64."""

import dataclasses

import pytest
import torch

from engine.layers import AttentionShape
from engine.plugin.manager import Plugins, resolve
from engine.plugin.testing import ATTENTION_CASES, AttentionCase, check_attention
from engine_plugins.attention.torch import TorchAttention

ON_CPU = [entry for entry in Plugins.load().attention.values() if "cpu" in entry.devices]


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
@pytest.mark.parametrize("entry", ON_CPU, ids=lambda entry: entry.name)
def test_attention_is_that_of_the_definition(entry, case):
    check_attention(resolve(entry.target), case)


@pytest.mark.parametrize("seed", range(12))
def test_attention_over_random_steps(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    kv_heads = pick(1, 2, 3)
    rows = tuple((pick(0, 0, 1, 15, 16, 17, 40), pick(1, 1, 1, 2, 9, 16, 33)) for _ in range(pick(1, 2, 5)))
    heads = (kv_heads * pick(1, 2, 3, 4), kv_heads)
    case = AttentionCase(page_size=pick(1, 4, 16), heads=heads, head_dim=pick(16, 64, 80), rows=rows)
    check_attention(TorchAttention, case, seed=seed)


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


def test_the_layout_of_a_page_counts_its_bytes():
    shape = AttentionShape(layers=30, query_heads=9, kv_heads=3, head_dim=64, scale=0.125)
    group = TorchAttention(shape, 16, torch.device("cpu"), torch.bfloat16).kv_group()
    assert group.page_bytes == 30 * 2 * 16 * 3 * 64 * 2
