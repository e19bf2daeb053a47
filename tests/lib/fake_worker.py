"""A rank without a model: `python fake_worker.py SCRIPT FD` is a worker process that does as SCRIPT, JSON, says.

SCRIPT maps a rank to what it does differently: `pages` (that it has room for), `ready` (fields of its WorkerReady),
`late` (seconds until it starts), and what happens once it is ready: `die_at`, `fail_at` and `hang_at` name the step of
a StepPlan. It sends the Beats whose fields `beats` lists. With `refuses`, questions to it are answered with that cause.
A step is answered with the tokens of FakeDevice, where attention runs in copies with those of the rank's own copy. Each
rank that is not the first writes what it allocates into a file `rank` in `folder`."""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from engine.messages import ToWorker
from engine.messages.assets import Load, Loaded
from engine.messages.control import Agreed, Answer, Ask, Beat, Boot, Fatal, Ping, Pong, Preload, Proposed, WorkerReady
from engine.messages.step import StepDone, StepPlan
from engine.parallel.mesh import Mesh
from engine.runtime.channel import BlockingFrames
from engine.testing.fake import FakeDevice
from engine.worker.steps.copies import Copy

READY = WorkerReady(
    pages=0,
    page_size=4,
    slots=4,
    max_step_tokens=64,
    max_model_len=64,
    vocab_size=257,
    kv_bytes_per_token=2,
    device="none",
    attention="none",
    phases={"import": 0.0},
)


def step(frames: BlockingFrames[ToWorker], boot: Boot, odd: dict[str, Any], device: FakeDevice, plan: StepPlan) -> None:
    if odd.get("die_at") == plan.step:
        time.sleep(odd.get("die_after", 0))
        os._exit(7)
    if odd.get("hang_at") == plan.step:
        time.sleep(odd.get("hang_seconds", 600))
    if odd.get("fail_at") == plan.step:
        time.sleep(odd.get("fail_after", 0))
        frames.send(Fatal(f"worker {boot.rank}", odd["says"]))
        sys.exit(1)
    parallel = boot.config.parallel
    if parallel.dp_attention == 1:
        done = device.step(plan)
    else:
        mesh = Mesh(boot.rank, tp=parallel.tp, dp=parallel.dp_attention)
        own, among = Copy(mesh.coordinates["dp"], mesh.dp, READY.slots // mesh.dp).own(plan)
        done = StepDone(plan.step, b"", b"", 0.0) if among.idle else among.numbered(device.step(own))
    if boot.rank in parallel.reporters:
        frames.send(replace(done, seconds=float(boot.rank)))


def main(script: dict[str, Any], descriptor: int) -> None:
    frames: BlockingFrames[ToWorker] = BlockingFrames(socket.socket(fileno=descriptor), receives=ToWorker)
    boot = frames.receive()
    if isinstance(boot, Preload):
        boot = frames.receive()
    assert isinstance(boot, Boot)
    odd = script.get(str(boot.rank), {})
    time.sleep(odd.get("late", 0))
    if "starts_not" in odd:
        frames.send(Fatal(f"worker {boot.rank}", odd["starts_not"]))
        sys.exit(1)
    frames.send(Proposed(odd.get("pages", 100)))
    agreed = frames.receive()
    assert isinstance(agreed, Agreed)
    if "folder" in script:
        Path(script["folder"], str(boot.rank)).write_text(f"{agreed.pages} {boot.world} {boot.rendezvous}")
    frames.send(replace(READY, pages=agreed.pages, **odd.get("ready", {})))
    for fields in odd.get("beats", ()):
        frames.send(Beat(*fields))
    device = FakeDevice()
    while (message := frames.receive()) is not None:
        match message:
            case StepPlan():
                step(frames, boot, odd, device, message)
            case Ask():
                frames.send(Answer(message.number, f"rank {boot.rank}".encode(), odd.get("refuses", "")))
            case Load():
                frames.send(Loaded(message.kind, message.number, odd.get("refuses", "")))
            case Ping():
                frames.send(Pong())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
