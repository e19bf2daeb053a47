"""Whether memory stays flat while a server is shown different pictures: `python -m bench.engine.vision --only memory`.

Every picture is another one, a PNG in the body of its own request, eight at a time. So it takes the whole way: the
front reads it, a decoder makes pixels of it, the core keeps them, the worker encodes them. Each of these is a process
of its own here, and the resident memory of each is looked at apart. What is kept on purpose has bounds; these are set
low, unless --option says otherwise, and printed with how many pictures fill them. Twice as many are shown first: once
things come and go, heaps still grow for a while by the holes between them. The slope of the pictures after that is what
is not accounted for: least squares over all of them, and over their last half. A process that kept one picture in a
hundred for good would grow by a hundredth of what a picture takes.
"""

import base64
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.lib.processes import resident_bytes
from bench.lib.served import Served
from engine.media import store
from engine.options.sizes import size_of
from engine.runtime import repeats
from engine.sched import assets

AT_ONCE = 8
SAMPLES = 40  # looks at the memory, over the pictures that are measured
ROWS = 8  # of the table
SETTLES = 2  # times as many pictures as fill what is kept
MIB = 1 << 20
LEAKS = (
    0.05  # of what a picture takes: as much growth a picture is called one. A heap grows by steps of up to a few MiB
)
NAMES = {"engine.runtime.core": "core", "engine.worker": "worker", "engine.media.process": "decoder"}
LOW = {"kv_tokens": "8192", "encoder_cache": "16MiB", "encoder_tokens": "4096"}
LOW |= {"media_memory": str(8 * MIB), "media_known_memory": str(8 * MIB)}
LOW |= {"media_processes": "2", "placement": "split", "spare_worker": "false"}


def flags_of(options: dict[str, str]) -> Iterator[str]:
    """Options of the engine as its command line has them."""
    for name, value in options.items():
        flag = name.replace("_", "-")
        yield f"--no-{flag}" if value == "false" else f"--{flag}={value}"


def body(ids: list[int], pixels: np.ndarray) -> dict[str, Any]:
    """A request for one token behind a prompt that shows `pixels`, uint8 [height, width, 3]."""
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG", compress_level=1)
    url = f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"
    sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    return {"input_ids": ids, "image_data": url, "sampling_params": sampling}


class Shower:
    """Shows `server` the pictures of `body_of`, each once."""

    def __init__(self, server: Served, body_of: Callable[[int], dict[str, Any]]) -> None:
        self.server, self.body_of = server, body_of
        self.shown = 0

    def show(self, count: int) -> int:
        """The tokens of the last prompt."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(self._one, range(self.shown, self.shown + count)))
        self.shown += count
        return found[-1]

    def _one(self, index: int) -> int:
        status, said = self.server.ask("/generate", self.body_of(index))
        if status != 200:
            raise SystemExit(f"picture {index} is answered {status}: {said}")
        tokens: int = said["meta_info"]["prompt_tokens"]
        return tokens


def bounds(options: dict[str, str], prompt: int, tokens: int, payload: int, width: int) -> dict[str, int]:
    """By what is kept and where: how many pictures fill it. A prompt has so many tokens, `tokens` of them of the
    picture, which are embeddings of `width` bytes, and `payload` bytes of pixels."""
    front, known, kv = (int(options[name]) for name in ("media_memory", "media_known_memory", "kv_tokens"))
    most_known = known // (payload + assets.BESIDE)
    embeddings = size_of(options["encoder_cache"]) // (tokens * width)
    return {
        f"front: {front} bytes of prepared pictures (--media-memory)": front // (payload + store.BESIDE),
        f"core and worker: {known} bytes of their pixels (--media-known-memory)": most_known,
        f"worker: {options['encoder_cache']} of embeddings (--encoder-cache), of the pictures above": min(
            most_known, embeddings
        ),
        f"core: {repeats.MOST} bytes of pixels that came last from the front": repeats.MOST // payload,
        f"worker and core: {kv} tokens of KV cache (--kv-tokens)": kv // prompt,
    }


def slope(counts: list[int], sizes: list[int]) -> float:
    """Bytes a picture, by least squares."""
    return float(np.polyfit(np.array(counts, float), np.array(sizes, float), 1)[0])


def memory(
    folder: Path, given: dict[str, str], pictures: int, body_of: Callable[[int], dict[str, Any]], about: dict[str, int]
) -> None:
    """Prints the memory of each process over `pictures` different ones, once caches are full. `about` has the `text`
    tokens of a prompt, the `pixels` of a token of a picture, and bytes of an embedding, its `width`."""
    options = LOW | given
    with Served(f"--model={folder}", "--load=dummy", *flags_of(options)) as server:
        shower = Shower(server, body_of)
        prompt = shower.show(AT_ONCE)
        tokens = prompt - about["text"]
        payload = 3 * tokens * about["pixels"]
        full = bounds(options, prompt, tokens, payload, about["width"])
        print(f"\na picture: {tokens} tokens, {payload / 1024:.1f} KiB of pixels\n\n| kept | full after |\n|---|---|")
        for name, count in full.items():
            print(f"| {name} | {count} pictures |")
        shower.show(-(-SETTLES * max(full.values()) // AT_ONCE) * AT_ONCE)
        measure(server, shower, pictures, payload)


def measure(server: Served, shower: Shower, pictures: int, payload: int) -> None:
    """Prints what `pictures` more do to each process."""
    names = {pid: NAMES.get(role, role) for pid, role in server.processes().items() if "tracker" not in role}
    first, every = shower.shown, -(-pictures // SAMPLES // AT_ONCE) * AT_ONCE
    counts: list[int] = []
    sizes: dict[int, list[int]] = {pid: [] for pid in names}
    cuda = torch.cuda.is_available()
    print(f"\n| pictures | {' | '.join(f'{name}, MiB' for name in names.values())} |{' GPU, MiB |' if cuda else ''}")
    print("|---|" + "---|" * (len(names) + cuda))
    while not counts or counts[-1] < first + pictures:
        if counts:
            shower.show(every)
        counts.append(shower.shown)
        for pid, taken in sizes.items():
            taken.append(resident_bytes(pid))
        if (len(counts) - 1) % (SAMPLES // ROWS) == 0:
            device = f" {device_used() / MIB:.0f} |" if cuda else ""
            print(f"| {shower.shown} | {' | '.join(f'{each[-1] / MIB:.1f}' for each in sizes.values())} |{device}")
    if gone := [name for pid, name in names.items() if not sizes[pid][-1]]:
        raise SystemExit(f"these have ended on the way, so their memory says nothing: {', '.join(gone)}")
    half = len(counts) // 2
    print("\n| | KiB a picture | over the last half | |\n|---|---|---|---|")
    for pid, name in names.items():
        whole, last = slope(counts, sizes[pid]), slope(counts[half:], sizes[pid][half:])
        verdict = "flat" if last < LEAKS * payload else "grows"
        print(f"| {name} | {whole / 1024:.3f} | {last / 1024:.3f} | {verdict} |")
    most = LEAKS * payload / 1024
    print(f"\nflat: over the last half less than {100 * LEAKS:g} % of a picture's pixels, {most:.2f} KiB")


def device_used() -> int:
    """Bytes of the first GPU that are taken, by whomever."""
    free, total = torch.cuda.mem_get_info(0)
    return total - free
