"""The CPU kernels against their definitions in numpy and torch; what takes their place where there is no compiler."""

import os
import stat
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from engine.kernels.cpu import calls as cpu
from engine.kernels.dense.reference import HeadNorms, Heads, Ops
from engine.layers import AttentionShape, Build, ColumnLinear, Embedding, LMHead, RMSNorm
from engine.runtime import compiled
from engine_plugins.attention.cpu import CpuAttention
from engine_plugins.attention.torch.mha import TorchAttention

KERNELS = cpu.kernels()
needs_kernels = pytest.mark.skipif(KERNELS is None, reason="there is no C compiler here")


def blocks(kind: str, rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    """Random blocks, uint8 [rows, bytes of a row], whose every bit pattern of weights and scales may occur."""
    rng = np.random.default_rng(seed)
    type_ = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16", "BF16"):
        floats = rng.standard_normal((rows, inputs)).astype(np.float32)
        return floats.view(np.uint8) if kind == "F32" else gguf.quantize(floats, type_).view(np.uint8)
    weights, size = gguf.GGML_QUANT_SIZES[type_]
    packed = rng.integers(0, 256, (rows, inputs // weights, size), dtype=np.uint8)
    starts = {"Q6_K": (208,), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,)}.get(kind, (0, 2))
    for start in starts:  # random bits are no sane float16
        scales = np.float16(rng.standard_normal((*packed.shape[:2], 1)) * 0.05)
        packed[:, :, start : start + 2] = scales.view(np.uint8)
    return packed.reshape(rows, -1)


def unpacked(kind: str, packed: np.ndarray) -> torch.Tensor:
    floats = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind]).astype(np.float32)
    return torch.from_numpy(floats.reshape(len(packed), -1).copy())


@needs_kernels
@pytest.mark.parametrize("kind", cpu.KINDS)
def test_every_kind_unpacks_exactly_and_multiplies(kind: str) -> None:
    rows, inputs = 50, 1280 if kind.endswith("_K") else 288
    packed = blocks(kind, rows, inputs)
    whole = unpacked(kind, packed)
    (matrix,) = KERNELS.matrices([(kind, packed.copy())])
    assert (matrix.rows, matrix.inputs) == (rows, inputs)
    assert torch.equal(matrix.unpacked(), whole)
    ids = torch.tensor([3, 0, 49, 3])
    assert torch.equal(matrix.select(ids), whole[ids])
    for tokens in (1, 2, 3, 7, 8, 21, cpu.GEMM_TOKENS, 40):
        x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens))
        out = torch.full((tokens, rows + 5), torch.nan)
        matrix.linear(x, out[:, 2 : rows + 2])
        expected = (x.double() @ whole.double().t()).float()
        scale = (x.abs() @ whole.abs().t()).max()
        assert (out[:, 2 : rows + 2] - expected).abs().max() < 1e-6 * scale, tokens
        assert out[:, :2].isnan().all() and out[:, rows + 2 :].isnan().all()


@needs_kernels
@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K", "BF16"])
@pytest.mark.parametrize("alone", [1, cpu.GEMM_TOKENS])
def test_a_token_does_not_depend_on_its_neighbours(kind: str, alone: int) -> None:
    """To the bit, among few tokens as among many; `inputs` is more than gemm takes at a time."""
    (matrix,) = KERNELS.matrices([(kind, blocks(kind, 100, 1024))])
    x = torch.randn(cpu.GEMM_TOKENS + 21, 1024, generator=torch.Generator().manual_seed(1))
    first = torch.empty(alone, 100)
    matrix.linear(x[:alone], first)
    for tokens in range(alone, cpu.GEMM_TOKENS if alone == 1 else len(x)):
        out = torch.empty(tokens, 100)
        matrix.linear(x[:tokens], out)
        assert torch.equal(out[:alone], first), tokens


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_norms_and_activations_are_those_of_torch(tokens: int) -> None:
    generator, torch_ops = torch.Generator().manual_seed(0), Ops()
    hidden = torch.randn(tokens, 3, 40, generator=generator) * 3
    weight = torch.randn(40, generator=generator)
    expected = torch_ops.rms_norm(hidden, weight, 1e-5)
    assert torch.allclose(KERNELS.rms_norm(hidden, weight, 1e-5), expected, atol=1e-6, rtol=1e-6)
    hidden, stream = hidden[:, 0], torch.randn(tokens, 40, generator=generator)
    expected = torch_ops.add_rms_norm(hidden, stream, weight, 1e-5)
    for got, wanted in zip(KERNELS.add_rms_norm(hidden.clone(), stream.clone(), weight, 1e-5), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-6, rtol=1e-6)
    gate = torch.linspace(-120, 120, 240 * tokens).view(tokens, 240)
    gate_up = torch.cat((gate, torch.randn(tokens, 240, generator=generator)), 1)
    for name in ("silu_and_mul", "gelu_and_mul"):
        expected = getattr(torch_ops, name)(gate_up.double()).float()
        assert torch.allclose(getattr(KERNELS, name)(gate_up), expected, atol=1e-6, rtol=1e-6), name


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 40])
def test_rotations_are_those_of_torch(tokens: int) -> None:
    positions, frequencies = torch.arange(tokens) * 97, 1e4 ** -(torch.arange(32) / 32)
    for magnitude in (1.0, 1.2):
        expected = Ops().rotation(positions, frequencies, magnitude)
        for got, wanted in zip(KERNELS.rotation(positions, frequencies, magnitude), expected, strict=True):
            assert got.shape == wanted.shape == (tokens, 1, 32) and torch.allclose(got, wanted, atol=2e-7)


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("pairs", [0, 16, 32])
@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_normed_turned_and_written_as_in_torch(tokens: int, pairs: int, normed: bool) -> None:
    generator, heads = torch.Generator().manual_seed(0), Heads(4, 2, 64)
    qkv = torch.randn(tokens, 8 * 64, generator=generator)
    angles = torch.randn(tokens, 1, pairs, generator=generator)
    rotation = (angles.cos(), angles.sin()) if pairs else None
    norms = HeadNorms(*torch.randn(2, 64, generator=generator), 1e-5) if normed else None
    places = torch.randperm(5 * 16, generator=generator)[:tokens]
    caches = torch.zeros(2, 5, 2, 16, 2, 64)
    expected = Ops().rotate_into_pages(qkv.clone(), heads, norms, rotation, caches[0], places)
    got = KERNELS.rotate_into_pages(qkv.clone(), heads, norms, rotation, caches[1], places)
    assert torch.allclose(got, expected, atol=1e-5) and torch.allclose(*caches, atol=1e-5)
    parts = KERNELS.rotate_heads(qkv.clone(), heads, norms, rotation)
    for got, wanted in zip(parts, Ops().rotate_heads(qkv.clone(), heads, norms, rotation), strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("window", [None, 21])
def test_attention_does_not_depend_on_how_a_prompt_is_cut(window: int | None) -> None:
    """To the bit."""
    generator = torch.Generator().manual_seed(0)
    shape = AttentionShape(layers=1, query_heads=6, kv_heads=2, head_dim=32, scale=0.2, window=window)
    backend = CpuAttention(shape, 4, torch.device("cpu"), torch.float32)
    query, cache = torch.randn(90, 6, 32, generator=generator), torch.randn(30, 2, 4, 2, 32, generator=generator)

    def attended(*lengths: int) -> torch.Tensor:
        ends = np.cumsum([0, *lengths])
        batch = SimpleNamespace(
            starts=ends[:-1],
            lengths=np.array(lengths),
            offsets=ends,
            slots=torch.zeros(len(lengths), dtype=torch.int64),
            page_table=torch.randperm(30, generator=torch.Generator().manual_seed(1)).to(torch.int32)[None],
        )
        return backend.attend(query, cache, backend.prepare(batch))

    whole = attended(90)
    for lengths in ((7, 83), (33, 1, 56), (1,) * 90):
        assert torch.equal(attended(*lengths), whole), lengths


class Stored:
    """A LazyTensor that is packed in its checkpoint."""

    def __init__(self, kind: str, packed: np.ndarray) -> None:
        self.kind, self.bytes = kind, packed
        self.whole = unpacked(kind, packed)
        self.shape = tuple(self.whole.shape)

    def __getitem__(self, index: object) -> torch.Tensor:
        return self.whole[index]

    def packed(self, rows: slice, columns: slice) -> tuple[str, np.ndarray]:
        assert columns == slice(0, self.shape[1])
        return self.kind, self.bytes[rows].copy()


def build(dtype: torch.dtype = torch.float32) -> Build:
    return Build(
        dtype=dtype, device=torch.device("cpu"), page_size=16, max_model_len=64, attention_backend=TorchAttention
    )


@needs_kernels
def test_rows_of_a_file_are_copied_once_and_others_not_at_all() -> None:
    mapped = [np.frombuffer(blocks("Q8_0", 24, 64, seed).tobytes(), np.uint8).reshape(24, -1) for seed in range(3)]
    half = blocks("F16", 8, 64)
    joined, alone, last = KERNELS.matrices(
        [("Q8_0", mapped[0]), ("Q8_0", mapped[1]), ("F16", half), ("Q8_0", mapped[2])]
    )
    assert [(matrix.kind, matrix.rows) for matrix in (joined, alone, last)] == [("Q8_0", 48), ("F16", 8), ("Q8_0", 24)]
    assert torch.equal(joined.unpacked(), torch.cat([unpacked("Q8_0", rows) for rows in mapped[:2]]))
    assert torch.equal(last.unpacked(), unpacked("Q8_0", mapped[2]))
    assert np.shares_memory(alone.data.numpy(), half)
    assert not np.shares_memory(last.data.numpy(), mapped[2])


def test_the_log_is_not_silent_while_a_compiler_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(compiled, "SILENCE", 0.0)
    done, failing = Future(), Future()
    done.set_result(None)
    caplog.handler.addFilter(lambda record: failing.done() or failing.set_exception(OSError("no compiler")) or True)
    with pytest.raises(OSError, match="no compiler"):
        compiled.wait_for([done, failing])
    assert "1 of 2 files compiled after 0 s" in caplog.text


@pytest.mark.parametrize("kinds", [("Q4_1", "Q4_1"), ("Q4_1", "Q8_0"), ("Q4_1", "Q2_K")], ids="-".join)
def test_a_layer_keeps_its_parts_packed_if_it_can(kinds: tuple[str, str]) -> None:
    parts = dict(zip(("gate_proj", "up_proj"), (Stored(kinds[0], blocks(kinds[0], 24, 256)), None), strict=True))
    if kinds[1] == "Q2_K":  # a kind without a kernel
        parts["up_proj"] = Stored("Q4_0", blocks("Q4_0", 16, 256, 1))
        parts["up_proj"].kind = "Q2_K"
    else:
        parts["up_proj"] = Stored(kinds[1], blocks(kinds[1], 16, 256, 1))
    layer = ColumnLinear(build(), 256, {"gate_proj": 24, "up_proj": 16})
    for part, tensor in reversed(parts.items()):
        layer.load(f"mlp.{part}.weight", "weight", part, tensor)
    layer.loaded()
    x = torch.randn(6, 256)
    expected = x @ torch.cat([parts["gate_proj"].whole, parts["up_proj"].whole]).t()
    assert torch.allclose(layer(x), expected, atol=1e-4)
    if KERNELS is not None:
        assert len(layer.matrices) == {"Q4_1": 1, "Q8_0": 2, "Q2_K": 0}[kinds[1]]


def test_a_tied_head_uses_the_packed_embedding() -> None:
    stored = Stored("Q8_0", blocks("Q8_0", 40, 64))
    embedding = Embedding(build(), 40, 64)
    head = LMHead(build(), 64, 40, tied=embedding)
    embedding.load("embed_tokens.weight", "weight", "", stored)
    embedding.loaded(), head.loaded()
    assert torch.equal(embedding(torch.tensor([7, 39])), stored.whole[[7, 39]])
    x = torch.randn(3, 64)
    assert torch.allclose(head(x), x @ stored.whole.t(), atol=1e-4)


def test_without_kernels_layers_do_the_same_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored("Q4_1", blocks("Q4_1", 24, 256))
    x = torch.randn(3, 256)

    def run() -> torch.Tensor:
        layer, norm = ColumnLinear(build(), 256, 24), RMSNorm(build(), 24, 1e-5)
        layer.load("proj.weight", "weight", "", stored)
        norm.weight.fill_(1.5)
        return build().kernels.dense.silu_and_mul(norm(layer(x)))

    with_kernels = run()
    monkeypatch.setattr(cpu, "kernels", lambda: None)
    assert torch.allclose(run(), with_kernels, atol=1e-5)


def test_no_compiler_is_a_warning_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("ENGINE_CPU_KERNELS", raising=False)
    assert cpu.kernels.__wrapped__() is None
    assert "install gcc or clang" in caplog.text
    monkeypatch.setenv("CC", "/bin/false")
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent/cache")
    assert cpu.kernels.__wrapped__() is None


# ── where the compiled library is kept ───────────────────────────────────────────────────────


@pytest.fixture
def one_function(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Kernels that compile in no time; the folder that takes the place of /tmp."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "one.c").write_text("int one(void) { return 1; }")
    monkeypatch.setattr(cpu, "FOLDER", tmp_path / "sources")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)


UNUSABLE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a file is in its place": lambda patch: patch.setenv("XDG_CACHE_HOME", "/dev/null"),
    "it cannot be made": lambda patch: patch.setenv("XDG_CACHE_HOME", "/proc/nobody"),
    "no home": no_home,
}


@pytest.mark.parametrize("why", UNUSABLE)
def test_a_cache_that_cannot_be_used_is_replaced_by_a_private_folder(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, one_function: Path, why: str
) -> None:
    UNUSABLE[why](monkeypatch)
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert cpu.sources().library("cc").one() == 1
    (folder,) = (path for path in one_function.iterdir() if path.name.startswith("engine-kernels"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    levels = [record.levelname for record in caplog.records if str(folder) in record.getMessage()]
    assert levels == ["WARNING", "WARNING"]  # one a process, and here are two
    assert caplog.text.count("compiling") == 1


@pytest.mark.parametrize("foreign", ["open to others", "a link"])
def test_no_library_is_loaded_from_a_folder_that_others_can_write(
    monkeypatch: pytest.MonkeyPatch, one_function: Path, foreign: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    expected = one_function / f"engine-kernels-{os.getuid()}"
    elsewhere = one_function / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if foreign == "a link":
        expected.symlink_to(elsewhere)
    else:
        expected.mkdir()
        expected.chmod(0o777)
    assert cpu.sources().library("cc").one() == 1
    assert not any(elsewhere.iterdir())
    assert not any(expected.iterdir())


def test_without_a_compiler_what_was_compiled_before_serves(
    monkeypatch: pytest.MonkeyPatch, one_function: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cpu.sources().compiled_before() is None
    assert cpu.sources().library("cc").one() == 1
    found = cpu.sources().compiled_before()
    assert found is not None and found.one() == 1
    monkeypatch.setattr(compiled, "processor", lambda: "another")
    assert cpu.sources().compiled_before() is None
    no_home(monkeypatch)
    assert cpu.sources().compiled_before() is None


def test_a_compiler_that_is_not_there_is_not_the_caches_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, one_function: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(one_function))
    monkeypatch.setenv("CC", "/nonexistent/cc")
    assert cpu.kernels.__wrapped__() is None
    assert "/nonexistent/cc" in caplog.text
    assert "cache cannot be used" not in caplog.text
