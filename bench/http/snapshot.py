"""CPU time of one snapshot of the live view, by part, without HTTP: what `bench.http.viewer` measures as a whole.

    python -m bench.http.snapshot [--rows 256] [--times 200] [--pages 32768] [--host-pages 0]

A scheduler has so many requests that share a system prompt of 512 tokens and generate. Between two snapshots all take a
step. Figures are medians, in CPU microseconds of the process, by part: the scheduler's own, made and packed; what a
front makes of it; and the notes of one step. Left out: sending them.
"""

import argparse
import statistics
import time
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec

from engine.actors.looking import Looking
from engine.cache.tiers import TierOptions
from engine.http.page.live import LiveEvents
from engine.messages.looking import Snapshot
from engine.messages.request import Admit
from engine.params.sampling import Sampling
from engine.plugin.registry import Plugins
from engine.runtime.board import Counter
from engine.sched import Scheduler
from engine.sched.policies import make_policy
from engine.testing.fake import FakeDevice

PAGE = 16
SHARED, OWN = 512, 64  # tokens of a prompt


def scheduler_of(rows: int, pages: int, host: int) -> Scheduler:
    """It has `rows` requests, and nothing of them is computed."""
    policy = make_policy(Plugins.load(()), "fcfs")
    tiers = TierOptions(host) if host else None
    made = Scheduler(
        pages,
        PAGE,
        rows,
        max_model_len=8192,
        max_step_tokens=8192,
        policy=policy,
        prefix_cache=True,
        max_waiting=rows,
        tiers=tiers,
    )
    for row in range(rows):
        ids = array("i", [*range(SHARED), *range(1000 * row, 1000 * row + OWN)])
        made.admit(Admit(str(row), ids.tobytes(), Sampling(0.0, 0, 1.0, 0.0, 0), (), 8192 - len(ids)))
    return made


class Costs:
    """CPU seconds by part."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}

    def of(self, part: str, act: Callable[..., Any], *given: Any) -> Any:
        began = time.process_time()
        value = act(*given)
        self.parts.setdefault(part, []).append(time.process_time() - began)
        return value


def measure(rows: int, times: int, pages: int, host: int) -> tuple[Costs, int]:
    """The costs of so many snapshots, and the bytes of the last event."""
    scheduler, device, looking, costs = scheduler_of(rows, pages, host), FakeDevice(), Looking(), Costs()
    board = SimpleNamespace(total=lambda counter: int(counter is Counter.VIEWERS))
    health = SimpleNamespace(status="ready", cause="")
    front = SimpleNamespace(health=lambda: health, channels=lambda: [], board=board)
    events = LiveEvents(front)  # type: ignore[arg-type]
    data = b""
    looking.last()

    def look() -> bytes:
        return looking.look(scheduler, "ready", "", paused=False, channels=(), assets={})

    def event(packed: bytes) -> bytes:
        return events.event(msgspec.msgpack.decode(packed, type=Snapshot))

    for turn in range(times + 50):
        if (plan := scheduler.plan()) is None:
            raise SystemExit("the scheduler has nothing to do")
        costs.of("note", looking.planned, plan)
        done = device.step(plan)
        costs.of("note of its end", looking.done, done, time.monotonic())
        scheduler.commit_each(done)
        if turn >= 50:
            looking.last()
            packed = costs.of("snapshot", look)
            data = costs.of("event", event, packed)
    return costs, len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--pages", type=int, default=32768)
    parser.add_argument("--host-pages", type=int, default=0)
    options = parser.parse_args()
    costs, size = measure(options.rows, options.times, options.pages, options.host_pages)
    for part, seconds in costs.parts.items():
        low, middle, high = (1e6 * each for each in statistics.quantiles(seconds, n=4))
        print(f"{part:16} {middle:8.1f} us ({low:.1f} - {high:.1f})")
    print(f"an event has {size} bytes")


if __name__ == "__main__":
    main()
