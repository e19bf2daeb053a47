"""Latent attention without absorption, as a plugin: at every step all of a row's context becomes keys and values.

What bench/engine/gpu.py measures the absorbed way against: `--rows context --option plugins=naive`. In all else it is
the backend `flashinfer`, but that its steps are not captured: those of few rows wait for the host.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from engine.layers import Batch
from engine.plugin import hookimpl
from engine.plugin.hookspecs import Register
from engine_plugins.attention.flashinfer.mla import FlashInferLatentAttention


class NaiveLatentAttention(FlashInferLatentAttention):
    def expands(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.ones(len(lengths), bool)

    def capture(self, batch: Batch) -> None:
        return None

    def capture_prompts(self, batch: Batch) -> None:
        return None


@hookimpl
def register_latent_attention(register: Register) -> None:
    register("naive", "naive:NaiveLatentAttention", devices=("cuda",), preference=0, description="for benchmarks")


@contextmanager
def installed() -> Iterator[None]:
    """For as long, `--plugins naive` finds this file, here and in processes that are started."""
    with TemporaryDirectory() as folder:
        info = Path(folder) / "naive-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: naive\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[engine.plugins]\nnaive = naive\n")
        before = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, str(Path(__file__).parent), before])
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            sys.path.remove(folder)
            os.environ["PYTHONPATH"] = before
