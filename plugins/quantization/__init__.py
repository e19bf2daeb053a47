"""Manifest of the built-in quantizations."""

from engine.plugin import hookimpl
from engine.plugin.hookspecs import Register

API = 1


@hookimpl
def register_quantization(register: Register) -> None:
    register(
        "fp8",
        "engine_plugins.quantization.fp8:Fp8",
        methods=("fp8", "compressed-tensors", "fbgemm_fp8"),
        description="E4M3 weights with scales of blocks (DeepSeek's), rows or tensors; quantizes other checkpoints",
    )
