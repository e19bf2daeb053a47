"""One place chooses kernels, each has its definition beside it, and a model computes with what its build was given."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch

import engine.kernels
import engine.layers.attention
from engine.errors import ConfigError
from engine.kernels import KernelSet, choose
from engine.kernels.cpu import calls as cpu
from engine.kernels.cpu.calls import Kernels
from engine.kernels.dense.reference import Ops
from engine.kernels.fp8.reference import Fp8Ops
from engine.kernels.logits.host import HostLogitOps
from engine.layers import AttentionShape, Build, LatentShape, RMSNorm
from engine_plugins.attention.cpu import CpuAttention
from engine_plugins.attention.torch.mha import TorchAttention
from engine_plugins.attention.torch.mla import TorchLatentAttention

CPU = torch.device("cpu")
MEMBERS = [field.name for field in dataclasses.fields(KernelSet)]
FOLDERS = sorted(path.parent.name for path in Path(engine.kernels.__file__).parent.glob("*/__init__.py"))
ELSEWHERE = {"cpu"}  # a way to compute, not a subject: what its kernels compute is defined in dense and attention


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder not in ELSEWHERE])
def test_each_folder_has_its_definitions(folder: str) -> None:
    assert (Path(engine.kernels.__file__).parent / folder / "reference.py").exists()


def implementations() -> list[tuple[str, type]]:
    found: list[tuple[str, type]] = [("dense", Kernels), ("logits", HostLogitOps)]
    pytest.importorskip("triton")
    from engine.kernels.delta.triton import TritonDeltaOps
    from engine.kernels.dense.triton import TritonOps
    from engine.kernels.experts.triton import TritonMoeOps
    from engine.kernels.fp8.triton import TritonFp8Ops
    from engine.kernels.logits.triton import TritonLogitOps

    found += [("dense", TritonOps), ("experts", TritonMoeOps), ("fp8", TritonFp8Ops), ("logits", TritonLogitOps)]
    return [*found, ("delta", TritonDeltaOps)]


@pytest.mark.parametrize("member", MEMBERS)
def test_each_member_computes_what_its_reference_defines(member: str) -> None:
    """Operation by operation, with the same arguments in the same order."""
    definition = type(getattr(KernelSet(), member))
    assert definition.__module__ == f"engine.kernels.{member}.reference"
    made = [each for name, each in implementations() if name == member]
    assert made, "nothing computes it faster"
    for implementation in made:
        assert issubclass(implementation, definition)
        for name, function in inspect.getmembers(definition, inspect.isfunction):
            if name.startswith("_"):
                continue
            given = inspect.signature(getattr(implementation, name)).parameters
            wanted = inspect.signature(function).parameters
            assert [(each.name, each.kind, each.default) for each in given.values()] == [
                (each.name, each.kind, each.default) for each in wanted.values()
            ], f"{implementation.__name__}.{name}"


def test_a_cpu_computes_in_c_what_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert type(choose(CPU, dtype).dense) is Ops
    assert choose(CPU, torch.float32).dense is (cpu.kernels() or choose(CPU, torch.float32).dense)
    assert not choose(CPU, torch.float32).fp8.pays
    monkeypatch.setattr(cpu, "kernels", lambda: None)
    assert type(choose(CPU, torch.float32).dense) is Ops


def test_a_gpu_computes_in_triton_where_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    names = [type(getattr(choose(torch.device("cuda"), torch.bfloat16), member)).__module__ for member in MEMBERS]
    there = ["engine.kernels.dense.triton", "engine.kernels.experts.triton"]
    assert names[:2] == there and names[3] == "engine.kernels.logits.triton"
    monkeypatch.setattr(engine.kernels, "has_triton", lambda: False)
    chosen = choose(torch.device("cuda"), torch.bfloat16)
    assert [type(getattr(chosen, member)) for member in MEMBERS] == [
        type(getattr(KernelSet(), member)) for member in MEMBERS
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_what_would_not_depend_on_the_batch_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=f"no batch-invariant kernels for bfloat16 on {device}.*invariant=False"):
        choose(torch.device(device), torch.bfloat16, invariant=True)


def test_layers_compute_with_the_kernels_of_their_build() -> None:
    class Halves(Ops):
        def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
            return hidden / 2

    def no_attention(*_: object) -> object:
        raise AssertionError("nothing attends")

    terms = {"dtype": torch.float32, "device": CPU, "page_size": 4, "max_model_len": 8}
    ours = Build(**terms, attention_backend=no_attention, kernels=KernelSet(dense=Halves(), fp8=Fp8Ops()))
    assert RMSNorm(ours, 3, 1e-5)(torch.ones(1, 3)).tolist() == [[0.5] * 3]
    assert type(Build(**terms, attention_backend=no_attention).kernels.dense) is type(choose(CPU, torch.float32).dense)


def test_an_attention_backend_gets_the_kernels_of_its_build_and_chooses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen_again(*_: object) -> KernelSet:
        raise AssertionError("the build has chosen")

    ours = KernelSet()
    terms = {"dtype": torch.float32, "device": CPU, "page_size": 4, "max_model_len": 8, "kernels": ours}
    latents = {"latent_dim": 16, "rope_dim": 16, "key_dim": 16, "value_dim": 16}
    with monkeypatch.context() as patched:
        patched.setattr(engine.layers.attention, "choose", chosen_again)
        assert Build(**terms, attention_backend=TorchAttention).attention(1, 2, 2, 16).kernels is ours
        build = Build(**terms, attention_backend=TorchLatentAttention)
        shape = LatentShape(layers=1, query_heads=2, scale=1.0, **latents)
        assert build.latent_attention(shape).kernels is ours
        with pytest.raises(ConfigError, match="needs a C compiler"):  # `ours` are the definitions, in torch
            Build(**terms, attention_backend=CpuAttention).attention(1, 2, 2, 16)
    alone = TorchAttention(AttentionShape(layers=1, query_heads=2, kv_heads=2, head_dim=16, scale=1.0), 4, CPU,
                           torch.float32)  # fmt: skip
    assert type(alone.kernels.dense) is type(choose(CPU, torch.float32).dense)
