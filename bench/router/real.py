"""Four engines behind a router, 1,000 requests; meanwhile one engine is killed, one hangs, one is drained and added.

    python -m bench.router.real [--requests 1000] [--clients 16] [--policy cache_aware] [--model smollm2-135m]

What happens, by the share of requests that have ended: 15% SIGKILL of engine 0; another engine starts and is added;
35% SIGSTOP of engine 1; 55% SIGCONT; 65% engine 2 is drained (DELETE /workers); 85% it is added again.

A request belongs to one of 40 conversations of several turns, whose system prompts are eight; half are streamed. One is
*lost* if its client had an error before the first byte of an answer, *broken* if the stream ended early. Exit code 1 if
one is lost. The hit rate is that of the usage in the answers, of all engines together.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import aiohttp
import anyio

from bench.http.cpu import HERE
from engine.client.bench.process import free_port

CONVERSATIONS, SYSTEMS, SYSTEM_WORDS, TURN_WORDS = 40, 8, 120, 12
TOKENS = 6  # of a reply
WORDS = ("river", "stone", "lamp", "window", "garden", "paper", "silver", "winter", "market", "bridge")


class Traffic:
    """Requests, each the next turn of a conversation; and what became of them."""

    def __init__(self, count: int, seed: int) -> None:
        draw = random.Random(seed)
        systems = [" ".join(draw.choices(WORDS, k=SYSTEM_WORDS)) for _ in range(SYSTEMS)]
        self._turns = [[{"role": "system", "content": systems[each % SYSTEMS]}] for each in range(CONVERSATIONS)]
        self._draw = draw
        self.left = count
        self.done = self.whole = self.lost = self.broken = 0
        self.prompt_tokens = self.cached_tokens = 0
        self.first: list[float] = []
        self.said: list[str] = []

    def next(self) -> dict[str, Any]:
        """The body of the next request."""
        messages = self._draw.choice(self._turns)
        if len(messages) > 12:
            del messages[1:]
        messages.append({"role": "user", "content": " ".join(self._draw.choices(WORDS, k=TURN_WORDS))})
        body = {"messages": [*messages], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        messages.append({"role": "assistant", "content": " ".join(self._draw.choices(WORDS, k=TOKENS))})
        return body | ({"stream": True, "stream_options": {"include_usage": True}} if self._draw.random() < 0.5 else {})

    def count(self, usage: dict[str, Any] | None) -> None:
        self.whole += 1
        if usage:
            self.prompt_tokens += usage["prompt_tokens"]
            self.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


async def client(session: aiohttp.ClientSession, url: str, traffic: Traffic) -> None:
    """Send requests, one after another, until none is left."""
    while traffic.left:
        traffic.left -= 1
        body, began, data = traffic.next(), time.perf_counter(), bytearray()
        try:
            async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                async for piece in answer.content.iter_any():
                    if not data:
                        traffic.first.append(time.perf_counter() - began)
                    data += piece
                if answer.status != 200:
                    traffic.lost += 1
                    traffic.said.append(f"{answer.status} {data[:200].decode(errors='replace')}")
                elif "stream" not in body:
                    traffic.count(json.loads(data)["usage"])
                elif data.endswith(b"data: [DONE]\n\n"):
                    traffic.count(json.loads(data.split(b"data: ")[-2])["usage"])
                else:
                    traffic.broken += 1
        except (aiohttp.ClientError, OSError) as error:
            if data:
                traffic.broken += 1
            else:
                traffic.lost += 1
                traffic.said.append(repr(error))
        traffic.done += 1


class Engines:
    """Processes of `engine serve`, by number."""

    def __init__(self, stack: ExitStack, model: str) -> None:
        self._stack = stack
        self._model = model
        self.processes: list[subprocess.Popen[bytes]] = []
        self.urls: list[str] = []

    def start(self) -> str:
        port = free_port()
        words = ["serve", "--model", self._model, "--port", str(port), "--threads", "1", "--kv-tokens", "16384"]
        words += ["--no-spare-worker", "--max-model-len", "2048", "--log-level", "warning"]
        with tempfile.TemporaryFile() as log:
            self.processes.append(run(self._stack, words, log))
        self.urls.append(f"http://127.0.0.1:{port}")
        return self.urls[-1]


def run(stack: ExitStack, words: list[str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "engine.cli", *words]
    process = subprocess.Popen(command, cwd=HERE, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    stack.callback(process.wait, 60)
    stack.callback(process.terminate)
    return process


async def until_able(session: aiohttp.ClientSession, url: str, count: int) -> None:
    """Until so many workers take requests."""
    with anyio.fail_after(240):
        while True:
            try:
                async with session.get(f"{url}/workers") as answer:
                    if sum(each["may_take"] for each in (await answer.json())["workers"]) >= count:
                        return
            except aiohttp.ClientError:
                pass
            await anyio.sleep(0.2)


async def events(session: aiohttp.ClientSession, url: str, engines: Engines, traffic: Traffic, count: int) -> None:
    """Do to the engines what the module says."""

    async def reach(share: float, what: str) -> None:
        while traffic.done < share * count:
            await anyio.sleep(0.02)
        print(f"{time.strftime('%H:%M:%S')} {traffic.done:5d} done: {what}", flush=True)

    await reach(0.15, "SIGKILL of engine 0; engine 4 is started")
    os.kill(engines.processes[0].pid, signal.SIGKILL)
    fifth = engines.start()
    async with session.post(f"{url}/workers", json={"url": fifth}) as answer:
        assert answer.status == 200, await answer.text()
    await reach(0.35, "SIGSTOP of engine 1")
    os.kill(engines.processes[1].pid, signal.SIGSTOP)
    await reach(0.55, "SIGCONT of engine 1")
    os.kill(engines.processes[1].pid, signal.SIGCONT)
    await reach(0.65, "engine 2 drains")
    async with session.delete(f"{url}/workers", params={"url": engines.urls[2]}) as answer:
        print(f"{time.strftime('%H:%M:%S')} {traffic.done:5d} done: {await answer.text()}", flush=True)
    await reach(0.85, "engine 2 is added again")
    async with session.post(f"{url}/workers", json={"url": engines.urls[2]}) as answer:
        assert answer.status == 200, await answer.text()


async def measure(url: str, engines: Engines, options: argparse.Namespace) -> Traffic:
    traffic = Traffic(options.requests, options.seed)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await until_able(session, url, 4)
        began = time.perf_counter()
        async with anyio.create_task_group() as group:
            if not options.calm:
                group.start_soon(events, session, url, engines, traffic, options.requests)
            for _ in range(options.clients):
                group.start_soon(client, session, url, traffic)
        seconds = time.perf_counter() - began
        async with session.get(f"{url}/v1/loads") as answer:
            loads = await answer.json()
    for load in loads["loads"]:
        shown = ("url", "state", "sent", "answered", "failed", "moved", "hit_rate")
        print("  ".join(f"{name} {load[name]}" for name in shown))
    first = sorted(traffic.first)
    print(
        f"{options.policy}: {traffic.done} requests in {seconds:.0f} s: {traffic.whole} whole, {traffic.broken} broken "
        f"streams, {traffic.lost} lost; hit rate {traffic.cached_tokens / max(traffic.prompt_tokens, 1):.3f}; "
        f"first byte p50 {statistics.median(first):.2f} s, p99 {first[int(0.99 * len(first))]:.2f} s"
    )
    return traffic


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--policy", default="cache_aware")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calm", action="store_true", help="leave the engines alone")
    parser.add_argument("--log", type=Path, help="file for the router's log")
    options = parser.parse_args()
    with ExitStack() as stack:
        engines = Engines(stack, options.model)
        urls = [engines.start() for _ in range(4)]
        port = free_port()
        words = ["router", "--workers", ",".join(urls), "--port", str(port), "--policy", options.policy]
        with open(options.log or os.devnull, "wb") as log:
            run(stack, [*words, "--log-level", "info"], log)
        traffic = anyio.run(measure, f"http://127.0.0.1:{port}", engines, options)
    for said in traffic.said[:10]:
        print(f"lost: {said}")
    return 1 if traffic.lost else 0


if __name__ == "__main__":
    sys.exit(main())
