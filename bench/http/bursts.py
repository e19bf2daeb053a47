"""A burst of prompts at the tokenizer: when each is ready, and how long the event loop's others wait meanwhile.

    python -m bench.http.bursts [--model smollm2-135m] [--prompts 1,32,256] [--words 128,1000] [--turns 7]

The tokenizer actor of this checkout gets chat prompts of so many words at once, in this process, with its neighbours
left out. A task beside it wants its turn each millisecond, as the streams that run would. Medians of the turns, ms:
until the first and the last prompt is ready; the CPU time of the event loop's thread, which streams have to share; the
longest that the other task waited for its turn. A checkout without this file may run it too: copy it there.
"""

import argparse
import random
import statistics
import time
from typing import Any

import anyio

from engine.actors.tokenizer import Admission, TokenizerActor
from engine.client.bench.traffic import text as made_text
from engine.config import resolve
from engine.conversation.parts import read_messages
from engine.messages.control import WorkerReady
from engine.messages.request import Admit, Generate
from engine.params.sampling import SamplingParams
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.runtime.channel import open_channel
from engine.text.fallback import text_of
from engine.text.jobs import LARGE, size_of

PATIENCE = 60.0
PAUSE = 0.001


class NoPool:
    def is_large(self, job: Any) -> bool:
        return size_of(job) > LARGE

    async def ask(self, job: Any) -> Any:
        raise AssertionError("a prompt is too long for this measurement")


async def burst(admission: Admission, requests: list[Generate]) -> tuple[float, float, float, float]:
    """ms until the first and the last is admitted, of the thread's CPU time, and of the longest wait of another."""
    jobs, inbox = open_channel()
    opened, _ = open_channel()
    to_scheduler, scheduler = open_channel()
    actor = TokenizerActor(admission, inbox, opened, to_scheduler, NoPool())
    waits = [0.0]
    done = anyio.Event()

    async def neighbour() -> None:
        while not done.is_set():
            asked = time.perf_counter()
            await anyio.sleep(PAUSE)
            waits.append(time.perf_counter() - asked - PAUSE)

    async with anyio.create_task_group() as group:
        jobs.send_nowait(WorkerReady(1, 1, 1, 1, 1 << 15, admission.text.vocab_size, 1, "", "", {}))
        group.start_soon(actor.run)
        await anyio.sleep(0.01)
        began, cpu = time.perf_counter(), time.thread_time()
        for request in requests:
            jobs.send_nowait(request)
        group.start_soon(neighbour)
        times: list[float] = []
        with anyio.fail_after(PATIENCE):
            while len(times) < len(requests):
                assert isinstance(await scheduler.receive(), Admit)
                times.append(time.perf_counter() - began)
        cpu = time.thread_time() - cpu
        done.set()
        group.cancel_scope.cancel()
    return times[0] * 1e3, times[-1] * 1e3, cpu * 1e3, max(waits) * 1e3


async def run(given: Any) -> None:
    plugins = Plugins.load(())
    config = resolve({"model": given.model})
    admission = Admission(text_of(plugins, open_checkpoint(plugins, given.model), config, None))
    rng = random.Random(0)
    print(f"{'prompts':>7} {'words':>6} {'first':>8} {'last':>8} {'loop CPU':>8} {'longest wait':>12}   ms")
    for words in map(int, given.words.split(",")):
        for count in map(int, given.prompts.split(",")):
            found = []
            for _ in range(given.turns + 1):
                texts = [made_text(words, rng) for _ in range(count)]
                chats = [read_messages([{"role": "user", "content": text}]) for text in texts]
                params = SamplingParams(max_tokens=8)
                found.append(
                    await burst(admission, [Generate(str(i), params, messages=m) for i, m in enumerate(chats)])
                )
            middle = [statistics.median(values) for values in zip(*found[1:], strict=True)]
            print(
                f"{count:7} {words:6} {middle[0]:8.2f} {middle[1]:8.1f} {middle[2]:8.1f} {middle[3]:12.2f}", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", default="1,32,256")
    parser.add_argument("--words", default="128,1000")
    parser.add_argument("--turns", type=int, default=7)
    anyio.run(run, parser.parse_args(), backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main()
