"""Kernels that are compiled while requests wait, told in the log: those that the warm-up has missed.

Left out: what torch and its libraries load on first use.
"""

import logging
import time
from typing import Any

from engine.kernels import has_triton

log = logging.getLogger("engine.worker")


def tell_of_compiles() -> None:
    """From now on the log has a line for each kernel that Triton compiles, or loads from its cache, in this process."""
    if not has_triton():
        return
    from triton import knobs

    began = 0.0

    def before(**_: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def after(*, fn: Any, compile: dict[str, Any], **_: Any) -> None:
        seconds, numbers = time.perf_counter() - began, list(compile["constants"].values())
        log.warning("requests waited %.2f s for a kernel to be compiled: %s, constants %s", seconds, fn.name, numbers)

    knobs.runtime.jit_cache_hook = before
    knobs.runtime.jit_post_compile_hook = after
