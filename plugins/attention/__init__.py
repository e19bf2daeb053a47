"""Manifest of the built-in attention backends."""

from engine.plugin import hookimpl
from engine.plugin.hookspecs import Register

API = 1


@hookimpl
def register_attention(register: Register) -> None:
    register(
        "cpu",
        "engine_plugins.attention.cpu:CpuAttention",
        devices=("cpu",),
        preference=10,
        description="a kernel in C that reads pages where they lie; float32, compiled on first use",
    )
    register(
        "torch",
        "engine_plugins.attention.torch.mha:TorchAttention",
        devices=("cpu", "cuda"),
        preference=0,
        description="PyTorch's scaled_dot_product_attention over gathered pages; runs everywhere",
    )
    register(
        "triton",
        "engine_plugins.attention.triton.mha:TritonAttention",
        devices=("cuda",),
        preference=20,
        description="Triton kernels that read pages where they lie; any page size, FP8 caches, CUDA graphs",
    )
    register(
        "flashinfer",
        "engine_plugins.attention.flashinfer.mha:FlashInferAttention",
        devices=("cuda",),
        preference=30,
        description="FlashInfer's kernels (pip install flashinfer-python); any page size, FP8 caches, CUDA graphs",
    )
    register(
        "hybrid",
        "engine_plugins.attention.hybrid:HybridAttention",
        devices=("cuda",),
        preference=40,
        description="FlashInfer's FA3 kernel for prompts, Triton for the rest: the fastest on Hopper",
    )


@hookimpl
def register_latent_attention(register: Register) -> None:
    register(
        "torch",
        "engine_plugins.attention.torch.mla:TorchLatentAttention",
        devices=("cpu", "cuda"),
        preference=0,
        description="latent attention in PyTorch over gathered latents; runs everywhere",
    )
    register(
        "triton",
        "engine_plugins.attention.triton.mla:TritonLatentAttention",
        devices=("cuda",),
        preference=20,
        description="Triton kernels that read a latent once for many heads; any page size, FP8 caches, CUDA graphs",
    )
    register(
        "flashinfer",
        "engine_plugins.attention.flashinfer.mla:FlashInferLatentAttention",
        devices=("cuda",),
        preference=30,
        description="FlashInfer's MLA kernels (pip install flashinfer-python); any page size, FP8 caches, CUDA graphs",
    )
