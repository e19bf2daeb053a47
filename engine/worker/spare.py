"""What a worker does before it is needed: import in the background, and be the first to go where memory is short.

No device is touched here. Left out: whether there is to be a spare (engine/actors/spare.py).
"""

import gc
import importlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger("engine.worker")

NICE = 10  # a tenth of the share of a thread that is not nice
FIRST_TO_GO = "1000"
OOM_SCORE = Path("/proc/self/oom_score_adj")


def import_worker() -> None:
    """Imports the worker, and torch with it; an eighth faster without looking for garbage among what imports leave."""
    gc.disable()
    try:
        importlib.import_module("engine.worker.start")
        importlib.import_module("engine.worker.loop")
    finally:
        gc.enable()
    gc.freeze()


def imported_since(known: set[str]) -> tuple[str, ...]:
    """Names of the modules that were imported after the `known` ones, in that order, without those that only their
    importer can find."""
    found = []
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        if name not in known and spec is not None and spec.name == name and spec.has_location:
            found.append(name)
    return tuple(found)


def import_all(modules: Sequence[str], *, gently: bool) -> None:
    """Imports the worker and `modules`; `gently`: out of the way of other processes.

    Linux keeps the priority of each thread, and lets nobody but root raise one again: so gentle imports run in a thread
    of their own, and the worker in one that was never lowered. Threads that an import starts (numpy's) stay low."""
    if not gently:
        return _import_all(modules)
    with ThreadPoolExecutor(1, "imports", initializer=_lower_priority) as pool:
        pool.submit(_import_all, modules).result()


def _import_all(modules: Sequence[str]) -> None:
    import_worker()
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:  # a worker will say so, if it cannot do without
            log.debug("a spare worker cannot import %s: %s", name, error)


def _lower_priority() -> None:
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


@contextmanager
def expendable() -> Iterator[None]:
    """Within: the process that the system ends first where memory runs out."""
    before = ""
    with suppress(OSError):  # not Linux, or not allowed
        before = OOM_SCORE.read_text()
        OOM_SCORE.write_text(FIRST_TO_GO)
    try:
        yield
    finally:
        if before:
            with suppress(OSError):
                OOM_SCORE.write_text(before)
