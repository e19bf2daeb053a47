"""`python -m engine.router.replica FD`: one of the engines of `engine up`, which ends with its parent.

It gets its Config over the socket, then serves as `engine serve` does. When the socket ends, so does it: a parent that
is killed leaves no engine behind. SIGTERM drains it, as any engine.
"""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

from engine.config import Config
from engine.messages.base import Message
from engine.runtime.channel import BlockingFrames

GRACE_SECONDS = 1.0


class Replica(Message, frozen=True):
    """up → replica: serve this; `devices` are the GPUs that it may use, as CUDA_VISIBLE_DEVICES has them."""

    config: Config
    devices: str | None = None


def main() -> int:
    """The exit code of the engine."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    frames: BlockingFrames[Replica] = BlockingFrames(sock, receives=Replica)
    boot = frames.receive()
    if boot is None:
        return 1
    if boot.devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = boot.devices
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what a newcomer is to try is the router's to say
    threading.Thread(target=end_with_parent, args=(frames,), daemon=True).start()
    from engine.runtime.serve import serve

    return serve(boot.config)


def end_with_parent(frames: "BlockingFrames[Replica]") -> None:
    """Wait until the parent has gone; then end, at once as nobody waits for what is open."""
    with suppress(ConnectionError):
        frames.receive()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
