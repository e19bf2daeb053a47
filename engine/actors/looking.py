"""Who looks at the scheduler: makes snapshots while somebody asks, and notes steps only for as long.

A snapshot costs the scheduler some of its time, however cheap it is. So each is given to all who ask within half a
second, and the next one comes no earlier than 500 times as long as the last one took: snapshots take a fifth of a
percent of the time at most. Steps are noted until nobody has asked for two seconds. Left out: what fronts know of
themselves.
"""

import time
from array import array
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from engine.messages.control import CopyStats
from engine.messages.looking import AssetsLook, ChannelLook, Snapshot, StepsLook
from engine.messages.step import StepDone, StepPlan
from engine.runtime.channel import Outbox, Sender
from engine.sched import Scheduler
from engine.sched.copies import Copies
from engine.sched.looking import look_at_cache, look_at_queue, look_at_rows, parts_of

LEAST_SECONDS = 0.45  # between two snapshots
SPARE = 500.0  # times the seconds of CPU time of a snapshot until the next one
WATCHED_SECONDS = 2.0  # for which steps are noted after a snapshot
STRIP = 240  # steps that are told

Worker = Literal["starting", "ready", "restarting", "stalled", "failed"]


def channels_to(makers: Mapping[str, Outbox[Any]]) -> list[ChannelLook]:
    """The fill of the channels to what makes things of each kind, where that is in this process."""
    return [ChannelLook(f"maker of {kind}", *inbox.fill) for kind, inbox in makers.items() if isinstance(inbox, Sender)]


class Looking:
    """The snapshots of one scheduler, and the steps between them. A store below the device may take so many bytes."""

    def __init__(self, store_bytes: int = 0) -> None:
        self._store_bytes = store_bytes
        self.watched = False
        self._number = 0
        self._packed = b""
        self._due = 0.0  # when the next may be made
        self._until = 0.0  # when nobody watches any more
        self._planned: dict[int, bytes] = {}  # the lengths of rows of steps in flight
        self._steps: deque[tuple[float, float, bytes]] = deque(maxlen=STRIP)
        self._last = 0

    def planned(self, plan: StepPlan) -> None:
        """Note a step that is sent, while it is watched."""
        self._planned[plan.step] = plan.lengths

    def done(self, done: StepDone, now: float) -> None:
        """Note its result at the time `now`; where nobody watches any more, forget all."""
        if (lengths := self._planned.pop(done.step, None)) is not None:  # else it was sent before anybody looked
            self._steps.append((done.seconds, done.idle, lengths))
            self._last = done.step
        if now > self._until:
            self.watched = False
            self._planned.clear()
            self._steps.clear()

    def last(self) -> bytes:
        """The last snapshot if it is young, else nothing. Who asks for it watches."""
        now = time.monotonic()
        self.watched, self._until = True, now + WATCHED_SECONDS
        return self._packed if now < self._due else b""

    def look(
        self,
        scheduler: Scheduler | Copies | None,
        worker: Worker,
        cause: str,
        *,
        paused: bool,
        channels: tuple[ChannelLook, ...],
        assets: Mapping[tuple[str, str], int],
        ceiling: float = 0.0,
    ) -> bytes:
        """A new Snapshot, packed."""
        now, began = time.monotonic(), time.thread_time()
        self._number += 1
        figures: dict[str, Any] = {} if scheduler is None else dict(scheduler.counts())
        copies: tuple[CopyStats, ...] = figures.pop("copies", ())
        counts = {name: value for name, value in figures.items() if isinstance(value, int)}
        parts = () if scheduler is None else parts_of(scheduler)
        pages, tree, tiers = look_at_cache(parts, self._store_bytes)
        made = Snapshot(
            self._number,
            time.monotonic() - now,
            worker,
            cause,
            paused,
            counts,
            copies,
            look_at_rows(parts),
            look_at_queue(parts),
            self._strip(),
            pages,
            tree,
            channels,
            tuple(AssetsLook(kind, state, count) for (kind, state), count in sorted(assets.items())),
            tiers,
            ceiling,
        )
        self._packed = msgspec.msgpack.encode(made)
        self._due = now + max(LEAST_SECONDS, SPARE * (time.thread_time() - began))
        return self._packed

    def _strip(self) -> StepsLook:
        seconds, idle, lengths = zip(*self._steps, strict=True) if self._steps else ((), (), ())
        sums = {each: sum(array("i", each)) for each in set(lengths)}  # many steps decode the same rows
        rows, tokens = [len(each) // 4 for each in lengths], [sums[each] for each in lengths]
        floats = [array("f", column).tobytes() for column in (seconds, idle)]
        return StepsLook(self._last, *floats, *(array("i", column).tobytes() for column in (rows, tokens)))
