"""A worker group: one life of all ranks of a model, from their first frame to the end of any of them.

                    ┌── frames ──> rank 0     every plan, every question, to all
    executor ──> group ── frames ──> rank 1     steps' results from one, or from one of each copy of
                    └── frames ──> rank n     attention (`reporters`); answers once all have given theirs

Ranks wait for each other inside of a step, so none is of use alone: when one ends, all are ended, for its cause. Two
things are agreed on at the start. Each rank proposes how many pages its memory has room for, once its weights are in
place, and allocates the fewest that any has proposed; and what the group says it can do is the least of its ranks.
What each last said of itself tells who keeps the others waiting (stalls.py).
Left out: when a group is started again (actors/executor.py).
"""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from typing import Any

import anyio
import msgspec

from engine.config import Config
from engine.errors import counted
from engine.messages import FromExecutor, FromWorker, ToWorker
from engine.messages.assets import Loaded
from engine.messages.control import (
    Agreed,
    Answer,
    Beat,
    Boot,
    Fatal,
    Ping,
    Pong,
    Proposed,
    WorkerReady,
    WorkerSilent,
)
from engine.messages.step import StepDone, StepPlan
from engine.messages.tiers import Moved, both
from engine.runtime.channel import Frames, Outbox, pack
from engine.runtime.process import Child
from engine.runtime.stalls import SILENT_SECONDS, stalled
from engine.sched.shares import gathered

log = logging.getLogger("engine.executor")

PING_SECONDS = 1.0
WAIT_SECONDS = 10.0  # that ranks wait for another one's start before the log says for which
GRACE_SECONDS = 0.5  # after the first rank's end, for those to be seen that ended at the same time

Reply = Answer | Loaded


@contextmanager
def meeting_place() -> Iterator[str]:
    """The address of a file that ranks of this machine meet at. On Linux it is in memory and has no name, so nothing of
    it is left behind, however this process ends."""
    if sys.platform != "linux":
        with tempfile.TemporaryDirectory(prefix="engine-ranks-") as folder:
            yield f"file://{folder}/rendezvous"
        return
    file = os.memfd_create("engine-ranks")
    try:
        yield f"file:///proc/{os.getpid()}/fd/{file}"
    finally:
        os.close(file)


class Rank:
    """What is known of one worker: steps it holds, when it last spoke, how far its start is, and its last words."""

    def __init__(self, number: int, child: Child[FromWorker]) -> None:
        self.number = number
        self.child = child
        self.heard = time.monotonic()
        self.beat: Beat | None = None
        self.beaten = self.heard
        self.busy = 0
        self.silent = False
        self.pinged = False  # and nothing heard since
        self.proposed: int | None = None
        self.ready: WorkerReady | None = None
        self.last_words: str | None = None
        self.details = ""  # a traceback


class WorkerGroup:
    """The workers of `children`, in the order of their ranks; `on_ready` hears what they can do before the scheduler.

    The children are the caller's to end."""

    def __init__(
        self,
        config: Config,
        children: Sequence[Child[FromWorker]],
        scheduler: Outbox[FromExecutor],
        on_ready: Callable[[WorkerReady], None],
        meeting: Callable[[], AbstractContextManager[str]] = meeting_place,
    ) -> None:
        self.ready = False
        self._config = config
        self._ranks = [Rank(number, child) for number, child in enumerate(children)]
        self._reporters = [self._ranks[number] for number in config.parallel.reporters]
        self._parts: dict[int, dict[int, StepDone]] = {}  # of steps that not all reporters have told of, by rank
        self._moves: dict[int, list[Moved]] = {}  # that not all ranks have told of
        self._scheduler = scheduler
        self._on_ready = on_ready
        self._meeting = meeting
        self._encoder = msgspec.msgpack.Encoder()
        self._answers: dict[tuple[type[Reply], int], dict[int, Reply]] = {}  # that not all ranks have given
        self._gone: list[Rank] = []  # in the order in which they ended
        self._cause = ""
        self._stalled = 0.0  # since when, if anyone is
        self._ended = anyio.Event()
        self._all_ended = anyio.Event()

    async def send(self, message: ToWorker) -> None:
        """To all ranks. Where one has ended, `live` sees that."""
        if isinstance(message, StepPlan):
            for rank in self._reporters:
                rank.busy += 1
        frame = pack(self._encoder, message)
        for rank in self._ranks:
            await _attempt(rank.child.frames, frame)

    async def live(self) -> str:
        """Boot the ranks and pass on what they say until one ends; why it did, for people."""
        with self._meeting() as rendezvous:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch)
                for rank in self._ranks:
                    boot = Boot(rank.child.config(self._config), rank.number, len(self._ranks), rendezvous)
                    tasks.start_soon(self._listen, rank, boot)
                await self._ended.wait()
                with anyio.move_on_after(GRACE_SECONDS):
                    await self._all_ended.wait()
                tasks.cancel_scope.cancel()
            return await self._why()

    # ── what ranks say ───────────────────────────────────────────────────────────────────────

    async def _listen(self, rank: Rank, boot: Boot) -> None:
        await _attempt(rank.child.frames, pack(self._encoder, boot))
        async for message in rank.child.frames:
            if isinstance(message, Beat):
                rank.beat, rank.beaten = message, time.monotonic()
                continue
            rank.heard, rank.pinged = time.monotonic(), False
            if rank.silent:
                await self._speaks_again(rank)
            await self._handle(rank, message)
        self._gone.append(rank)
        self._ended.set()
        if len(self._gone) == len(self._ranks):
            self._all_ended.set()

    async def _handle(self, rank: Rank, message: FromWorker) -> None:
        match message:
            case StepDone():
                rank.busy -= 1
                await self._step_done(rank, message)
            case Answer() | Loaded():
                await self._collect(rank, message)
            case Moved():
                await self._moved(message)
            case Proposed():
                rank.proposed = message.pages
                await self._agree()
            case WorkerReady():
                rank.ready = message
                await self._all_ready()
            case Fatal():
                rank.last_words, rank.details = message.cause, message.details
            case Pong():
                pass

    async def _step_done(self, rank: Rank, part: StepDone) -> None:
        """Pass on the result of a step, once all have told of it who do."""
        if len(self._reporters) > 1:
            parts = self._parts.setdefault(part.step, {})
            parts[rank.number] = part
            if len(parts) < len(self._reporters):
                return
            del self._parts[part.step]
            part = gathered([parts[reporter.number] for reporter in self._reporters])
        await self._scheduler.send(part)

    async def _moved(self, part: Moved) -> None:
        """Pass on what came of a move, once all ranks have told of it: the pages that all of them have moved."""
        parts = self._moves.setdefault(part.number, [])
        parts.append(part)
        if len(parts) == len(self._ranks):
            await self._scheduler.send(reduce(both, self._moves.pop(part.number)))

    async def _agree(self) -> None:
        """Once all ranks have proposed, tell them how many pages there will be."""
        proposed = [rank.proposed for rank in self._ranks if rank.proposed is not None]
        if len(proposed) < len(self._ranks):
            return
        least = min(proposed)
        if least < max(proposed):
            short = proposed.index(least)
            log.info(
                "rank %d has room for %s of KV cache, the fewest: so have all ranks", short, counted(least, "page")
            )
        await self.send(Agreed(least))

    async def _all_ready(self) -> None:
        """Once all ranks are ready, say so, unless they do not go together."""
        said = [rank.ready for rank in self._ranks if rank.ready is not None]
        if len(said) < len(self._ranks):
            return
        self._cause = unlike(said)
        if self._cause:
            self._ended.set()
            return
        self.ready = True
        ready = least_of(said)
        self._on_ready(ready)
        await self._scheduler.send(msgspec.structs.replace(ready, modules=()))

    async def _collect(self, rank: Rank, answer: Reply) -> None:
        """Pass on the first reporter's answer once all ranks have given theirs; or one that says why it has none."""
        key = type(answer), answer.number
        answers = self._answers.setdefault(key, {})
        answers[rank.number] = answer
        if len(answers) < len(self._ranks):
            return
        del self._answers[key]
        given = answers[self._reporters[0].number]
        if not given.cause:
            failed = next((number for number in sorted(answers) if answers[number].cause), None)
            if failed is not None:
                cause = f"{self._named(self._ranks[failed])}{answers[failed].cause}"
                given = msgspec.structs.replace(answers[failed], cause=cause)
        await self._scheduler.send(given)

    # ── silence ──────────────────────────────────────────────────────────────────────────────

    async def _watch(self) -> None:
        """Ask workers whether they are there, but for one whose results are awaited; report those silent too long."""
        limit = self._config.process.stall_seconds
        began, told = time.monotonic(), ""
        ping = bytes(pack(self._encoder, Ping()))
        while True:
            due = time.monotonic() + PING_SECONDS
            await anyio.sleep(PING_SECONDS)
            for rank in self._ranks:  # beats that came while this process was held up are still to be read
                rank.beaten += time.monotonic() - due
            if not self.ready:
                late = self._who_starts()
                if late not in ("", told) and time.monotonic() - began > WAIT_SECONDS:
                    log.info("%s still to start; the others wait", late)
                    told = late
                continue
            await self._look_for_stalls()
            for rank in self._ranks:
                if not rank.busy and not rank.pinged:
                    rank.pinged = True
                    await _attempt(rank.child.frames, ping)
                quiet = time.monotonic() - rank.heard
                if quiet > limit and not rank.silent:
                    rank.silent = True
                    await self._report_silence(quiet)

    async def _look_for_stalls(self) -> None:
        """Name who keeps the others waiting, and whom, once that is so and once it is over. Where it lasts for as long
        as a worker may be silent, nothing is awaited any more: all are ended."""
        now = time.monotonic()
        beats = {rank.number: rank.beat for rank in self._ranks if rank.beat is not None}
        ages = {rank.number: now - rank.beaten for rank in self._ranks}
        names = [f"rank {rank.number}{rank.child.place}" for rank in self._ranks]
        cause = stalled(beats, ages, names)
        if cause and not self._stalled:
            self._stalled = now
            log.warning("ranks wait: %s", cause)
            await self._scheduler.send(WorkerSilent(SILENT_SECONDS, cause))
        elif self._stalled and not cause:
            self._stalled = 0.0
            log.info("all ranks go on")
            if not any(rank.silent for rank in self._ranks):
                await self._scheduler.send(WorkerSilent(0.0))
        elif cause and now - self._stalled > self._config.process.stall_seconds:
            self._cause = cause
            self._ended.set()

    def _who_starts(self) -> str:
        """Whom the ranks wait for, where some wait for others."""
        late = [rank for rank in self._ranks if rank.proposed is None]
        return self._listed(late) if 0 < len(late) < len(self._ranks) else ""

    async def _speaks_again(self, rank: Rank) -> None:
        rank.silent = False
        if not any(other.silent for other in self._ranks):
            await self._scheduler.send(WorkerSilent(0.0))

    async def _report_silence(self, seconds: float) -> None:
        silent = [rank for rank in self._ranks if rank.silent]
        whom = "the device" if len(self._ranks) == 1 else self._listed(silent)
        cause = f"no word from {whom} for {seconds:.0f} s"
        log.warning("%s", cause)
        await self._scheduler.send(WorkerSilent(seconds, cause))

    # ── the end ──────────────────────────────────────────────────────────────────────────────

    async def _why(self) -> str:
        """The cause of the end. A rank that lost a peer says so within moments: so one that ended without a word, as by
        a signal, comes before those that had words; of these the first."""
        if self._cause:
            return self._cause
        first = next((rank for rank in self._gone if rank.last_words is None), self._gone[0])
        for rank in self._gone:
            if rank is not first and rank.last_words not in (None, first.last_words):
                log.info("%safter that: %s", self._named(rank), rank.last_words)
        if first.details:
            log.error("%sit ended by an exception\n%s", self._named(first), first.details)
        cause = first.last_words if first.last_words is not None else await first.child.exit_cause()
        return f"{self._named(first)}{cause}"

    def _named(self, rank: Rank) -> str:
        return "" if len(self._ranks) == 1 else f"rank {rank.number} of {len(self._ranks)}{rank.child.place}: "

    def _listed(self, ranks: Sequence[Rank]) -> str:
        numbers = ", ".join(f"{rank.number}{rank.child.place}" for rank in ranks)
        return f"rank{'s' if len(ranks) > 1 else ''} {numbers} of {len(self._ranks)}"


async def _attempt(frames: Frames[Any], frame: bytes) -> None:
    """Send; a peer that is gone is seen where its frames end."""
    try:
        await frames.send_packed(frame)
    except anyio.BrokenResourceError:
        return


def least_of(ranks: Sequence[WorkerReady]) -> WorkerReady:
    """What a group of ranks can do: what each of them can. A phase took as long as on the slowest rank, and a token's
    keys and values take memory on each rank of a copy of attention."""
    names = dict.fromkeys(name for ready in ranks for name in ready.phases)
    phases = {name: max(ready.phases.get(name, 0.0) for ready in ranks) for name in names}
    fewest: Mapping[str, int] = {
        name: min(getattr(ready, name) for ready in ranks)
        for name in ("pages", "slots", "max_step_tokens", "max_model_len", "host_pages")
    }
    return msgspec.structs.replace(
        ranks[0],
        **fewest,
        kv_bytes_per_token=sum(ready.kv_bytes_per_token for ready in ranks) // ranks[0].copies,
        phases=phases,
        recurrent=any(ready.recurrent for ready in ranks),
        state_pages=state_pages_of(ranks),
        modules=tuple(dict.fromkeys(name for ready in ranks for name in ready.modules)),
        device=ranks[0].device if len(ranks) == 1 else f"{len(ranks)} × {ranks[0].device}",
    )


def state_pages_of(ranks: Sequence[WorkerReady]) -> int:
    """Pages for a copy of a request's states: as many as any rank needs. 0 if one has states and no pages."""
    if any(ready.recurrent and not ready.state_pages for ready in ranks):
        return 0
    return max(ready.state_pages for ready in ranks)


def unlike(ranks: Sequence[WorkerReady]) -> str:
    """Why ranks cannot be one group, if they cannot: they have started different models."""
    for name in ("vocab_size", "page_size", "embedding_size"):
        for number, ready in enumerate(ranks):
            if getattr(ready, name) != getattr(ranks[0], name):
                what = name.replace("_", " ")
                return (
                    f"rank {number} has a {what} of {getattr(ready, name)} and rank 0 one of "
                    f"{getattr(ranks[0], name)}; start all ranks with the same model, version and options"
                )
    return ""
