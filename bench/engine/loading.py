"""How fast weights are loaded: gigabytes a second of a checkpoint, by the code that starts a worker.

    python -m bench.engine.loading [--gigabytes 4] [--device cuda] [--dtype bfloat16] [--cold] [--model DIR]

Without a directory it writes layers of Llama 3.1 8B's shape, as many as asked for, and removes them afterwards. Beside
it stands the floor on the same bytes: reading the files once (from the page cache, or with `--cold` from the disk), and
on a GPU also copying as much from pinned memory.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from engine.layers.build import Build
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins, resolve
from engine.worker.backends import Backends
from engine.worker.choices import model_for
from engine.worker.weights import load_weights, weight_bytes

CONFIG = Path(__file__).parent / "configs" / "llama3.1-8b" / "config.json"
READ = 16 << 20


def write(folder: Path, gigabytes: float) -> None:
    """A checkpoint of about so many bytes, in files of some layers each as the hub has them."""
    from safetensors.torch import save_file

    config = json.loads(CONFIG.read_text())
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = 2 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    rest = 4 * hidden * vocabulary
    config["num_hidden_layers"] = layers = max(1, round((gigabytes * 1e9 - rest) / layer))
    (folder / "config.json").write_text(json.dumps(config))

    def matrix(*shape: int) -> torch.Tensor:
        return torch.full(shape, 0.01, dtype=torch.bfloat16)

    names = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    inners = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    for number in range(layers):
        at = f"model.layers.{number}"
        tensors = {f"{at}.self_attn.{name}.weight": matrix(*shape) for name, shape in names.items()}
        tensors |= {f"{at}.mlp.{name}.weight": matrix(*shape) for name, shape in inners.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = matrix(hidden)
        save_file(tensors, folder / f"layer-{number:03d}.safetensors")
    ends = {"model.embed_tokens.weight": matrix(vocabulary, hidden), "model.norm.weight": matrix(hidden)}
    if not config.get("tie_word_embeddings"):
        ends["lm_head.weight"] = matrix(vocabulary, hidden)
    save_file(ends, folder / "ends.safetensors")


def forget(folder: Path) -> None:
    """Asks the system to drop the files from its page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(folder: Path) -> float:
    """Seconds to read the files, one after the other."""
    buffer = bytearray(READ)
    began = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def copied(size: int) -> float:
    """Seconds to copy `size` bytes to the GPU from pinned memory."""
    source = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(max(1, size // source.numel())):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """Seconds, and the bytes that the weights take."""
    plugins = Plugins.load(())
    checkpoint = open_checkpoint(plugins, str(folder))
    terms = checkpoint.config()
    build = Build(
        dtype=dtype,
        device=device,
        page_size=16,
        max_model_len=4096,
        attention_backend=Backends(plugins, device.type).build,
    )
    model = resolve(model_for(plugins, terms["architectures"]).target)(terms, build)
    began = time.perf_counter()
    load_weights(model, list(checkpoint.tensors()))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, weight_bytes(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of the weights; default: float32 on a CPU, else bfloat16")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache first")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary directory")
    given = parser.parse_args()
    device = torch.device(given.device)
    dtype = getattr(torch, given.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = given.model or Path(temporary)
        if given.model is None:
            write(folder, given.gigabytes)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB on {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")

        def report(what: str, seconds: float) -> None:
            print(f"{what:<28} {seconds:8.3f} s {size / seconds / 1e9:8.2f} GB/s")

        if given.cold:
            forget(folder)
        report("read, from disk" if given.cold else "read", read_once(folder))
        if device.type == "cuda":
            report("copy from pinned memory", copied(size))
        for turn in ("load", "load again"):
            if given.cold:
                forget(folder)
            seconds, held = load(folder, device, dtype)
            report(f"{turn} ({held / 1e9:.2f} GB)", seconds)


if __name__ == "__main__":
    main()
