"""Triton's operations and draws against their definitions in torch: on a GPU (tests/gpu/test_ops.py), or interpreted
on a CPU (test_interpreted.py, which runs this in a process of its own)."""

import itertools

import numpy as np
import pytest
import torch

from engine.kernels.dense import triton as triton_ops
from engine.kernels.dense.linear import Cut, skinny_cut, skinny_linear
from engine.kernels.dense.reference import HeadNorms, Heads, LatentNorm, Ops
from engine.kernels.dense.triton import TritonOps
from engine.kernels.logits.draw import draw
from engine.kernels.logits.reference import LogitOps, gumbel, pack_ids

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if GPU else [torch.float32]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # about two roundings, relative
TOKENS, SIZES = ([1, 7, 300], [576, 1024, 4096, 5120]) if GPU else ([3], [48])
DIMS = [64, 80, 96, 128, 256] if GPU else [8, 12]
REFERENCE, TRITON = Ops(), TritonOps()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(DEVICE, dtype)


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    tolerance = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_norms(tokens: int, size: int, dtype: torch.dtype) -> None:
    hidden, stream = random(tokens, size, dtype=dtype), 3 * random(tokens, size, dtype=dtype, seed=1)
    for weight in (random(size, dtype=dtype, seed=2), random(size, seed=2)):  # Gemma's are float32
        assert_close(TRITON.rms_norm(hidden, weight, 1e-6), REFERENCE.rms_norm(hidden, weight, 1e-6))
        wanted = REFERENCE.add_rms_norm(hidden.clone(), stream.clone(), weight, 1e-6)
        got = TRITON.add_rms_norm(hidden.clone(), stream.clone(), weight, 1e-6)
        assert torch.equal(got[1], wanted[1])
        assert_close(got[0], wanted[0])
    heads = random(tokens, 5, size, dtype=dtype)[:, 1:4]
    assert_close(TRITON.rms_norm(heads, weight, 1e-6), REFERENCE.rms_norm(heads, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4096, 1024), (1024, 3072), (1000, 576)] if GPU else [(24, 40), (7, 16)], ids=str)
def test_one_token_times_a_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias = random(*shape, dtype=dtype, seed=1) * shape[1] ** -0.5, random(shape[0], dtype=dtype, seed=2)
    inputs = random(1, shape[1], dtype=dtype)
    for b in (None, bias):
        wanted = REFERENCE.linear(inputs.double(), weight.double(), None if b is None else b.double())
        assert_close(TRITON.vector_linear(inputs, weight, b), wanted.to(dtype))
        assert_close(TRITON.linear(inputs, weight, b), wanted.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [33, 64, 100, 128] if GPU else [5, 20])
@pytest.mark.parametrize("shape", [(4096, 1024), (1000, 2048), (6100, 1024)] if GPU else [(24, 40), (33, 32)], ids=str)
def test_some_tokens_times_a_matrix(shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    weight, bias = random(*shape, dtype=dtype, seed=1) * shape[1] ** -0.5, random(shape[0], dtype=dtype, seed=2)
    inputs = random(tokens, 2 * shape[1], dtype=dtype)[:, : shape[1]]
    own = (skinny_cut(tokens, *shape) if dtype.itemsize == 2 else None) or Cut(
        rows=16, columns=32, warps=4, stages=2, tokens=16
    )
    for b in (None, bias):
        wanted = REFERENCE.linear(inputs.double(), weight.double(), None if b is None else b.double()).to(dtype)
        assert_close(skinny_linear(inputs, weight, b, own), wanted)
        assert_close(TRITON.linear(inputs, weight, b), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 33, 64, 100] if GPU else [1, 5, 20])
@pytest.mark.parametrize("shape", [(6144, 1024), (6100, 576), (4096, 3072)] if GPU else [(24, 40), (66, 32)], ids=str)
def test_gate_and_up_are_multiplied_and_gated_at_once(shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    weight, bias = random(*shape, dtype=dtype, seed=1) * shape[1] ** -0.5, random(shape[0], dtype=dtype, seed=2)
    inputs = random(tokens, shape[1], dtype=dtype)
    own = Cut(rows=32, columns=32, warps=4, stages=2, tokens=16)
    for b in (None, bias):
        sums = REFERENCE.linear(inputs.double(), weight.double(), None if b is None else b.double())
        wanted = REFERENCE.silu_and_mul(sums.to(dtype))
        assert_close(TRITON.linear_silu(inputs, weight, b), wanted)
        assert_close(skinny_linear(inputs, weight, b, own, gated=True), wanted)
        if tokens == 1:
            assert_close(TRITON.vector_linear(inputs, weight, b, gated=True), wanted)


def test_small_matrices_and_some_tokens_get_a_kernel_of_our_own() -> None:
    assert skinny_cut(64, 4096, 1024) and skinny_cut(128, 1024, 3072) and skinny_cut(33, 6144, 1024)
    none = ((32, 4096, 1024), (129, 4096, 1024), (64, 4096, 4096), (64, 1536, 576), (128, 6144, 1024))
    assert not any(skinny_cut(*each) for each in none)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_gated_activations(tokens: int, dtype: torch.dtype) -> None:
    gate_up = 5 * random(tokens, 2 * (3072 if GPU else 24), dtype=dtype)
    gate_up[0, :4] = torch.tensor([-120.0, 120.0, 0.0, -20.0])
    assert_close(TRITON.silu_and_mul(gate_up), REFERENCE.silu_and_mul(gate_up))
    assert_close(TRITON.gelu_and_mul(gate_up), REFERENCE.gelu_and_mul(gate_up))


CASES = list(itertools.product(DTYPES, DIMS, [True, False], ["all", "half", "none"]))


@pytest.mark.parametrize(("dtype", "dim", "normed", "turns"), CASES, ids=str)
@pytest.mark.parametrize("many", [0, 1 << 20], ids=["together", "alone"])
def test_heads_are_normed_rotated_and_written(
    dtype: torch.dtype, dim: int, normed: bool, turns: str, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_ops, "MANY_PROGRAMS", many)
    heads, tokens, page_size, pages = Heads(6, 2, dim), 5, 4, 7
    qkv = random(tokens, 10 * dim, dtype=dtype)
    norms = HeadNorms(random(dim, dtype=dtype, seed=1), random(dim, dtype=dtype, seed=2), 1e-6) if normed else None
    angles = random(tokens, 1, dim // (2 if turns == "all" else 4), seed=3)
    rotation = None if turns == "none" else (angles.cos().to(dtype), angles.sin().to(dtype))
    places = torch.tensor([27, 0, 13, 6, 5], device=DEVICE)
    caches = [torch.full((pages, 2, page_size, 2, dim), 7.0, device=DEVICE, dtype=dtype) for _ in range(2)]
    wanted = REFERENCE.rotate_into_pages(qkv.clone(), heads, norms, rotation, caches[0], places)
    got = TRITON.rotate_into_pages(qkv.clone(), heads, norms, rotation, caches[1], places)
    assert_close(got, wanted)
    assert_close(caches[1], caches[0])
    for got, wanted in zip(
        TRITON.rotate_heads(qkv.clone(), heads, norms, rotation),
        REFERENCE.rotate_heads(qkv.clone(), heads, norms, rotation),
        strict=True,
    ):
        assert_close(got, wanted)
    _, key, value = REFERENCE.rotate_heads(qkv, heads, None, None)
    REFERENCE.write_pages(key, value, caches[0], places)
    TRITON.write_pages(key, value, caches[1], places)
    assert torch.equal(caches[1][places // 4, :, places % 4], caches[0][places // 4, :, places % 4])


@pytest.mark.skipif(not GPU, reason="the interpreter has no FP8")
def test_an_fp8_cache_holds_rounded_values() -> None:
    heads, qkv = Heads(4, 2, 64), random(3, 8 * 64, dtype=torch.bfloat16)
    places = torch.tensor([3, 9, 4], device=DEVICE)
    caches = [torch.zeros(3, 2, 4, 2, 64, device=DEVICE, dtype=torch.float8_e4m3fn) for _ in range(2)]
    REFERENCE.rotate_into_pages(qkv.clone(), heads, None, None, caches[0], places)
    TRITON.rotate_into_pages(qkv.clone(), heads, None, None, caches[1], places)
    assert torch.equal(caches[0].float(), caches[1].float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_are_those_of_the_definition(dtype: torch.dtype) -> None:
    rows, size = (64, 151936) if GPU else (6, 9000)
    logits = 3 * random(rows, size, dtype=dtype)
    logits[0, 77] = logits[0, 78] = 50.0  # equals: the lower id
    logits[1] = logits[3, :4096] = logits[5] = -torch.inf  # as masks leave it, whole chunks of a program among them
    logits[5, 8000] = -3.0
    slots = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    lasts = torch.arange(rows, device=DEVICE) * 3
    temperatures = torch.tensor([0.0, 0.0, 0.6, 1.0, 0.0, 2.0] * rows)[:rows].to(DEVICE)[slots.argsort()]
    seeds = torch.arange(rows, device=DEVICE) * 0x123456789ABCDEF - 5
    tokens = torch.zeros(rows, lasts[-1] + 2, dtype=torch.int32, device=DEVICE)
    lengths = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    got = draw(logits, slots, lasts, temperatures, seeds, tokens, lengths)
    assert torch.equal(lengths[slots], lasts + 2)
    assert got[:2].tolist() == [77, 0] and got[5] == 8000 and got[3] >= 4096
    assert torch.equal(tokens[slots, lasts + 1].long(), got) and int((tokens != 0).sum()) <= rows
    each = temperatures[slots, None]
    noise = torch.where(each > 0, gumbel(seeds[slots], lasts + 1, size), 0.0)
    scores = logits.float() / torch.where(each > 0, each, 1.0) + noise
    best = scores.max(dim=-1).values
    chosen = scores.gather(1, got[:, None])[:, 0]
    finite = best.isfinite()
    assert (best[finite] - chosen[finite]).abs().max() <= 2e-5  # the noise itself is rounded
    assert (got == scores.argmax(dim=-1)).float().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_under_masks_are_those_of_what_they_leave(dtype: torch.dtype) -> None:
    rows, size = (64, 151936) if GPU else (6, 9001)
    logits, few = random(rows, size, dtype=dtype), np.array([7, 4099, 8500])
    some = np.flatnonzero(np.random.default_rng(0).integers(0, 2, size))
    masks = np.stack([pack_ids(ids, size) for ids in (few, some, np.arange(size), few[1:2])])
    table, lines = torch.from_numpy(masks).to(DEVICE), torch.tensor([3, 0, 1, 2, 1, 0] * rows)[:rows].to(DEVICE)
    barred = logits.clone()
    LogitOps().apply_bitmask(barred, table, torch.arange(rows, device=DEVICE), lines)
    slots, temperatures = torch.arange(rows, device=DEVICE), torch.tensor([1.0, 0.6, 1.0, 0.0] * rows)[:rows].to(DEVICE)
    tokens = torch.zeros(2, rows, rows + 1, dtype=torch.int32, device=DEVICE)
    before = logits.clone()
    lengths = torch.zeros_like(slots)
    got = draw(logits, slots, slots, temperatures, slots, tokens[0], lengths, masks=(table, lines))
    assert torch.equal(got, draw(barred, slots, slots, temperatures, slots, tokens[1], lengths))
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(logits, before)
    assert got[0] == 4099 and set(got[lines == 0].tolist()) <= set(few.tolist())


def test_draws_at_the_lowest_temperatures_are_of_the_largest() -> None:
    logits = random(4, 5000)
    logits[:, 0] = 0.0
    logits[:2] -= 10.0  # all of them below 0
    logits[3] *= 1e4
    lasts = torch.arange(4, device=DEVICE)
    temperatures = torch.tensor([1e-45, 1e-39, 1e-39, 1e-37], device=DEVICE)
    tokens = torch.zeros(4, 5, dtype=torch.int32, device=DEVICE)
    assert torch.equal(
        draw(logits, lasts, lasts, temperatures, lasts, tokens, torch.zeros_like(lasts)), logits.argmax(dim=-1)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False], ids=["neighbours", "halves"])
@pytest.mark.parametrize("heads", [16, 128, 20] if GPU else [3])
def test_latents_are_normed_rotated_and_written(heads: int, interleaved: bool, dtype: torch.dtype) -> None:
    """In place, of a projection that holds queries and latents side by side."""
    size, pairs, key, page_size = (512, 32, 128, 16) if GPU else (24, 3, 5, 4)
    queries, width = heads * (key + 2 * pairs), size + 2 * pairs
    weight = random(size, dtype=dtype, seed=1)
    for tokens in TOKENS:
        projected = random(tokens, queries + width, dtype=dtype)
        angles = 30 * random(tokens, 1, pairs, seed=2)
        rotation = (angles.cos().to(dtype), angles.sin().to(dtype))
        places = torch.randperm(4 * tokens, generator=torch.Generator().manual_seed(3))[:tokens].to(DEVICE)
        made = []
        for ops in (REFERENCE, TRITON):
            own = projected.clone()
            query, latents = own[:, :queries].unflatten(1, (heads, -1)), own[:, queries:]
            cache = torch.zeros(-(-4 * tokens // page_size), page_size, width, dtype=dtype, device=DEVICE)
            ops.latent_into_pages(query, latents, LatentNorm(weight, 1e-6), rotation, interleaved, cache, places)
            assert torch.equal(cache.view(-1, width)[places], latents)
            made.append((own, cache))
        for got, wanted in zip(*reversed(made), strict=True):
            assert_close(got, wanted)
        assert not torch.equal(made[0][0], projected)
        unrotated = own[:, :queries].unflatten(1, (heads, -1))[..., :key]
        assert torch.equal(unrotated, projected[:, :queries].unflatten(1, (heads, -1))[..., :key])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_each_head_by_a_matrix_of_its_own(turned: bool, dtype: torch.dtype) -> None:
    heads, key, latent = (16, 128, 512) if GPU else (3, 16, 32)
    up = random(heads, 2 * key, latent, dtype=dtype, seed=1) * (latent if turned else key) ** -0.5
    weight = up[:, key:].transpose(1, 2) if turned else up[:, :key]
    for tokens in (1, 5, 33, 64, 65) if GPU else (1, 17):
        inputs = random(tokens, heads, weight.shape[1] + 16, dtype=dtype)[..., : weight.shape[1]]
        wanted = torch.einsum("thk,hkn->thn", inputs.double(), weight.double()).to(dtype)
        for ops in (REFERENCE, TRITON):
            got = ops.multiply_heads(inputs, weight)
            assert got.is_contiguous()
            assert_close(got, wanted)


@pytest.mark.skipif(not GPU, reason="the interpreter rounds to FP8 in a way of its own")
def test_latents_are_written_in_fp8() -> None:
    query, latents = random(5, 16, 192, dtype=torch.bfloat16), 8 * random(5, 576, dtype=torch.bfloat16, seed=1)
    latents[2, 520] = 1000.0
    cache = torch.zeros(2, 4, 576, dtype=torch.float8_e4m3fn, device=DEVICE)
    norm = LatentNorm(random(512, dtype=torch.bfloat16, seed=2), 1e-6)
    rotation = (torch.ones(5, 1, 32, device=DEVICE), torch.zeros(5, 1, 32, device=DEVICE))
    places = torch.tensor([1, 7, 0, 3, 4], device=DEVICE)
    TRITON.latent_into_pages(query, latents, norm, rotation, True, cache, places)
    wanted = latents.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(cache.view(-1, 576).view(torch.uint8)[places], wanted.view(torch.uint8))
