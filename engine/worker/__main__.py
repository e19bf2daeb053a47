"""`python -m engine.worker FD`: a device process on the inherited, connected stream socket FD.

The first frame is Boot; the answer is WorkerReady, or Fatal and exit status 1. Where there are several ranks, Proposed
and Agreed come between. A spare worker gets Preload before its Boot, imports, answers Pong and waits. Ends with status
0 when the peer closes. Ctrl-C is the parent's business, which drains first.
"""

import gc
import logging
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress

import msgspec

from engine.errors import EngineError, PluginError
from engine.logs import set_up_logging
from engine.messages import ToWorker
from engine.messages.control import Agreed, Boot, Fatal, Pong, Preload, Proposed
from engine.options.parallel import ParallelOptions
from engine.runtime.channel import BlockingFrames
from engine.worker.sleeping import sleep_precisely
from engine.worker.spare import expendable, import_all, import_worker, imported_since
from engine.worker.watchdog import watch

# Turns that an idle OpenMP thread spins before it sleeps: about half a millisecond, which bridges the gap between
# two operations. libgomp's own 300000 burn many milliseconds, on a core that HTTP and the scheduler may be waiting
# for: measured on two cores, one busy process beside a decode step made it 17 times slower, with this 5 times.
SPIN_COUNT = "10000"
PARENT = os.getppid()


def main(descriptor: int) -> int:
    """The exit status."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when torch is imported
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as sock:
        sock.setblocking(True)
        frames: BlockingFrames[ToWorker] = BlockingFrames(sock, receives=ToWorker)
        first = frames.receive()
        if first is None:
            return 0
        assert isinstance(first, Boot | Preload), f"the first frame is {type(first).__name__}, not Boot or Preload"
        set_up_logging(first.config.process.log_level)
        name = "spare worker"
        try:
            boot, seconds = (first, 0.0) if isinstance(first, Boot) else _prepare(frames, first)
            if boot is None:
                return 0
            name = f"worker {boot.rank}"
            _run(frames, boot, seconds)
        except PeerGone:
            return 0
        except Exception as error:
            with suppress(ConnectionError):
                frames.send(_fatal(name, error))
            return 1
    return 0


class PeerGone(Exception):
    """Whoever wanted our results has closed the socket."""


def _run(frames: BlockingFrames[ToWorker], boot: Boot, import_seconds: float) -> None:
    """`import_seconds` are those that this start has waited for already."""
    began = time.perf_counter()
    if boot.world > 1:
        watch(frames, PARENT)
        choose_interface(boot.config.parallel)
    import_worker()
    from engine.worker.loop import serve
    from engine.worker.start import start

    known = set(sys.modules)

    def agree(pages: int) -> int:
        return _agreed(frames, pages) if boot.world > 1 else pages

    runner, ready = start(boot, import_seconds + time.perf_counter() - began, agree)
    ready = msgspec.structs.replace(ready, modules=imported_since(known))
    gc.collect()
    gc.freeze()  # a look at all that there is by now takes tens of milliseconds, in the middle of a step
    sleep_precisely()
    try:
        frames.send(ready)
        parallel = boot.config.parallel
        serve(frames, runner, reports=boot.rank in parallel.reporters, parallel=parallel)
    except ConnectionError as error:
        raise PeerGone from error


def choose_interface(parallel: ParallelOptions) -> None:
    """Have gloo and NCCL use the interface that hosts talk over, unless their own variables are set."""
    if parallel.nnodes > 1 and parallel.dist_interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", parallel.dist_interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={parallel.dist_interface}")


def _agreed(frames: BlockingFrames[ToWorker], pages: int) -> int:
    """How many pages all ranks allocate, this one having room for `pages`. Waits for all ranks."""
    try:
        frames.send(Proposed(pages))
        agreed = frames.receive()
    except ConnectionError as error:
        raise PeerGone from error
    if agreed is None:
        raise PeerGone
    assert isinstance(agreed, Agreed), f"a worker that has proposed got {type(agreed).__name__}"
    return agreed.pages


def _prepare(frames: BlockingFrames[ToWorker], prepare: Preload) -> tuple[Boot | None, float]:
    """Imports what `prepare` names. Returns the Boot, once this worker is needed, and the seconds of imports that its
    start has waited for; None when the peer has gone."""
    began = time.perf_counter()
    with expendable():
        import_all(prepare.modules, gently=prepare.spare)
        seconds = 0.0 if prepare.spare else time.perf_counter() - began
        with suppress(ConnectionError):  # then the next frame is the end
            frames.send(Pong())
        boot = frames.receive()
    assert boot is None or isinstance(boot, Boot), f"a worker that is to be booted got {type(boot).__name__}"
    return boot, seconds


def _fatal(actor: str, error: Exception) -> Fatal:
    """The sentence of an error made for people; of any other its type and message, and the traceback for the log."""
    if isinstance(error, EngineError):
        broken = isinstance(error, PluginError) and error.__cause__ is not None  # whoever wrote it wants to see where
        return Fatal(actor, str(error), "".join(traceback.format_exception(error)) if broken else "")
    return Fatal(actor, f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


def _end(status: int) -> None:
    """A rank ends as it is: to take leave of ranks that are gone, or while graphs hold collectives, may hang."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    if "torch.distributed.distributed_c10d" in sys.modules:
        _end(status)
    sys.exit(status)
