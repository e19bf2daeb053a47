"""What a worker does with moves between tiers, in plain Python, beside a SimulatedDevice.

A move takes a while, and is as careless meanwhile as a worker may be: where it writes, there is rubbish until it ends,
and what it copies from the device is what lies there at its end. So a page that is used or written before its move is
over shows as a wrong hash, at the latest when a row attends to it. A move that holds the next step ends before that.
Those that fail leave rubbish. The store loses what it likes.
"""

from array import array
from typing import Any

from simulated_device import SimulatedDevice

from engine.messages.tiers import NAME_BYTES, Move, Moved

RUBBISH = "rubbish"
IN_ORDER = {"keep": ("keep", "clear"), "clear": ("keep", "clear"), "up": ("up",)}


class SimulatedTiers:
    """Below `device`: `host` pages, and a store, which outlives them. `moving` moves are under way, oldest first."""

    def __init__(self, device: SimulatedDevice, host: int) -> None:
        self.device, self.host = device, host
        self.pool: dict[tuple[int, int], Any] = {}  # slot, offset: hash
        self.store: dict[bytes, list[Any]] = {}
        self.moving: list[Move] = []
        self._held: dict[int, list[list[Any]]] = {}  # by number, what was read at once
        self.done = dict.fromkeys(("down", "up", "keep", "fetch", "find", "clear"), 0)

    def begin(self, move: Move) -> None:
        self.moving.append(move)
        slots, pages = list(array("i", move.slots)), list(array("i", move.pages))
        assert all(0 <= slot < self.host for slot in slots)
        if move.holds:
            self._held[move.number] = [self._read(self.device.store, page) for page in pages]
        if move.way in ("down", "fetch"):
            self._scribble(self.pool, slots)
        if move.way == "up":
            self._scribble(self.device.store, pages)

    def finish(self, index: int = 0, failing: bytes = b"") -> Moved:
        """End a move of those under way; where `failing` has a byte, its pages have not come."""
        if (ways := IN_ORDER.get(self.moving[index].way)) is not None:  # one after the other
            index = next(place for place, move in enumerate(self.moving) if move.way in ways)
        move = self.moving.pop(index)
        slots, pages = list(array("i", move.slots)), list(array("i", move.pages))
        names = [move.names[at : at + NAME_BYTES] for at in range(0, len(move.names), NAME_BYTES)]
        count = move.count
        fails = [page < len(failing) and bool(failing[page]) for page in range(count)]
        done = [self._do(move, place, slots, pages, names) for place in range(count) if not fails[place]]
        told = iter(done)
        self.done[move.way] += sum(done)
        return Moved(move.number, bytes(not each and next(told) for each in fails))

    def _do(self, move: Move, place: int, slots: list[int], pages: list[int], names: list[bytes]) -> bool:
        match move.way:
            case "down":
                held = self._held.get(move.number)
                page = self._read(self.device.store, pages[place]) if held is None else held[place]
                self._write(self.pool, slots[place], page)
            case "up":
                self._write(self.device.store, pages[place], self._read(self.pool, slots[place]))
            case "keep":
                self.store[names[place]] = self._read(self.pool, slots[place])
            case "fetch":
                if names[place] not in self.store:
                    return False
                self._write(self.pool, slots[place], self.store[names[place]])
            case "find":
                return names[place] in self.store
            case "clear":
                self.store.clear()
        return True

    def lose(self) -> None:
        """The worker is gone, and what it was doing; the store is not."""
        self.pool.clear()
        self.moving.clear()
        self._held.clear()

    def _read(self, memory: dict[tuple[int, int], Any], page: int) -> list[Any]:
        return [memory.get((page, offset)) for offset in range(self.device.page_size)]

    def _write(self, memory: dict[tuple[int, int], Any], page: int, hashes: list[Any]) -> None:
        for offset, value in enumerate(hashes):
            memory[page, offset] = value

    def _scribble(self, memory: dict[tuple[int, int], Any], pages: list[int]) -> None:
        for page in pages:
            self._write(memory, page, [RUBBISH] * self.device.page_size)
