"""Clips: the time to a first token of what was seen before in parts, one request at a time.

    python -m bench.engine.clips             # Qwen2.5-VL-3B's shape, dummy weights, one GPU
    python -m bench.engine.clips --tiny      # a small shape, on a CPU

A clip has `--frames` frames of `--side` x `--side` pixels, two a second. First a new one is shown, then, behind other
texts: the same one; one that overlaps it by half; one that stands still; and a picture that is a frame of that. Then
one that begins as the first does, for three quarters, behind the same text. Texts differ from the first token on, so
only what is encoded can be shared, but for the last row. The table has medians of `--repeat` turns. To prepare a clip
is timed apart. It runs on commits before slices, too, where each medium is encoded as a whole.
"""

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.engine.vision import MODEL, Ours, device_name, folder_of, limits, small, text
from bench.lib.figures import shown
from engine import AsyncEngine
from engine.media.frames import Frames


def scenes(seed: int, count: int, side: int) -> np.ndarray:
    """Made-up frames, no two alike: uint8 [count, side, side, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def clip(pixels: np.ndarray) -> Frames:
    times = tuple(at / 2 for at in range(len(pixels)))
    return Frames(pixels, times, pixels[::7, ::9, ::9].tobytes(), len(pixels) / 2)


def prompt(seed: int, medium: Any, config: dict[str, Any]) -> list[int]:
    place = config["image_token_id" if medium.kind == "image" else "video_token_id"]
    marks = [config["vision_start_token_id"], place, config["vision_end_token_id"]]
    return [*text(seed, 16, config), *marks, *text(seed + 1, 32, config)]


async def turn(options: argparse.Namespace, config: dict[str, Any], ours: Ours, seed: int) -> dict[str, float]:
    """Milliseconds to the first token of each of the cases, and those of preparing a clip."""
    half, count = options.frames // 2, options.frames
    pixels = scenes(seed, count + half, options.side)
    began = time.perf_counter()
    whole = ours.processor.prepare(clip(pixels[:count]))
    found = {"preparing a clip": 1e3 * (time.perf_counter() - began)}
    other = np.concatenate((pixels[: 3 * half // 2], pixels[count : count + half - half // 2]))
    still = pixels[-1:].repeat(count, axis=0)
    cases = {
        "a new clip": (0, whole),
        "the same clip, another text": (2, whole),
        "one that overlaps it by half": (4, ours.processor.prepare(clip(pixels[half:]))),
        "a clip that stands still": (6, ours.processor.prepare(clip(still))),
        "a picture that is its frame": (8, ours.processor.prepare(Frames(pixels[-1:], (), pixels[-1:].tobytes()))),
        "one that begins as the first, the same text": (0, ours.processor.prepare(clip(other))),
    }
    for name, (at, medium) in cases.items():
        found[name] = 1e3 * await ours.first_token(prompt(100 * seed + at, medium, config), medium)
    print(f"turn {seed}: {whole.tokens} tokens a clip; " + ", ".join(f"{ms:.0f}" for ms in found.values()), flush=True)
    return found


async def run(options: argparse.Namespace) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    device = torch.device(options.device)
    config = small(config) if options.tiny else config
    print(f"torch {torch.__version__}, {device_name(device)}", flush=True)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    with folder_of(config) as folder:
        async with AsyncEngine(model=str(Path(folder)), dtype=dtype, load="dummy", **limits(options)) as engine:
            ours = Ours(engine)
            turns = [await turn(options, config, ours, seed) for seed in range(options.repeat + 1)][1:]
    print(f"\n| {options.frames} frames of {options.side} x {options.side} | ms | of the first |\n|---|---|---|")
    first = statistics.median([each["a new clip"] for each in turns])
    for name in turns[0]:
        values = [each[name] for each in turns]
        print(f"| {name} | {shown(values, 1)} | {statistics.median(values) / first:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--side", type=int)
    parser.add_argument("--repeat", type=int, default=3, help="turns that are timed")
    parser.add_argument("--tiny", action="store_true", help="a small shape, short clips")
    parser.add_argument("--option", action="append", default=[], metavar="N=V", help="an option of the engine")
    options = parser.parse_args()
    for name, value in ({"frames": 16, "side": 112} if options.tiny else {"frames": 64, "side": 448}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    asyncio.run(run(options))


if __name__ == "__main__":
    main()
