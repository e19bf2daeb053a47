"""256 programs at once in SGLang's language and in ours, on one server of the fake model: what a language itself costs.

    pip download sglang==0.5.23 --no-deps -d /tmp/sglang && unzip -q /tmp/sglang/*.whl -d /tmp/sglang
    python -m bench.language.peers /tmp/sglang/sglang [--programs 256] [--turns 5] [--json FILE]

Each program makes three calls one after another, forks into two, and selects: the same source in both languages. `ours,
async` is ours as a coroutine function. The model is `echo`, which computes next to nothing. Each way is a process of
its own, which runs all programs once to warm up and then says its CPU time and its wall time; the ways take turns, and
the texts of all programs must be equal. Left out: the server's time, which bench/language/workloads.py has.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine.lang
from bench.language.semantics import sglang
from bench.lib.figures import shown
from bench.lib.served import Served
from engine.lang import Server, State

WAYS = ("sglang", "ours", "ours, async")
CALLS = 3
GOAL = 1.3


def plain(language: Any) -> Callable[..., Any]:
    """The program, in either language."""

    def program(s: Any, text: str) -> None:
        s += text
        for number in range(CALLS):
            s += language.gen(f"part {number}", max_tokens=8) + "."
        forks = s.fork(2)
        forks += lambda index: f" {index}:"
        forks += language.gen("branch", max_tokens=4)
        forks.join()
        s += " ".join(s["branch"]) + language.select("best", ["abc", "xyz"])

    return program


async def coroutine(s: State, text: str) -> None:
    """The same with await."""
    s += text
    for number in range(CALLS):
        s += engine.lang.gen(f"part {number}", max_tokens=8) + "."
    forks = s.fork(2)
    forks += lambda index: f" {index}:"
    forks += engine.lang.gen("branch", max_tokens=4)
    forks.join()
    s += " ".join(await s.get("branch")) + engine.lang.select("best", ["abc", "xyz"])


def runner(way: str, url: str, folder: str, programs: int) -> Callable[[], list[str]]:
    """What runs all programs and tells their texts."""
    arguments = [{"text": f"Program {number} says "} for number in range(programs)]
    if way == "sglang":
        from importlib import import_module

        language = sglang(folder)
        endpoint = import_module("sglang.lang.backend.runtime_endpoint").RuntimeEndpoint(
            url, chat_template_name="chatml"
        )
        program = language.function(plain(language))
        return lambda: [
            s.text() for s in program.run_batch(arguments, backend=endpoint, num_threads=programs, temperature=0)
        ]
    server = Server(url).__enter__()
    ours = engine.lang.function(coroutine if way == "ours, async" else plain(engine.lang))
    return lambda: [s.text() for s in ours.run_batch(arguments, backend=server, concurrency=programs, temperature=0)]


def side(way: str, url: str, folder: str, programs: int) -> None:
    """In a process of its own: warm up, then time all programs."""
    run = runner(way, url, folder, programs)
    run()
    began, spent = time.perf_counter(), time.process_time()
    texts = run()
    seconds, cpu = time.perf_counter() - began, time.process_time() - spent
    print(json.dumps({"seconds": seconds, "cpu": cpu, "texts": texts}), flush=True)
    if way != "sglang":
        sys.stdout.flush()


def measured(way: str, url: str, given: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.language.peers", given.folder, "--side", way, "--url", url]
    command += ["--programs", str(given.programs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(url: str, given: Any) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for turn in range(given.turns):
        order = WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]
        for way in order:
            found[way].append(measured(way, url, given))
        if len({tuple(found[way][-1].pop("texts")) for way in WAYS}) != 1:
            raise SystemExit("the ways make different texts")
    print(f"{given.programs} programs, {given.turns} turns; medians (least - greatest)")
    print(f"{'':12} {'wall s':>22} {'client cpu s':>22} {'over wall':>10} {'over cpu':>10}")
    for way in WAYS:
        wall, cpu = ([each[key] for each in found[way]] for key in ("seconds", "cpu"))
        ratios = [
            statistics.median(theirs[key] / own[key] for theirs, own in zip(found["sglang"], found[way], strict=True))
            for key in ("seconds", "cpu")
        ]
        print(f"{way:12} {shown(wall, 2):>22} {shown(cpu, 2):>22} {ratios[0]:10.2f} {ratios[1]:10.2f}")
    print(f"goal: {GOAL} over SGLang in both")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="SGLang's package")
    parser.add_argument("--programs", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--url", help="a server that runs")
    parser.add_argument("--side", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures of all turns there too")
    given = parser.parse_args()
    if given.side:
        side(given.side, given.url, given.folder, given.programs)
        return
    if given.url:
        found = compare(given.url, given)
    else:
        with Served("--model=echo") as server:
            found = compare(server.url, given)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
