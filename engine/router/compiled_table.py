"""The table of table.py in C (table.c), called through ctypes: a look-up waits for memory once.

`table()` is a table of it, or one in Python where there is neither a compiler nor a library that one has made before,
or with ENGINE_CPU_KERNELS=0. A thread that calls it keeps the interpreter's lock, so calls do not meet.
"""

import ctypes
import functools
import logging
import os
import secrets
import subprocess
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.router.table import SLOTS, Table
from engine.runtime.compiled import Sources, said

log = logging.getLogger("engine.router")

SOURCES = Sources(
    name="table",
    title="the router's table",
    paths=(Path(__file__).parent / "table.c",),
    flags=("-O2", "-std=gnu11", "-fPIC"),
)
_pointer, _int, _long, _u64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_uint64
SIGNATURES: dict[str, tuple[Any, ...]] = {  # what is returned, then the arguments
    "new": (_pointer, _u64),
    "free": (None, _pointer),
    "use": (_int, _pointer, _int),
    "retire": (None, _pointer, _int, _int),
    "retired": (_int, _pointer, _int),
    "lengths": (_int, _pointer, _pointer, _long, _pointer),
    "leading": (_long, _pointer, _pointer, _long, _int),
    "mark": (_int, _pointer, _pointer, _long, _long, _int, _long, _pointer),
    "unmark": (_long, _pointer, _pointer, _long, _int, _int),
    "tidy": (_int, _pointer, _long),
    "used": (_long, _pointer),
    "count": (_long, _pointer, _int),
    "whole": (_int, _pointer),
}


def table() -> "Table | CompiledTable":
    """An empty one."""
    functions = compiled()
    return Table() if functions is None else CompiledTable(functions)


@functools.cache
def compiled() -> dict[str, Any] | None:
    """The functions of table.c by name; None, with the reason in the log, where they cannot be had."""
    if os.environ.get("ENGINE_CPU_KERNELS") == "0":
        return None
    reason = "there is no C compiler"
    try:
        library = SOURCES.load()
    except (OSError, subprocess.CalledProcessError) as error:
        library, reason = None, said(error)
    if library is None:
        log.info("the router's table is in Python, and a request takes longer to route: %s", reason)
        return None
    held = ctypes.PyDLL(library._name, handle=library._handle)
    found = {}
    for name, (returned, *arguments) in SIGNATURES.items():
        function = found[name] = getattr(held, f"table_{name}")
        function.restype, function.argtypes = returned, arguments
    return found


class CompiledTable:
    """As Table, but that a block of 0 is taken for 1. Raises MemoryError where there is none."""

    def __init__(self, functions: dict[str, Any]) -> None:
        self._call = functions
        self._table = functions["new"](secrets.randbits(64))
        if not self._table:
            raise MemoryError("there is no memory for the router's table")
        weakref.finalize(self, functions["free"], self._table)
        self._found = array("i")  # by `lengths`: pairs of a slot and a count, with room for all slots
        self._done = array("q", [0])  # by `mark`, which is a C long

    def __len__(self) -> int:
        return int(self._call["used"](self._table))

    # ── marks ────────────────────────────────────────────────────────────────────────────────

    def use(self, bit: int) -> None:
        if not self._call["use"](self._table, bit):
            raise MemoryError(f"there is no memory for mark {bit} in a table of {len(self)} blocks")
        room = 2 * SLOTS * (bit // 64 + 1)
        if len(self._found) < room:
            self._found = array("i", bytes(self._found.itemsize * room))

    def retire(self, bit: int, *, somewhere: bool) -> None:
        self._call["retire"](self._table, bit, somewhere)

    def retired(self, bit: int) -> bool:
        return bool(self._call["retired"](self._table, bit))

    # ── finding ──────────────────────────────────────────────────────────────────────────────

    def lengths(self, blocks: Sequence[int]) -> dict[int, int]:
        blocks = _words(blocks)
        found = self._found
        pairs = self._call["lengths"](self._table, *blocks.buffer_info(), found.buffer_info()[0])
        return dict(zip(found[: 2 * pairs : 2], found[1 : 2 * pairs : 2], strict=True))

    def leading(self, blocks: Sequence[int], bit: int) -> int:
        blocks = _words(blocks)
        return int(self._call["leading"](self._table, *blocks.buffer_info(), bit))

    # ── changing ─────────────────────────────────────────────────────────────────────────────

    def mark(self, blocks: Sequence[int], start: int, bit: int, most: int) -> int:
        blocks, done = _words(blocks), self._done
        done[0] = 0
        if self._call["mark"](self._table, *blocks.buffer_info(), start, bit, most, done.buffer_info()[0]):
            raise MemoryError(f"there is no memory for more than {len(self)} blocks")
        return done[0]

    def unmark(self, blocks: Sequence[int], bit: int, *, trailing: bool) -> int:
        blocks = _words(blocks)
        return int(self._call["unmark"](self._table, *blocks.buffer_info(), bit, trailing))

    def tidy(self, most: int) -> bool:
        return bool(self._call["tidy"](self._table, 2 * most))  # rows, of which a third to two thirds are free

    def check_integrity(self) -> dict[int, int]:
        assert self._call["whole"](self._table), "a row is not found, a mark is nobody's, or a count is wrong"
        counts = {bit: int(self._call["count"](self._table, bit)) for bit in range(64 * len(self._found) // 2 // SLOTS)}
        return {bit: count for bit, count in counts.items() if count >= 0}


def _words(blocks: Sequence[int]) -> "array[int]":
    """`blocks` in one piece of memory."""
    return blocks if isinstance(blocks, array) and blocks.typecode == "Q" else array("Q", blocks)
