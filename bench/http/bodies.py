"""How long /health takes beside one large body, hostile or honest, and how much CPU time the server spends on it.

    python -m bench.http.bodies [--model smollm2-135m] [--repeat 3] [--only WORDS] [--json FILE] [--held]

A process of its own asks /health every 5 ms; meanwhile the body is sent `--repeat` times, one after the other. CPU
seconds are those of the process that serves HTTP, a body; with `--placement split`, which is what this measures, the
scheduler is in another. On a busy machine the times say as much of the machine; the CPU seconds do not. With `--held`
HTTP is served in this process, and what is told of each body is the longest time that the event loop spent on one
callback, in CPU time: /health waits that long, and on an idle machine hardly longer.
"""

import argparse
import asyncio
import http.client
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from bench.lib.processes import cpu_seconds
from engine.client.bench.process import free_port, serve_command
from engine.config import resolve
from engine.http.app import serve
from engine.runtime.launch import open_front

PAUSE = 0.005  # seconds between two probes
MIB = 1 << 20
Body = tuple[str, str, bytes]  # what it is, its route, and itself


def bodies() -> Iterator[Body]:
    """Each is made when it is sent: together they are some hundred MiB."""

    def made(name: str, path: str, body: Any) -> Body:
        return name, path, body if isinstance(body, bytes) else json.dumps(body).encode()

    user = {"role": "user", "content": "a"}
    chat, complete = "/v1/chat/completions", "/v1/completions"
    short = {"max_tokens": 1}

    def said(text: bytes) -> bytes:
        return b'{"max_tokens":1,"messages":[{"role":"user","content":"' + text + b'"}]}'

    # Hostile: far over a limit.
    yield made("200,000 prompts", "/generate", {"input_ids": [[1]] * 200_000})
    yield made("20,000 tools", chat, {"messages": [user], "tools": [tool(index, 0) for index in range(20_000)]})
    yield made("300,000 messages", chat, {"messages": [user] * 300_000})
    yield made("10 million empty lists", chat, b'{"messages":[],"metadata":[' + b",".join([b"[]"] * 10_000_000) + b"]}")
    yield made("a field's name of 30 MiB", chat, b'{"' + b"x" * (30 * MIB) + b'":1}')
    yield made("1,000 prompts, each with expressions", "/generate", {"text": ["a"] * 1000, "sampling_params": slow()})
    yield made("30 MiB of text", chat, said(b"All work and no play. " * (30 * MIB // 22)))
    yield made("30 MiB of escapes", chat, said(b"\\n" * (15 * MIB)))
    yield made("30 MiB of text, counted", "/tokenize", {"prompt": "x1;{ " * (6 * MIB)})
    # At a limit: all of this is taken, or refused for its tokens.
    yield made("10,000 messages", chat, short | {"messages": [user] * 10_000})
    yield made("26,000 parts", chat, short | {"messages": [{"role": "user", "content": [part("")] * 26_000}]})
    yield made("1,024 tools", chat, short | {"messages": [user], "tools": [tool(index, 12) for index in range(1024)]})
    yield made("a million token ids", complete, short | {"prompt": [1000] * 1_000_000})
    yield made("1,024 prompts", complete, short | {"prompt": ["a"] * 1024})
    yield made("16,000 parts in Anthropic's shape", "/v1/messages/count_tokens", blocks())
    # Honest.
    yield made("a text of 100,000 characters", chat, said(b"All work and no play. " * 4500))
    yield made("an agent's 400 messages and 60 tools", chat, short | agent())


def tool(index: int, properties: int) -> dict[str, Any]:
    described = {f"property_{each}": {"type": "string", "description": "what it is"} for each in range(properties)}
    parameters = {"type": "object", "properties": described}
    return {"type": "function", "function": {"name": f"tool_{index}", "parameters": parameters}}


def part(text: str = "a") -> dict[str, Any]:
    return {"type": "text", "text": text}


def slow() -> list[dict[str, Any]]:
    return [{"max_new_tokens": 1, "stop_regex": f"(a|b){{{each}}}" + "(a|b)" * 190} for each in range(2, 1002)]


def blocks() -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part()] * 2} for _ in range(8_000)]}


def agent() -> dict[str, Any]:
    turns = []
    for index in range(100):
        call = {"id": f"call_{index}", "type": "function", "function": {"name": "tool_1", "arguments": '{"a": "b"}'}}
        turns += [
            {"role": "user", "content": "Now look at the next file, and say what is wrong with it. " * 5},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"call_{index}", "content": "    if this < that: return None\n" * 100},
            {"role": "assistant", "content": "There is nothing wrong with it. " * 10},
        ]
    return {"messages": turns, "tools": [tool(index, 8) for index in range(60)]}


def probe(port: int, pipe: Connection) -> None:
    """Ask /health until told to end; then say how many seconds each answer took."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    seconds = []
    while not pipe.poll():
        began = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        seconds.append(time.perf_counter() - began)
        time.sleep(PAUSE)
    pipe.send(seconds)


def measured(port: int, pid: int, path: str, body: bytes, repeat: int) -> tuple[int, list[float], float, float]:
    """The status, the probe's seconds, the CPU seconds and the seconds of a body."""
    ours, theirs = multiprocessing.Pipe()
    prober = multiprocessing.Process(target=probe, args=(port, theirs))
    prober.start()
    time.sleep(0.5)
    spent, began = cpu_seconds(pid), time.perf_counter()
    for _ in range(repeat):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        status = (answer := connection.getresponse()).status
        answer.read()
        connection.close()
    took = time.perf_counter() - began
    spent = cpu_seconds(pid) - spent
    ours.send("end")
    seconds = ours.recv()
    prober.join()
    return status, seconds, spent / repeat, took / repeat


@contextmanager
def server(options: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """The port and the process of a server that is ready."""
    port = free_port()
    process = subprocess.Popen(serve_command(resolve(options), port), stdout=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            if process.poll() is not None:
                sys.exit("the server has ended")
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(60)


async def held(model: str, only: str) -> None:
    """Print how long each body holds the event loop at once. That is asyncio's own, whose callbacks can be timed."""
    spent: list[float] = []
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        spent.append(1e3 * (time.thread_time() - began))

    def post(url: str, path: str, body: bytes) -> int:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
        connection.request("POST", path, body)
        (answer := connection.getresponse()).read()
        return answer.status

    asyncio.Handle._run = timed  # type: ignore[method-assign, assignment]
    print("| body | MiB | status | longest callback, CPU ms | all of them |")
    print("|---|---|---|---|---|")
    config = resolve({"model": model, "placement": "split", "log_level": "error", "port": 0})
    async with open_front(config) as front, anyio.create_task_group() as group:
        await front.ready()
        url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        group.start_soon(partial(serve, front, config.server, started=url.set_result))
        root = await url
        for name, path, body in bodies():
            if only in name:
                await anyio.to_thread.run_sync(post, root, path, body)  # which starts a text process
                spent.clear()
                status = await anyio.to_thread.run_sync(post, root, path, body)
                shown = f"{max(spent):.1f} | {sum(spent):.1f}"
                print(f"| {name} | {len(body) / MIB:.2f} | {status} | {shown} |", flush=True)
        group.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default="", help="bodies whose name has these words")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--held", action="store_true")
    options = parser.parse_args()
    if options.held:
        return anyio.run(held, options.model, options.only)
    rows = []
    print("| body | MiB | status | /health p50 | p99 | longest, ms | s a body | CPU s of HTTP's process |")
    print("|---|---|---|---|---|---|---|---|")
    with server({"model": options.model, "placement": "split", "log_level": "error"}) as (port, pid):
        for name, path, body in bodies():
            if options.only not in name:
                continue
            status, seconds, spent, took = measured(port, pid, path, body, options.repeat)
            probes = [1e3 * one for one in sorted(seconds)]
            middle, high, longest = statistics.median(probes), probes[int(0.99 * len(probes))], probes[-1]
            shown = f"{middle:.1f} | {high:.1f} | {longest:.1f} | {took:.2f} | {spent:.3f}"
            print(f"| {name} | {len(body) / MIB:.2f} | {status} | {shown} |", flush=True)
            rows.append({"body": name, "status": status, "health_ms": probes, "seconds": took, "cpu_seconds": spent})
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
