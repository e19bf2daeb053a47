"""FlashInfer as it is installed: its version, its compiled modules, and numbers of its kernels that both backends use.

A module is compiled for types and sizes, once, into FlashInfer's own cache. `load_modules` compiles what is missing,
all at the same time, and loads them. Left out: which modules a backend needs (mha.py, mla.py).
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.plugin import ConfigError

logger = logging.getLogger("engine.attention")

VERSIONS = ("0.6.14",)  # whose plan and run take the arguments given here
DTYPES = (torch.bfloat16, torch.float16)
COMPILE_SECONDS = {"fa2": 40, "fa3": 80}  # with 16 processors
FA3_TILE = 128  # queries of one head that FA3 takes at a time
NORMAL, CAUSAL, NHD = 0, 1, 0  # flashinfer.utils.MaskMode and TensorLayout


class Module(NamedTuple):
    """One to load. `describe` and `load` are FlashInfer's functions of these `terms`."""

    describe: Callable[..., Any]
    load: Callable[..., Any]
    terms: tuple[Any, ...]


def prefill_module(name: str, *terms: Any) -> Module:
    """The kernel `name`, fa2 or fa3, for keys and values in pages or side by side."""
    jit, prefill = import_module("flashinfer.jit"), import_module("flashinfer.prefill")
    return Module(jit.gen_batch_prefill_module, prefill.get_batch_prefill_module, (name, *terms))


def mla_module(name: str, *terms: Any) -> Module:
    """The kernel for latents, in the way that `name`, fa2 or fa3, says."""
    jit, mla = import_module("flashinfer.jit"), import_module("flashinfer.mla._core")
    return Module(jit.gen_batch_mla_module, mla.get_batch_mla_module, (name, *terms))


def load_modules(backend: str, wanted: Mapping[str, Module]) -> dict[str, Any]:
    """The modules `wanted`, by fa2 or fa3, compiled first where they are not yet. Raises ConfigError, which names the
    `backend`, where they cannot be had."""
    try:
        specs = {name: module.describe(*module.terms) for name, module in wanted.items()}
        missing = {name: spec for name, spec in specs.items() if not spec.is_compiled}
        if missing:
            compile_modules(missing)
        return {name: module.load(*module.terms) for name, module in wanted.items()}
    except (RuntimeError, OSError) as error:  # what FlashInfer raises when it cannot compile or load a module
        raise ConfigError(f"{backend}: {error}") from error


def compile_modules(specs: dict[str, Any]) -> None:
    """Compiles modules at once, into FlashInfer's cache. Raises ConfigError where that is not possible or wanted."""
    names = ", ".join(spec.name for spec in specs.values())
    if os.environ.get("FLASHINFER_DISABLE_JIT"):
        raise ConfigError(f"attention flashinfer: {names} is not compiled, and FLASHINFER_DISABLE_JIT forbids it")
    lacking = [tool for tool, there in (("nvcc", has_nvcc()), ("ninja", shutil.which("ninja"))) if not there]
    if lacking:
        raise ConfigError(
            f"attention flashinfer has to compile {names}, and there is no {' and no '.join(lacking)}: install the "
            "CUDA toolkit and ninja, or FlashInfer's compiled modules (the package flashinfer-jit-cache)"
        )
    environment = import_module("flashinfer.jit.env")
    seconds = max(COMPILE_SECONDS[name] for name in specs)
    logger.info(
        "compiling flashinfer's %s, once (about %d s with 16 processors), into %s",
        names,
        seconds,
        environment.FLASHINFER_JIT_DIR,
    )
    began = time.perf_counter()
    # Not its `build_jit_specs`: ninja's record then lies in another place than a module's own load looks in, and that
    # compiles it once more.
    with ThreadPoolExecutor(len(specs)) as threads:
        for _ in threads.map(lambda spec: spec.build(verbose=False), specs.values()):
            pass
    logger.info("compiled flashinfer's modules in %.0f s", time.perf_counter() - began)


def has_nvcc() -> bool:
    """Whether CUDA's compiler is where FlashInfer looks for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") is not None or (Path(home) / "bin" / "nvcc").exists()


def check_installed() -> None:
    """Raises ConfigError where FlashInfer is missing, or another version than VERSIONS."""
    try:
        version = metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"attention flashinfer needs the package flashinfer-python: pip install flashinfer-python=={VERSIONS[-1]}"
        ) from None
    if version not in VERSIONS:
        raise ConfigError(
            f"attention flashinfer is written for flashinfer-python {', '.join(VERSIONS)}, not {version}: "
            f"pip install flashinfer-python=={VERSIONS[-1]}"
        )


def hardware(device: torch.device) -> tuple[tuple[int, int], int]:
    """A GPU's compute capability, and how many processors it has."""
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count


def fa3_plan_bytes(works: int, processors: int) -> int:
    """Of FA3's plan: 7 lists of tiles times heads and one of processors, PrefillSM90Plan in its scheduler.cuh."""
    return 32 * works + 4 * processors + 4096
