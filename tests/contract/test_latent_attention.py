"""Every built-in backend of latent attention for CPUs against attention over expanded keys and values in float64."""

import numpy as np
import pytest
import torch

from engine.layers import LatentShape
from engine.layers.latent import add_part, cut
from engine.plugin.registry import Plugins, resolve
from engine.plugin.testing import LATENT_CASES, LatentCase, check_latent_attention
from engine_plugins.attention.torch.mla import TorchLatentAttention

ON_CPU = [entry for entry in Plugins.load().entries("latent_attention").values() if "cpu" in entry.devices]
FP8 = torch.float8_e4m3fn


class Expanding(TorchLatentAttention):
    """Expands every row of several tokens, and the cache by 11 tokens at a time."""

    least = 2
    chunk_tokens = 11

    def expands(self, starts, lengths):
        return lengths >= self.least


class Absorbing(TorchLatentAttention):
    """Absorbs every row."""

    def expands(self, starts, lengths):
        return lengths < 1


@pytest.mark.parametrize("case", LATENT_CASES, ids=str)
@pytest.mark.parametrize("entry", ON_CPU, ids=lambda entry: entry.name)
def test_latent_attention_is_that_of_the_definition(entry, case):
    check_latent_attention(resolve(entry.target), case)


@pytest.mark.parametrize("case", LATENT_CASES, ids=str)
def test_absorbed_and_expanded_rows_are_those_of_the_definition(case):
    check_latent_attention(Absorbing, case)
    check_latent_attention(Expanding, case)


def test_a_row_goes_the_way_that_costs_less():
    shape = LatentShape(layers=1, query_heads=16, latent_dim=512, rope_dim=64, key_dim=128, value_dim=128, scale=1.0)
    backend = TorchLatentAttention(shape, 16, torch.device("cpu"), torch.float32)
    rows = [(0, 1), (0, 32), (0, 31), (10**5, 170), (10**5, 171), (16, 64), (1024, 64), (256, 160), (9000, 1)]
    starts, lengths = np.array(rows).T
    assert backend.expands(starts, lengths).tolist() == [False, True, False, False, True, True, False, True, False]


@pytest.mark.parametrize("seed", range(16))
def test_random_steps_of_absorbed_and_expanded_rows(seed):
    generator = np.random.default_rng(seed)
    lengths = (1, 1, 1, 2, 9, 16, 33)
    rows = tuple(
        (int(generator.choice((0, 0, 1, 15, 16, 17, 40))), int(generator.choice(lengths)))
        for _ in range(generator.integers(1, 7))
    )
    case = LatentCase(page_size=int(generator.choice((1, 4, 16))), heads=int(generator.choice((1, 3, 4))), rows=rows)
    backend = type("Splitting", (Expanding,), {"least": int(generator.choice((1, 2, 5, 10)))})
    check_latent_attention(backend, case, seed=seed)


@pytest.mark.parametrize("backend", [Absorbing, Expanding])
def test_a_cache_in_fp8_is_off_by_its_rounding_alone(backend):
    """Latents of size about one are rounded by up to 1 in 16: what is attended is an average of them."""
    case = LatentCase(page_size=16, heads=4, rows=((60, 1), (200, 9), (0, 5)))
    check_latent_attention(backend, case, kv_dtype=FP8, tolerance=0.15)
    with pytest.raises(AssertionError, match="off by"):
        check_latent_attention(backend, case, kv_dtype=FP8, tolerance=1e-3)


def test_latent_attention_in_bfloat16():
    for backend in (Absorbing, Expanding):
        case = LatentCase(page_size=16, heads=4, rows=((0, 33), (70, 1), (5, 12)))
        check_latent_attention(backend, case, dtype=torch.bfloat16, tolerance=4e-2)


class Forgetful(Expanding):
    """Leaves the last cached token before an expanded row out."""

    def _cached_part(self, batch, rows, first, begins, ends):
        return super()._cached_part(batch, rows, first, begins, ends - (ends - begins > 1))


def test_the_contract_check_finds_a_wrong_backend():
    with pytest.raises(AssertionError, match="off by"):
        check_latent_attention(Forgetful, LATENT_CASES[2])


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_chunks_cover_every_cached_token_once(most):
    lengths = np.array([0, 5, 0, 0, 7, 1, 12, 0])
    seen = []
    for first, begins, ends in cut(lengths, most):
        assert 0 < (ends - begins).sum() <= most and (ends > begins).all()
        seen += [
            (first + row, at)
            for row, (begin, end) in enumerate(zip(begins, ends, strict=True))
            for at in range(begin, end)
        ]
    assert seen == [(row, at) for row, length in enumerate(lengths) for at in range(length)]


def test_parts_of_a_context_add_up():
    torch.manual_seed(0)
    scores, values = torch.randn(4, 3, 20), torch.randn(20, 3, 5)
    parts = []
    for keys in (slice(0, 6), slice(6, 20)):
        weights = scores[..., keys].softmax(-1)
        parts.append((torch.einsum("nhm,mhd->nhd", weights, values[keys]), scores[..., keys].logsumexp(-1)))
    (out, sums), others = parts
    add_part(out, sums, *others)
    assert torch.allclose(out, torch.einsum("nhm,mhd->nhd", scores.softmax(-1), values), atol=1e-6)
    assert torch.allclose(sums, scores.logsumexp(-1), atol=1e-6)


def test_the_layout_of_a_page_counts_its_bytes():
    shape = LatentShape(
        layers=27, query_heads=16, latent_dim=512, rope_dim=64, key_dim=128, value_dim=128, scale=1.0, kv_dtype=FP8
    )
    group = TorchLatentAttention(shape, 16, torch.device("cpu"), torch.bfloat16).kv_group()
    assert group.page_bytes == 27 * 16 * 576
