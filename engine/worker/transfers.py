"""Copies pages between the device, the host's memory and a store, beside the steps.

    steps    ──n──┬──n+1──────────┬─ n+2 ──          a move that comes after the plan of step n
    down          └─ copy ─┬─> told    ^             sees what n has written; n+1 runs meanwhile
                           └───────────┘             one that holds: n+1 begins once it is copied

On a GPU the copies are DMA, so they take no multiprocessor from the steps. They are on three streams: what goes up,
what goes down, and what has to wait for a step before it goes down, so that nothing else waits with it. A move waits on
the device for all steps launched before it, if one of them may use its pages (steps/uses.py): one may write what goes
down, or still use a page that was freed and is to be written. A step waits for a copy in two cases, on the device. One
is a copy that `holds`, whose pages it writes over. The other is the rest of a copy up whose pages it is the first to be
given. That is told of a little before its end, as the way of the answer to the scheduler, and that of the plan back,
take as long. The scheduler lets no step touch the pages of any other move before its answer. Whoever waits on the host
for a copy, a disk or another process is a thread.

A page of all layers of a KV group is one piece of memory (memory.py), so a page is a copy for each group, and where
there is one group, neighbours that stay neighbours are copied at once. All that is given to a stream is one call
(copying.py). What else is copied the same way waits behind all that a stream was given, so that is not everything: a
thread gives it the next ones when the first have come. A step copies hardly anything over the bus (layers/batch.py,
steps/results.py), so these may take as long as that thread may have to wait for Python. Heads, latents, windows and FP8
are all alike here: scales of FP8 belong to layers, not to pages. Left out: single layers of a page
(docs/tiers.md says why).
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import pairwise
from queue import SimpleQueue
from threading import Thread
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from engine.errors import ConfigError, counted
from engine.messages.step import StepPlan
from engine.messages.tiers import NAME_BYTES, Move, Moved
from engine.options.sizes import show_size
from engine.plugin.tiers import Manifest, Pool, Store
from engine.worker.copying import Batch, batched
from engine.worker.memory import Caches, bytes_of
from engine.worker.steps.uses import End, PageUses, state_pages

logger = logging.getLogger("engine.worker")

READERS = 8  # threads that read from a store
READ_AT_ONCE = 8  # pages that one of them reads
COPY_BYTES = 64 << 20  # given to a stream at once: 1.3 ms of a bus that moves 50 GB/s
UNDER_WAY = 2  # as many bytes, so often, on one stream
# What is left of a copy up as it is told of: 2.7 ms of that bus, and twice as much where no step is under way. Until a
# step begins that uses the pages, the host needs about as long.
AHEAD_BYTES, IDLE_AHEAD_BYTES = 128 << 20, 256 << 20
ASKERS = 4  # moves that wait for a store at a time

Tell = Callable[[Moved], None]
Copy = tuple[int, int, int]  # its first page, its first place in the pool, and how many pages it is of


class Threads:
    """Does one job after the other on `count` threads, which end with the process whatever they wait for."""

    def __init__(self, count: int, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        for number in range(count):
            Thread(target=self._work, name=f"{name} {number}", daemon=True).start()

    def submit(self, job: Callable[[], None]) -> None:
        """`job` raises nothing."""
        self._jobs.put(job)

    def map(self, work: Callable[[Any], Any], parts: Sequence[Any]) -> list[Any]:
        """What `work` makes of each part, in order; the first error is raised once all are over."""
        answers: SimpleQueue[tuple[int, Any, Exception | None]] = SimpleQueue()

        def one(place: int) -> None:
            try:
                answers.put((place, work(parts[place]), None))
            except Exception as error:  # raised below
                answers.put((place, None, error))

        for place in range(len(parts)):
            self.submit(lambda place=place: one(place))  # type: ignore[misc]
        found = sorted((answers.get() for _ in parts), key=lambda answer: answer[0])
        for _, _, error in found:
            if error is not None:
                raise error
        return [value for _, value, _ in found]

    def _work(self) -> None:
        while True:
            self._jobs.get()()


class Transfers:
    """Moves of one rank, between its `caches` on `device`, its `pool`, and a `store` that may be there.

    Of copies of attention it is of number `copy`. Raises ConfigError where a GPU cannot use the pool's memory."""

    def __init__(
        self,
        caches: Caches,
        device: torch.device,
        pool: Pool,
        store: Store | None,
        manifest: Manifest,
        copy: int = 0,
        uses: PageUses | None = None,
    ) -> None:
        self._device, self._store, self._copy, self._uses = device, store, copy, uses
        self._groups = [bytes_of(layers[0]) for layers in caches]
        self._ends = np.cumsum([group.shape[1] for group in self._groups]).tolist()
        self._joined = max(1, COPY_BYTES // self._ends[-1]) if len(self._groups) == 1 else 1  # pages in one copy
        self._pool = pool  # whose memory it stays
        self._host = torch.frombuffer(pool.memory, dtype=torch.uint8).view(-1, self._ends[-1])
        self._views = [pool.memory[at : at + self._ends[-1]] for at in range(0, self._host.numel(), self._ends[-1])]
        self._scope = blake2b(msgspec.json.encode(manifest, order="deterministic")).digest()
        self._streams: dict[str, torch.cuda.Stream] = {}  # of a GPU, by way
        self._batch: Batch | None = None
        if device.type == "cuda":
            pin(self._host)
            self._batch = batched()
            self._streams = {way: torch.cuda.Stream(device) for way in ("down", "late", "up")}
        self._told: tuple[torch.cuda.Event, np.ndarray] | None = None  # the end of the last copy up told of, its pages
        self._held: dict[str, torch.cuda.Event] = {}  # and of the last copy of each stream that held a step
        self._clears = 0  # what was to be kept before the last of them is dropped, unless the store has begun
        self._copiers = {way: Threads(1, way) for way in ("down", "late", "up")}
        self._asking, self._reading, self._writing = (
            Threads(count, name) for count, name in ((ASKERS, "ask"), (READERS, "read"), (1, "write"))
        )

    @property
    def pages(self) -> int:
        """Places in the pool."""
        return len(self._host)

    @property
    def stores(self) -> bool:
        return self._store is not None

    def close(self) -> None:
        """No move will come again. What the store has taken in it may still write down."""
        if self._store is not None:
            self._store.close()

    def begin(self, move: Move, tell: Tell) -> None:
        """Do `move` beside the steps that come, and `tell` of it from any thread. Steps launched before it come first;
        if it `holds`, those launched after it come last."""
        asked = time.perf_counter()

        def answer(done: Sequence[bool], began: float = asked, part: float = 1.0, **more: Any) -> None:
            seconds = (time.perf_counter() - began) / part
            with suppress(ConnectionError):  # who asked is gone
                tell(Moved(move.number, bytes(done), seconds, **more))

        if move.copy != self._copy:
            return tell(Moved(move.number, b"\1" * move.count))
        match move.way:
            case "down" | "up":
                self._copy_pages(move, answer)
            case "keep":
                clears = self._clears
                self._writing.submit(
                    lambda: self._ask(move, answer) if clears == self._clears else answer([False] * move.count)
                )
            case "clear":
                self._clears += 1  # so it waits for the one move that the store is keeping, and not for others
                self._writing.submit(lambda: self._ask(move, answer))
            case "find" | "fetch":
                self._asking.submit(lambda: self._ask(move, answer))
        return None

    # ── device and host ──────────────────────────────────────────────────────────────────────

    def follow(self, plan: StepPlan) -> None:
        """Let the step of `plan`, which is to be launched, come after the copy up that was told of last, if it is the
        first that is given some of its pages. Others run while the rest of that comes; all before it have come."""
        if (told := self._told) is not None and (plan.pages or plan.admits or plan.keeps) and not told[0].query():
            given = np.frombuffer(plan.pages, "<i4").reshape(-1, 3)[:, 2]
            if np.isin([*given, *state_pages(plan)], told[1]).any():
                torch.cuda.current_stream(self._device).wait_event(told[0])

    def launched(self, plan: StepPlan, end: End) -> None:
        """The step of `plan`, which is this rank's, is under way: copies of pages that it may use come after it."""
        if self._uses is not None:
            self._uses.launched(plan, end)

    def _copy_pages(self, move: Move, answer: Callable[..., None]) -> None:
        pages, slots = (np.frombuffer(each, "<i4") for each in (move.pages, move.slots))
        copies = list(runs(pages, slots, self._joined))
        if self._device.type != "cuda":
            over: SimpleQueue[None] = SimpleQueue()

            def copy() -> float:
                try:
                    self._copy_all(move.way, copies)
                finally:
                    over.put(None)
                return 1.0

            self._submit("down", move, answer, copy)  # one after the other, whichever way
            if move.holds:
                over.get()
            return
        current = torch.cuda.current_stream(self._device)
        first: list[torch.cuda.Event] = []
        if waits := self._uses is None or self._uses.busy(pages):
            first.append(torch.cuda.Event())
            first[0].record(current)
        elif move.way == "up":
            first += self._held.values()  # which may still read the pages
        if move.way == "up":
            return self._submit("up", move, answer, lambda: self._copy_up(pages, copies, current, first))
        copier = "late" if waits else "down"
        stream = self._streams[copier]

        def issue(*, paced: bool) -> torch.cuda.Event:
            with torch.cuda.device(self._device), torch.cuda.stream(stream):
                for event in first:
                    stream.wait_event(event)
                if (told := self._told) is not None:  # which may still read the places
                    stream.wait_event(told[0])
                return self._issue("down", copies, stream, paced=paced)

        def wait(ended: torch.cuda.Event) -> float:
            ended.synchronize()
            return 1.0

        if move.holds:
            self._held[copier] = ended = issue(paced=False)
            current.wait_event(ended)
            return self._submit(copier, move, answer, lambda: wait(ended))
        return self._submit(copier, move, answer, lambda: wait(issue(paced=True)))

    def _submit(self, copier: str, move: Move, answer: Callable[..., None], copy: Callable[[], float]) -> None:
        """Have a copier `copy`, which returns the part that the time so far is of all that it takes, and `answer`.

        A copy that fails has not been done: who waits for it computes, and so learns whether the device is lost."""

        def job() -> None:
            began = time.perf_counter()
            try:
                part = copy()
            except Exception as error:
                logger.debug("a copy fails", exc_info=True)
                with suppress(Exception):  # it may fail as well
                    self._streams[copier].synchronize()  # nothing of it is under way any more
                cause = f"a copy of KV pages ({move.way}) fails: {type(error).__name__}: {error}"
                return answer([False] * move.count, began, cause=cause)
            return answer([True] * move.count, began, part)

        self._copiers[copier].submit(job)

    def _copy_up(
        self,
        pages: np.ndarray,
        copies: list[Copy],
        steps: "torch.cuda.Stream",
        first: "Sequence[torch.cuda.Event]",
    ) -> float:
        """Copy `pages` up after those events, and return when that is to be told of; `follow` does the rest. Where no
        step is under way on the stream of the `steps`, that is sooner, because nobody who runs can be delayed. The part
        that the time so far is of all that it takes, about."""
        stream = self._streams["up"]
        idle, busy = (_before(copies, size // self._ends[-1]) for size in (IDLE_AHEAD_BYTES, AHEAD_BYTES))
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            for event in first:
                stream.wait_event(event)
            sooner = self._issue("up", copies[:idle], stream, paced=True)
            soon, ended = (self._issue("up", part, stream, paced=False) for part in (copies[idle:busy], copies[busy:]))
        sooner.synchronize()
        if not (is_idle := steps.query()):
            soon.synchronize()
        self._told = ended, pages
        over = sum(count for _, _, count in copies[: idle if is_idle else busy])
        share = over / sum(count for _, _, count in copies)
        return share if share > 0.5 else 1.0  # of less, what it waited for would count as its pace

    def _issue(
        self, way: str, copies: Sequence[Copy], stream: "torch.cuda.Stream", *, paced: bool
    ) -> "torch.cuda.Event":
        """Give the `stream` these copies, and return their end. If `paced`, they are given as those before them come,
        so that of the last ones alone it is waited for."""
        ends: list[torch.cuda.Event] = []
        for part in _parts(copies, max(1, COPY_BYTES // self._ends[-1])) if paced else (copies,):
            if len(ends) >= UNDER_WAY:
                ends[-UNDER_WAY].synchronize()
            self._copy_all(way, part)
            ends.append(torch.cuda.Event(blocking=True))
            ends[-1].record(stream)
        return ends[-1]

    @torch.inference_mode()
    def _copy_all(self, way: str, copies: Sequence[Copy]) -> None:
        """All that is on the device and at the host of these pages, the way of the move; on the current stream."""
        if self._batch is not None and copies:
            above, below, sizes = self._addresses(copies)
            to, source = (below, above) if way == "down" else (above, below)
            return self._batch(to, source, sizes, torch.cuda.current_stream(self._device).cuda_stream)
        for first_page, first_slot, count in copies:
            begin = 0
            for group, end in zip(self._groups, self._ends, strict=True):
                device = group[first_page : first_page + count]
                host = self._host[first_slot : first_slot + count, begin:end]
                if way == "down":
                    host.copy_(device, non_blocking=True)
                else:
                    device.copy_(host, non_blocking=True)
                begin = end

    def _addresses(self, copies: Sequence[Copy]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each copy and KV group: where it is on the device, where at the host, and how many bytes; [N] uint64."""
        pages, slots, counts = np.array(copies, np.uint64).T
        begins = [0, *self._ends[:-1]]
        above = [group.data_ptr() + pages * np.uint64(group.shape[1]) for group in self._groups]
        below = [self._host.data_ptr() + slots * np.uint64(self._ends[-1]) + np.uint64(begin) for begin in begins]
        sizes = [counts * np.uint64(group.shape[1]) for group in self._groups]
        return np.concatenate(above), np.concatenate(below), np.concatenate(sizes)

    # ── store ────────────────────────────────────────────────────────────────────────────────

    def _ask(self, move: Move, answer: Callable[..., None]) -> None:
        """What a store is asked. A store that raises has not done it, nor has one that answers what it was not asked;
        who computes instead is told why."""
        store = self._store
        assert store is not None, "a rank without a store is asked for one"
        try:
            cause = str(store.clear() or "") if move.way == "clear" else ""
            done = [not cause] if move.way == "clear" else [bool(each) for each in self._asked(store, move)]
            if len(done) != move.count:
                raise ValueError(f"{len(done)} answers for {counted(move.count, 'page')}")
            held = store.held()
            counts = {str(name): int(count) for name, count in held.counts.items()}
        except Exception as error:
            logger.debug("the store fails", exc_info=True)
            cause = f"the store of KV pages fails: {type(error).__name__}: {error}"
            return answer([False] * move.count, cause=cause)
        answer(done, held=held.pages, held_bytes=held.bytes, counts=counts, cause=cause)
        return None

    def _asked(self, store: Store, move: Move) -> list[bool]:
        names = self._named([move.names[at : at + NAME_BYTES] for at in range(0, len(move.names), NAME_BYTES)])
        views = [self._views[slot] for slot in np.frombuffer(move.slots, "<i4").tolist()]
        match move.way:
            case "find":
                return store.has(names)
            case "fetch":
                if (told := self._told) is not None:
                    told[0].synchronize()  # it may still read the places
                cuts = [*range(0, len(names), READ_AT_ONCE), len(names)]
                parts = list(pairwise(cuts))
                read = self._reading.map(lambda part: store.get(names[slice(*part)], views[slice(*part)]), parts)
                return [found for each in read for found in each]
            case _:
                done = store.has(names)
                new = [place for place, is_there in enumerate(done) if not is_there]
                kept = store.put([names[place] for place in new], [views[place] for place in new])
                for place, is_kept in zip(new, kept, strict=True):
                    done[place] = is_kept
                return done

    def _named(self, names: Iterable[bytes]) -> list[bytes]:
        """What the store knows pages of these names by."""
        return [blake2b(name, key=self._scope, digest_size=NAME_BYTES).digest() for name in names]


def runs(pages: np.ndarray, slots: np.ndarray, most: int) -> Iterator[Copy]:
    """Copies of pages that follow each other in both places, `most` of them at once."""
    if not len(pages):
        return
    order = np.argsort(pages)
    pages, slots = pages[order], slots[order]
    breaks = np.flatnonzero((np.diff(pages) != 1) | (np.diff(slots) != 1)) + 1
    for first, end in pairwise([0, *breaks.tolist(), len(pages)]):
        for at in range(first, end, most):
            yield int(pages[at]), int(slots[at]), min(most, end - at)


def _before(copies: Sequence[Copy], pages: int) -> int:
    """How many of these copies come before the last ones, which are of so many `pages` at most."""
    cut = len(copies)
    while cut and (pages := pages - copies[cut - 1][2]) >= 0:
        cut -= 1
    return cut


def _parts(copies: Sequence[Copy], pages: int) -> list[list[Copy]]:
    """The copies in order, in parts of so many `pages` or of one copy; one that is empty if there are none."""
    parts: list[list[Copy]] = [[]]
    for copy in copies:
        if parts[-1] and sum(count for _, _, count in parts[-1]) + copy[2] > pages:
            parts.append([])
        parts[-1].append(copy)
    return parts


def pin(host: Tensor) -> None:
    """Registers memory with the GPU, which copies to and from it at full speed then. Raises ConfigError if it cannot
    be."""
    error = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)
    if int(error) != 0:
        raise ConfigError(
            f"the GPU cannot use {show_size(host.nbytes)} of host memory (cudaHostRegister: error {int(error)}); lower "
            "--kv-host, or raise the limit of locked memory"
        )
