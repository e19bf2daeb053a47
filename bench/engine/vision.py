"""Pictures: ours beside transformers' batched generate, in turn, on the same device and the same prepared pixels.

    python -m bench.engine.vision                                    # Qwen2.5-VL-3B's shape, dummy weights, one GPU
    python -m bench.engine.vision --tiny                             # a small shape, on a CPU
    python -m bench.engine.vision --only check                       # whether both say the same, on a small model
    python -m bench.engine.vision --tiny --only memory               # of 2,000 different pictures

First a small seeded model is asked on both sides: each id that ours draws greedily must be one that transformers
scores highest, or within rounding of it. Then `--requests` prompts, each with a picture of its own of `--side` x
`--side` pixels between texts, are answered with `--tokens` tokens each: all at once by ours, as one batch by
transformers (sdpa, no padding, as all prompts are equally long). Preparing the pixels is timed apart. Before that comes
the time to a first token of a picture that is new, of the same prompt again, and of the same picture in another prompt.
What each turn took is printed as it ends. `--only memory` shows a server `--pictures` different ones once its caches
are full, and prints by how much the memory of each process grows (vision_memory.py). `--only ours` leaves transformers
out, `--only throughput` the check.
"""

import argparse
import asyncio
import copy
import gc
import hashlib
import json
import os
import statistics
import tempfile
import time
import uuid
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers

from bench.engine.vision_memory import body, memory
from bench.lib import synthetic
from bench.lib.figures import shown
from engine import AsyncEngine, SamplingParams
from engine.media.frames import Frames
from engine.messages.media import Prepared, unpacked
from engine.messages.request import Generate

MODEL = Path(__file__).parents[1] / "configs/qwen2.5-vl-3b"
BEFORE, AFTER = 16, 32  # tokens of text around the picture
NEW_IMAGES = 16  # of which the first token is timed
Request = tuple[list[int], Prepared]


# ── what is asked ────────────────────────────────────────────────────────────────────────────


def picture(seed: int, side: int) -> Frames:
    """A made-up picture, smooth in parts."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(0, 200, (1, 8, 8, 3), np.uint8)
    at = np.arange(side) * 8 // side
    pixels = rough[:, at][:, :, at] + rng.integers(0, 56, (1, side, side, 3), np.uint8)
    return Frames(pixels, (), hashlib.sha256(pixels.tobytes()).digest())


def text(seed: int, count: int, config: dict[str, Any]) -> list[int]:
    most = min(config["vocab_size"], config["image_token_id"], config["vision_start_token_id"]) - 1
    return np.random.default_rng(seed).integers(1, most, count).tolist()


def prompt(seed: int, config: dict[str, Any]) -> list[int]:
    """Ids with one placeholder."""
    marks = [config["vision_start_token_id"], config["image_token_id"], config["vision_end_token_id"]]
    return [*text(seed, BEFORE, config), *marks, *text(seed + 1, AFTER, config)]


# ── ours ─────────────────────────────────────────────────────────────────────────────────────


class Ours:
    """An engine, asked with prepared pixels."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        found = engine.front.text
        assert found is not None and found.media is not None
        self.processor = found.media

    def request(self, ids: Sequence[int], medium: Prepared, tokens: int) -> Generate:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        return Generate(uuid.uuid4().hex, params, ids=array("i", ids).tobytes(), media=(medium,))

    async def answer(self, request: Generate) -> tuple[list[int], float]:
        """The ids of the reply, and when the first came."""
        ids: list[int] = []
        first = 0.0
        async for chunk in self.engine.front.generate(request):
            first = first or time.perf_counter()
            ids += chunk.ids
        return ids, first

    async def all_at_once(self, requests: Sequence[Request], tokens: int) -> tuple[list[list[int]], float]:
        """The replies, and the seconds that they took."""
        made = [self.request(ids, medium, tokens) for ids, medium in requests]
        began = time.perf_counter()
        answers = await asyncio.gather(*(self.answer(request) for request in made))
        return [ids for ids, _ in answers], time.perf_counter() - began

    async def first_token(self, ids: Sequence[int], medium: Prepared) -> float:
        request = self.request(ids, medium, 2)
        began = time.perf_counter()
        _, first = await self.answer(request)
        return first - began

    async def forget(self) -> None:
        """Cached prefixes; encoded pictures are forgotten by asking for others."""
        await self.engine.front.flush()


# ── transformers ─────────────────────────────────────────────────────────────────────────────


class Theirs:
    """A model of transformers on `device`."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device

    def inputs(
        self, requests: Sequence[Request], config: dict[str, Any], said: Sequence[list[int]] = ()
    ) -> dict[str, Any]:
        """What generate takes of prompts of one length, and of what was `said` after them."""
        place = config["image_token_id"]
        rows = [
            [id for each in ids for id in ([place] * medium.tokens if each == place else [each])]
            for ids, medium in requests
        ]
        rows = [row + list(more) for row, more in zip(rows, said or [[]] * len(rows), strict=True)]
        ids = torch.tensor(rows, device=self.device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == place).int(),
            "pixel_values": torch.cat([pixel_values(medium) for _, medium in requests]).to(self.device),
            "image_grid_thw": torch.tensor([medium.grid for _, medium in requests], device=self.device),
        }

    @torch.inference_mode()
    def generate(self, inputs: dict[str, Any], tokens: int) -> float:
        """Seconds."""
        self.model.model.rope_deltas = None
        settle(self.device)
        began = time.perf_counter()
        out = self.model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
        settle(self.device)
        assert out.shape[1] - inputs["input_ids"].shape[1] == tokens
        return time.perf_counter() - began

    @torch.inference_mode()
    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        self.model.model.rope_deltas = None
        found: torch.Tensor = self.model(**inputs).logits.float()
        return found


def pixel_values(medium: Prepared, patch: int | None = None) -> torch.Tensor:
    """As transformers' processor makes them: [patches, numbers of a patch]."""
    from engine.layers.vision import merged_patches, normalised

    pixels = unpacked(medium.payload)
    patch = pixels.shape[1] // medium.grid[1]
    return merged_patches(normalised(pixels, torch.device("cpu")), patch, 2, 2)


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def made(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A model of made-up weights."""
    described = transformers.Qwen2_5_VLConfig(**copy.deepcopy(config))
    with torch.device(device):
        torch.manual_seed(0)
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            described, dtype=dtype, attn_implementation="sdpa"
        )
    assert model.lm_head.weight.dtype == dtype and model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    return model.eval()


# ── whether both say the same ────────────────────────────────────────────────────────────────


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The same model with fewer and smaller layers, heads of the same size."""
    vision = config["vision_config"] | {"depth": 4, "hidden_size": 160, "intermediate_size": 256, "num_heads": 2}
    vision |= {"fullatt_block_indexes": [1, 3], "out_hidden_size": 256}
    return config | {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vision_config": vision,
    }  # fmt: skip


@contextmanager
def folder_of(config: dict[str, Any], model: Any = None) -> Iterator[Path]:
    """A checkpoint of `config`, with the weights of `model` if it has any."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model is not None:
            model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "preprocessor_config.json").write_text((MODEL / "preprocessor_config.json").read_text())
        synthetic.tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
        yield folder


async def check(options: argparse.Namespace, config: dict[str, Any], device: torch.device) -> None:
    """Raises SystemExit where ours draws what transformers would not."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config, tokens = small(config), 24
    model = made(config, device, dtype)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if parameter.ndim == 1 and "bias" not in name else 0.0, 0.06)
    theirs = Theirs(model, device)
    with folder_of(config, model) as folder:
        async with AsyncEngine(model=str(folder), dtype=str(dtype).removeprefix("torch."), **limits(options)) as engine:
            ours = Ours(engine)
            requests = [(prompt(10 * seed, config), ours.processor.prepare(picture(seed, 224))) for seed in range(6)]
            said, _ = await ours.all_at_once(requests, tokens)
            again, _ = await ours.all_at_once(requests, tokens)
    logits = theirs.logits(theirs.inputs(requests, config, said))[:, -tokens - 1 : -1]
    chosen = logits.gather(2, torch.tensor(said, device=device)[:, :, None])[:, :, 0]
    short = (logits.amax(2) - chosen) / logits.std()
    allowed = 0.15 if dtype == torch.bfloat16 else 1e-3
    different = len({tuple(ids) for ids in said})
    print(
        f"check, {dtype}: of {short.numel()} ids ours drew, {int((short == 0).sum())} are transformers' first; the "
        f"worst is {short.max():.4f} deviations of the logits below it, allowed {allowed}; {different} replies of "
        f"{len(said)} differ; asked again {'the same' if again == said else 'others'}",
        flush=True,
    )
    if short.max() > allowed or different < 2:
        raise SystemExit("ours and transformers do not say the same")


def limits(options: argparse.Namespace) -> dict[str, Any]:
    """Options of the engine: it leaves memory to transformers."""
    given = dict(pair.split("=", 1) for pair in options.option)
    if options.device == "cuda":
        return {"memory_fraction": 0.5, **given}
    return {"device": "cpu", "max_model_len": 2048, **given}


# ── how long both take ───────────────────────────────────────────────────────────────────────


async def throughput(options: argparse.Namespace, config: dict[str, Any], ours: Ours, theirs: Theirs | None) -> None:
    """Prints the table of `--repeat` turns."""
    times: dict[str, list[float]] = {"ours": [], "transformers": []}
    preparing: list[float] = []
    for turn in range(options.repeat + 1):  # the first warms up
        requests = []
        for index in range(options.requests):
            frames = picture(1000 * turn + index, options.side)
            began = time.perf_counter()
            requests.append((prompt(1000 * turn + 2 * index, config), ours.processor.prepare(frames)))
            preparing.append(time.perf_counter() - began)
        await ours.forget()
        said, seconds = await ours.all_at_once(requests, options.tokens)
        assert all(len(ids) == options.tokens for ids in said), "a reply ended early"
        found = {"ours": seconds}
        if theirs is not None:
            tokens = options.tokens if turn else min(8, options.tokens)
            found["transformers"] = theirs.generate(theirs.inputs(requests, config), tokens)
        if turn:
            for name, value in found.items():
                times[name].append(value)
            print(f"turn {turn}: " + ", ".join(f"{name} {value:.2f} s" for name, value in found.items()), flush=True)
    medium = requests[0][1]
    print(f"\npreparing one picture: {1e3 * statistics.median(preparing):.1f} ms of one core; {medium.tokens} tokens")
    shape = f"{options.requests} x ({options.side} x {options.side}, {options.tokens} out)"
    print(f"\n| {shape} | s | tokens/s |\n|---|---|---|")
    for name, values in times.items():
        if values:
            rate = options.requests * options.tokens / statistics.median(values)
            print(f"| {name} | {shown(values, 2)} | {rate:.0f} |")
    if theirs is not None:
        ratios = [their / own for own, their in zip(times["ours"], times["transformers"], strict=True)]
        print(f"| ratio | {shown(ratios, 2)} | |")


async def first_tokens(options: argparse.Namespace, config: dict[str, Any], ours: Ours) -> None:
    """Prints the time to a first token, one request at a time."""
    rows: dict[str, list[float]] = {
        "new picture": [],
        "the same prompt again": [],
        "the same picture, another prompt": [],
    }
    preparing = []
    for index in range(NEW_IMAGES + 1):
        frames = picture(900_000 + index, options.side)
        began = time.perf_counter()
        medium = ours.processor.prepare(frames)
        preparing.append(time.perf_counter() - began)
        one, other = prompt(70_000 + 4 * index, config), prompt(70_002 + 4 * index, config)
        for name, ids in zip(rows, (one, one, other), strict=True):
            rows[name].append(await ours.first_token(ids, medium))
    print("\n| time to the first token, alone | ms | of the first |\n|---|---|---|")
    rows = {name: values[1:] for name, values in rows.items()}
    prepared = statistics.median(preparing)
    first = statistics.median(rows["new picture"])
    for name, values in rows.items():
        share = statistics.median(values) / first
        print(f"| {name} | {shown([1e3 * value for value in values], 2)} | {share:.2f} |")
    again = statistics.median(rows["the same prompt again"])
    print(f"| the same prompt again, where the first includes preparing | | {again / (first + prepared):.2f} |")


def show_memory(options: argparse.Namespace, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Prints what different pictures do to the memory of each process of a server."""
    vision = config["vision_config"]
    square = vision["patch_size"] * vision["spatial_merge_size"]
    about = {"text": len(prompt(0, config)) - 1, "pixels": square**2, "width": config["hidden_size"] * dtype.itemsize}
    given = {name: str(value) for name, value in limits(options).items()} | {"dtype": str(dtype).removeprefix("torch.")}
    with folder_of(config) as folder:
        memory(
            folder,
            given,
            options.pictures,
            lambda index: body(prompt(index, config), picture(index, options.side).pixels[0]),
            about,
        )


async def run(options: argparse.Namespace) -> None:
    config = json.loads((Path(options.model) / "config.json").read_text())
    device = torch.device(options.device)
    if options.tiny:
        config = small(config)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {device_name(device)}", flush=True)
    if options.only in ("all", "check"):
        await check(options, json.loads((Path(options.model) / "config.json").read_text()), device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.only == "check":
        return
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.only == "memory":
        show_memory(options, config, dtype)
        return
    with folder_of(config) as folder:
        engine_options = {"dtype": str(dtype).removeprefix("torch."), "load": "dummy", **limits(options)}
        async with AsyncEngine(model=str(folder), **engine_options) as engine:
            ours = Ours(engine)
            await first_tokens(options, config, ours)
            theirs = Theirs(made(config, device, dtype), device) if options.only in ("all", "throughput") else None
            await throughput(options, config, ours, theirs)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="a folder with config.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--side", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--repeat", type=int, default=2, help="turns that are timed")
    parser.add_argument("--pictures", type=int, default=2000, help="that memory is measured over")
    parser.add_argument("--tiny", action="store_true", help="a small shape, few requests")
    parser.add_argument("--only", choices=("all", "check", "throughput", "ours", "memory"), default="all")
    parser.add_argument("--option", action="append", default=[], metavar="N=V", help="an option of the engine")
    options = parser.parse_args()
    usual = {"requests": 4, "side": 112, "tokens": 16} if options.tiny else {"requests": 64, "side": 640, "tokens": 256}
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    asyncio.run(run(options))


if __name__ == "__main__":
    main()
