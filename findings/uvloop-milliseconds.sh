#!/bin/sh
# uvloop rounds a delay to the nearest millisecond and counts it on a clock that is cut to milliseconds; asyncio is never
# early. So a sleep of half a millisecond or less does not sleep at all, and a loop that looks at something every 0.4 ms takes
# a whole processor. asyncio.timeout(0.0004) is over before another task has had a turn. A sleep of 1.4 ms ends after 1 ms, or
# at once where the clock is about to tick. Two timers due 0.8 ms apart run in the order in which they were set. asyncio rounds
# up to what the selector can wait, a millisecond, for all of these. A server that waits 0.4 ms to gather a batch gathers
# one with asyncio and none with uvloop, and a loop that sleeps until a time spins for its last half millisecond.
#
# Seen: uvloop 0.23.0, Python 3.11, Linux, 2026-11-30.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check uvloop==0.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import statistics
import time

import uvloop

TURNS = 200


async def sleeps(seconds):
    """The shortest of many sleeps, and the median."""
    took = []
    for _ in range(TURNS):
        began = time.perf_counter()
        await asyncio.sleep(seconds)
        took.append(time.perf_counter() - began)
    return min(took), statistics.median(took)


async def order():
    """Of two timers, the later one is set first."""
    loop, ran = asyncio.get_running_loop(), []
    loop.call_later(0.0034, ran.append, "due after 3.4 ms")
    loop.call_later(0.0026, ran.append, "due after 2.6 ms")
    await asyncio.sleep(0.05)
    return ran


async def turns_in_timeout(seconds):
    turns = 0
    try:
        async with asyncio.timeout(seconds):
            while turns < 3:
                await asyncio.sleep(0)
                turns += 1
    except TimeoutError:
        pass
    return turns


async def main():
    found = {seconds: await sleeps(seconds) for seconds in (0.0001, 0.0004, 0.0005, 0.0006, 0.0014, 0.0024)}
    for seconds, (least, median) in found.items():
        print(f"  sleep of {seconds * 1000:g} ms: {median * 1000:.3f} ms, at the shortest {least * 1000:.3f} ms")
    ran, turns = await order(), await turns_in_timeout(0.0004)
    print(f"  timers ran: {', then '.join(ran)}; turns of the loop within a timeout of 0.4 ms, of 3: {turns}")
    return found, ran, turns


print("asyncio:")
found, ran, turns = asyncio.run(main())
assert all(least > seconds * 0.99 for seconds, (least, _) in found.items())
assert ran == ["due after 2.6 ms", "due after 3.4 ms"]
print("uvloop:")
found, ran, turns = uvloop.run(main())
assert all(found[seconds][0] < 0.0001 for seconds in (0.0001, 0.0004, 0.0005))
assert found[0.0006][1] > 0.0005 and found[0.0014][0] < 0.0014 and found[0.0024][0] < 0.0024
assert ran == ["due after 3.4 ms", "due after 2.6 ms"] and turns == 0
PYTHON
