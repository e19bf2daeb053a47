"""Two layouts of the KV cache on one GPU: a page's layers side by side (ours), or a layer's pages (as it was before).

    python -m bench.kernels.pages [--backends triton,flashinfer] [--repeat 3]

Attention reads the same pages either way, at another distance. What differs is a page that moves to the host: with its
layers side by side it is one copy. Both layouts are measured in turn; figures are medians over the repetitions, and
the ratio is that of the same turn, with its range. Every backend's output must be equal bit for bit in both.
"""

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from bench.kernels.attention import DEVICE, DIM, HEADS, Setting, paged_backend
from bench.lib.timing import graph_time
from engine.layers.attention import AttentionShape

LAYERS = {"llama3.1-8b": 32, "qwen3-0.6b": 28}
DECODES = ((1, 4096), (8, 4096), (64, 1024), (64, 4096), (256, 1024))
MOVED = 64  # pages
ORDERS = ("page first", "layer first")


class Layers(Setting):
    """A whole model's caches, in one of the layouts."""

    def __init__(self, model: str, rows: int, length: int) -> None:
        super().__init__(HEADS[model], rows, length, 16, torch.bfloat16)
        heads, layers = HEADS[model], LAYERS[model]
        self.shape = AttentionShape(
            layers=layers, query_heads=heads[0], kv_heads=heads[1], head_dim=DIM, scale=DIM**-0.5
        )
        page = (2, 16, heads[1], DIM)
        whole = torch.empty(self.table.numel(), layers, *page, device=DEVICE, dtype=torch.bfloat16).normal_()
        self.whole = {"page first": whole, "layer first": whole.transpose(0, 1).contiguous()}
        self.views = {"page first": list(whole.unbind(1)), "layer first": list(self.whole["layer first"].unbind(0))}


def decode(name: str, setting: Layers, order: str) -> tuple[float, Tensor]:
    """Microseconds of a layer's decode step, all layers in turn, and what the first gives."""
    backend = paged_backend(name, setting)
    assert backend is not None
    batch = setting.decode_batch()
    generator = torch.Generator(DEVICE).manual_seed(1)
    shape = (setting.rows, setting.shape.query_heads, DIM)
    query = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    plan = backend.capture(batch)
    backend.refill(plan, batch.slots.cpu().numpy(), batch.starts)
    time = graph_time(lambda cache: backend.attend(query, cache, plan), setting.views[order])
    return time, backend.attend(query, setting.views[order][0], plan)


def seconds(move: Callable[[], None]) -> float:
    for _ in range(3):
        move()
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        move()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def moves(setting: Layers, order: str, inwards: bool) -> dict[str, float]:
    """Seconds to move MOVED scattered pages to pinned memory, or back: a copy for each dense piece, or gathered by a
    kernel into one piece first."""
    whole = setting.whole[order]
    pages = torch.randperm(setting.table.numel())[:MOVED].tolist()
    index = torch.tensor(pages, device=DEVICE)
    if order == "page first":
        places = [whole[page] for page in pages]
    else:
        places = [whole[layer, page] for page in pages for layer in range(len(whole))]
    hosts = [torch.empty(place.shape, dtype=place.dtype, pin_memory=True) for place in places]
    axis = 0 if order == "page first" else 1
    gathered = whole.index_select(axis, index)
    host = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=True)

    def copies() -> None:
        for place, there in zip(places, hosts, strict=True):
            place.copy_(there, non_blocking=True) if inwards else there.copy_(place, non_blocking=True)

    def kernel() -> None:
        if inwards:
            gathered.copy_(host, non_blocking=True)
            whole.index_copy_(axis, index, gathered)
        else:
            torch.index_select(whole, axis, index, out=gathered)
            host.copy_(gathered, non_blocking=True)

    return {"copies": seconds(copies), "kernel and copy": seconds(kernel)}


def ratios(rows: dict[str, list[float]]) -> str:
    each = [first / second for first, second in zip(rows[ORDERS[0]], rows[ORDERS[1]], strict=True)]
    return f"{statistics.median(each):.3f} ({min(each):.3f} - {max(each):.3f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="triton,flashinfer")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--models", default=",".join(HEADS))
    options = parser.parse_args()
    different = 0
    print(f"decode, us a layer: {' | '.join(ORDERS)} | ratio (range)")
    for model in options.models.split(","):
        for rows, length in DECODES:
            setting = Layers(model, rows, length)
            for name in options.backends.split(","):
                times: dict[str, list[float]] = {order: [] for order in ORDERS}
                outs: dict[str, Tensor] = {}
                for _ in range(options.repeat):
                    for order in ORDERS:
                        time, outs[order] = decode(name, setting, order)
                        times[order].append(time)
                equal = torch.equal(*outs.values())
                different += not equal
                middle = " | ".join(f"{statistics.median(times[order]):8.1f}" for order in ORDERS)
                said = "" if equal else "  OTHER OUTPUT"
                print(f"{model:12} {rows:4} x {length:5} {name:10} {middle} | {ratios(times)}{said}", flush=True)
            del setting
            torch.cuda.empty_cache()
    print(f"\n{MOVED} scattered pages of 16 tokens over all layers, ms and GB/s")
    for model in options.models.split(","):
        setting = Layers(model, 64, 4096)
        size = MOVED * setting.whole["page first"][0].nbytes
        for inwards in (False, True):
            for order in ORDERS:
                for way, time in moves(setting, order, inwards).items():
                    where = "host to device" if inwards else "device to host"
                    speed = size / time / 1e9
                    print(f"{model:12} {where} {order:12} {way:16} {1e3 * time:8.2f} ms {speed:7.1f} GB/s", flush=True)
        del setting
        torch.cuda.empty_cache()
    print(f"outputs that differ: {different}")
    return min(different, 1)


if __name__ == "__main__":
    sys.exit(main())
