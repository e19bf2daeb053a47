"""A recording of the page at /, as a GIF: a reply that streams, then the engine at work on a batch of requests.

    python -m bench.http.recording docs/page/recording.gif [--model smollm2-135m] [--seconds 30] [--fps 4] [--speed 1]

It needs Chromium and Pillow. The server is a real one, in processes of its own, and what it says of its speed is so.
With `--speed 4` the recording is four times as fast as that, for a machine that is slow or busy. A frame stays until
the next one, half a second at most. All frames have one palette, and of each only what has changed is kept. The reply
is a third of the recording; the rest shows requests that arrive one after another, and share how their prompts begin.
Left out: a pointer.
"""

import argparse
import io
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import anyio
from PIL import Image

from bench.lib.chromium import Tab, installed, open_tab
from bench.lib.served import Served

WIDTH, HEIGHT = 960, 776
COLOURS = 128
LONGEST = 0.5  # seconds of a frame
QUESTION = "Write a Python function that returns the n-th Fibonacci number, and explain it in a few sentences."
SYSTEM = "You are a careful assistant of a small library. Answer in plain words that a child understands. Be brief. "
TASKS = (
    "Translate the words that follow into French, and give the English after each line: ",
    "Summarise the text below in one line, without any name or number in it: ",
    "Write the title of a book, and then how it begins, for readers who like this: ",
)
TOPICS = ("the sea at night", "a train that is late", "bread", "a garden in autumn", "the first snow", "old maps")
REQUESTS = 40
SERVED = ("--max-running", "16", "--max-model-len", "1024", "--kv-tokens", "5120")
WAIT = "const until = async so => { while (!so()) await new Promise(done => setTimeout(done, 20)); };\n"
READY = """
await until(() => info && $("set").children.length > 5);
given = {numbers: {temperature: 0, max_tokens: 400}};
"""
READ = """
const found = [...$("icicle").children].filter(each => each.clientWidth > 60).at(AT);
found?.onmouseenter();
"""

Frame = tuple[float, bytes]  # when it was taken, in seconds, and a PNG


class Camera:
    """Takes frames of a tab, so many a second at most, while it is `on`."""

    def __init__(self, tab: Tab, fps: float) -> None:
        self.frames: list[Frame] = []
        self.on = True
        self._tab, self._fps = tab, fps

    async def run(self) -> None:
        while True:
            began, on = time.perf_counter(), self.on
            taken = await self._tab.shot()
            if on and self.on:
                self.frames.append((began, taken))
            await anyio.sleep(max(0.02, 1 / self._fps - (time.perf_counter() - began)))


async def ask_many(url: str, pause: float) -> None:
    """Requests that share what they begin with, one each `pause` seconds."""

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        text = SYSTEM + TASKS[number % 3] + TOPICS[number % 6] + f", and what comes {number} times after it."
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 40 + 17 * (number % 7)}
        async with session.post("/v1/chat/completions", json=body) as answer:
            await answer.read()

    async with aiohttp.ClientSession(url) as session, anyio.create_task_group() as group:
        for number in range(REQUESTS):
            group.start_soon(one, session, number)
            await anyio.sleep(pause)


async def play(tab: Tab, url: str, camera: Camera, seconds: float) -> None:
    """What is recorded: a third of it is the chat."""
    async with anyio.create_task_group() as group:
        group.start_soon(camera.run)
        for end in range(4, len(QUESTION) + 4, 4):
            await tab.run(f"$('text').value = {QUESTION[:end]!r};")
            await anyio.sleep(seconds / 500)
        await tab.run("submit();")
        await anyio.sleep(seconds / 3)
        camera.on = False
        await tab.run("stop?.abort(); location.hash = '#live';")
        group.start_soon(ask_many, url, seconds / 2 / REQUESTS)
        await tab.run(WAIT + "await until(() => told && told.counts.running);")  # nothing is to be seen before
        camera.on = True
        await anyio.sleep(seconds / 4)
        for place in range(4):
            await anyio.sleep(seconds / 10)
            await tab.run(READ.replace("AT", str(place)))
        group.cancel_scope.cancel()


async def record(url: str, path: str, seconds: float, fps: float) -> list[Frame]:
    async with open_tab(path) as tab:
        await tab.resize(WIDTH, HEIGHT)
        await tab.open(f"{url}/")
        await tab.run(WAIT + READY)
        camera = Camera(tab, fps)
        await play(tab, url, camera, seconds)
        if tab.errors:
            raise SystemExit(f"the page has errors: {tab.errors}")
        return camera.frames


def assembled(frames: Sequence[Frame], speed: float = 1.0) -> bytes:
    """A GIF of `frames`, so many times as fast. Each stays until the next one, LONGEST at most."""
    images = [Image.open(io.BytesIO(data)).convert("RGB") for _, data in frames]
    times = [at / speed for at, _ in frames]
    stays = [min(LONGEST, later - at) for at, later in zip(times, [*times[1:], times[-1] + LONGEST], strict=True)]
    palette = palette_of(images)
    drawn = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    held = io.BytesIO()
    durations = [round(1000 * stay) for stay in stays]
    drawn[0].save(held, "GIF", save_all=True, append_images=drawn[1:], duration=durations, loop=0, disposal=1)
    return held.getvalue()


def palette_of(images: Sequence[Image.Image]) -> Image.Image:
    """The COLOURS that most pixels of these have, exactly: a page has few, and shades of its letters."""
    counts: Counter[Any] = Counter()
    for image in images[:: max(1, len(images) // 12)]:
        counts.update({colour: count for count, colour in image.getcolors(WIDTH * HEIGHT) or []})
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for colour, _ in counts.most_common(COLOURS) for value in colour])
    return palette


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("to", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--fps", type=float, default=4.0)
    parser.add_argument("--speed", type=float, default=1.0)
    options = parser.parse_args()
    if (path := installed()) is None:
        raise SystemExit("no Chromium is installed: apt-get install chromium")
    with Served("--model", options.model, *SERVED) as server:
        frames = anyio.run(record, server.url, path, options.seconds * options.speed, options.fps / options.speed)
    data = assembled(frames, options.speed)
    options.to.write_bytes(data)
    print(f"{len(frames)} frames in {frames[-1][0] - frames[0][0]:.1f} s, {len(data)} bytes")


if __name__ == "__main__":
    main()
