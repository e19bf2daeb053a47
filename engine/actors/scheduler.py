"""The scheduler actor: keeps the device ahead by a step or more, whatever else arrives.

All decisions are `engine.sched`'s; this file holds the loop, the credits and the heartbeat.
What requests need on the device is passed between the waiting room, its makers and the executor, whatever it is.
While step n+1 runs, StepDone(n) arrives, is committed, and n+2 is planned and sent: the device never waits for the
host. Paused, it plans nothing; what is in flight ends, and only then is the Pause answered.
"""

import logging
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import anyio
import msgspec

from engine.actors.deadlines import Deadlines
from engine.actors.flushing import Flushes
from engine.actors.following import Followers
from engine.actors.looking import Looking, channels_to
from engine.actors.opening import Maker, checks, room_for, scheduler_for
from engine.cache.pins import Holder
from engine.config import Config
from engine.errors import RequestError
from engine.messages import ToExecutor, ToFront, ToScheduler
from engine.messages.assets import Loaded, Made, Need
from engine.messages.cache import FollowCache
from engine.messages.control import (
    Answer,
    Ask,
    Fatal,
    Flush,
    Pause,
    Reset,
    Stats,
    TierStats,
    WorkerLost,
    WorkerReady,
    WorkerSilent,
)
from engine.messages.fronts import FrontLost
from engine.messages.looking import ChannelLook, Look
from engine.messages.reply import Failed, Tokens
from engine.messages.request import Abort, Admit, EndPrograms, StopHit
from engine.messages.sessions import EndSession, ListSessions
from engine.messages.step import StepDone, steps_in_flight
from engine.messages.tiers import PAGES, Moved
from engine.plugin.specs import Policy
from engine.runtime.channel import Outbox, Receiver, received
from engine.runtime.tiers import tier_sizes
from engine.sched import Scheduler
from engine.sched.assets import Due
from engine.sched.copies import Copies
from engine.sched.fronts import front_of
from engine.sched.looking import parts_of
from engine.sched.moves import Moves, patience
from engine.sched.sessions import Sessions

log = logging.getLogger("engine.scheduler")

# Where a step takes no longer than a result's way here and a plan's way back, the plan after the next must be at the
# device already. One step in flight more costs a row that ends one more dropped token, and a new request a step's wait.
SHORT_STEP_SECONDS = 0.002
HEARTBEAT_SECONDS = 1.0
RUNNING = ("ready", "stalled")  # states of a worker that reads what it is sent
LOST = "the device worker stopped while this request was running, and is being restarted; send the request again"


class SchedulerActor:
    name = "scheduler"

    def __init__(
        self,
        config: Config,
        policy: Policy,
        inbox: Receiver[ToScheduler],
        *,
        executor: Outbox[ToExecutor],
        makers: Mapping[str, Maker],
        front: Outbox[ToFront],
        fronts: int = 1,
    ) -> None:
        self.config, self.policy = config, policy
        self.inbox, self.executor = inbox, executor
        self.makers = makers  # by the kind of need
        self.front, self.fronts = front, fronts  # so many `front` stands for
        self.scheduler: Scheduler | Copies | None = None
        self.room = room_for(makers, config)
        self.worker: Literal["starting", "ready", "restarting", "stalled", "failed"] = "starting"
        self.cause = ""
        self.in_flight, self.paused = 0, False
        self.most_credits = steps_in_flight(config.parallel.pp)
        self.credits = self.most_credits - 1
        self._pauses: list[Pause] = []  # not answered yet
        self._asked: set[int] = set()  # numbers of what the worker is still to answer
        self.followers = Followers(front) if config.cache.cache_events else None
        self.moves: Moves | None = None  # where there are tiers below the device
        self.tiers: TierStats | None = None  # their figures, as they were told last
        self._flushes = Flushes(front, self._send_stats, stores=config.cache.kv_disk is not None)
        self._wanted = Deadlines()  # of needs for pages
        self.looking = Looking(0 if (sizes := tier_sizes(config.cache)) is None else sizes.store)
        # Whose turn it is to plan and to send: plans and moves leave in the order in which they were made, also where
        # the executor has no room for the next one.
        self._turn = anyio.Lock(fast_acquire=True)
        self.step_seconds, self.idle_seconds = array("f"), 0.0
        self.make_seconds: dict[str, array[float]] = {}  # by kind
        self.restarts, self.restart_seconds, self._lost_at = 0, 0.0, 0.0  # the last one took, and when it began
        self._checks, self._checked = False, True  # whether all is checked when idle, and was since it changed

    async def run(self) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._heartbeat)
            group.start_soon(self._give_up_waiting)
            group.start_soon(self._give_up_flushing)
            async for first in self.inbox:
                async with self._turn:
                    for message in received(self.inbox, first):
                        await self._handle(message)
                    if self.room.grown:
                        await self._evict()
                    await self._fill_credits()
                    await self._send_moves()
                if self.followers is not None:
                    await self.followers.tell()
            group.cancel_scope.cancel()

    async def _fill_credits(self) -> None:
        """Let those go on who wait for no page any longer, and plan as far as the device may be ahead."""
        for number in () if self.moves is None else self.moves.settled():
            await self._pass_on(self.room.settle(number))
        scheduler = self.scheduler
        if scheduler is None or self.paused or self.worker not in RUNNING or self.room.reloading(scheduler.live.used):
            return
        while self.in_flight < self.credits and (plan := scheduler.plan(time.monotonic())) is not None:
            self.in_flight += 1
            self._checked = False
            if self.moves is not None:
                self.moves.cost.planned(plan)
                for move in self.moves.before():
                    await self.executor.send(move)
            if self.looking.watched:
                self.looking.planned(plan)
            await self.executor.send(plan)

    async def _send_moves(self, late: Sequence[int] = ()) -> None:
        """Send what comes after all plans; before, `late` needs wait for no page any longer."""
        if (moves := self.moves) is None:
            return
        if late:
            moves.give_up(*late)
            await self._fill_credits()
        self._wanted.shorten(moves.patience())
        if self.worker in RUNNING:
            for move in (*moves.before(), *moves.after()):
                self._checked = False
                await self.executor.send(move)
        if self._flushes.waiting:
            await self._flushes.answer(moves)

    async def _handle(self, message: ToScheduler) -> None:
        match message:
            case StepDone():
                await self._commit(message)
            case Admit():
                await self._admit(message)
            case Abort():
                await self._abort(message.rid)
            case FrontLost():
                self._abort_all_of(message.number)
            case Made():
                await self._made(message)
            case Loaded():
                await self._pass_on(self.room.loaded(message))
            case Moved():
                self._moved(message)
            case StopHit():
                if self.scheduler:
                    self.scheduler.stop(message.rid, message.keep)
            case EndPrograms():
                self._end_programs(message)
            case Flush():
                await self._flushes.begin(message, self.scheduler, self.moves)
            case ListSessions() | EndSession() | Look():
                await self.front.send(Answer(message.number, self._said(message)))
            case Pause():
                self.paused = message.paused
                self._pauses.append(message)
                await self._answer_pauses()
            case Ask():
                await self._ask_worker(message)
            case FollowCache():
                assert self.followers is not None, "the front refuses those who follow nothing"
                self.followers.add(message)
            case Answer():
                self._asked.remove(message.number)
                await self.front.send(message)
            case WorkerReady():
                await self._ready(message)
            case WorkerLost():
                await self._lost(message.cause)
            case WorkerSilent():
                self.worker = "stalled" if message.seconds else "ready"
                self.cause = message.cause
                await self._send_stats()
            case Fatal():
                self.worker, self.cause = "failed", message.cause
                await self._send_stats()
                await self.front.send(message)

    async def _admit(self, admit: Admit) -> None:
        """Let a request in. What a store may have of its prompt is a need as others are, but is waited for a while."""
        if self.moves is None or not self.moves.seeks(admit):
            return await self._pass_on(self.room.admit(admit))
        admit = self.moves.named(admit)
        due = self.room.admit(msgspec.structs.replace(admit, needs=(*admit.needs, Need(PAGES, admit.rid.encode()))))
        for make in [make for make in due.makes if make.kind == PAGES]:
            due.makes.remove(make)
            self._wanted.set(make.number, patience(admit))
            self.moves.want(make.number, admit)
        await self._pass_on(due)

    async def _made(self, made: Made) -> None:
        self.make_seconds.setdefault(made.kind, array("f")).append(made.seconds)
        await self._pass_on(self.room.made(made))
        await self._send_stats()

    def _moved(self, message: Moved) -> None:
        assert self.moves is not None, "a page moved, but there are no tiers"
        self._checked = False
        if cause := self.moves.moved(message):
            log.warning("pages of lower tiers are computed again, as here: %s; /metrics counts them", cause)

    def _end_programs(self, message: EndPrograms) -> None:
        if self.scheduler is not None:
            for id in message.programs:
                self.scheduler.end_program(Holder("program", message.owner, message.cache_salt.encode(), id))

    async def _commit(self, done: StepDone) -> None:
        assert self.scheduler is not None
        self.in_flight -= 1
        now = time.monotonic()
        self.step_seconds.append(done.seconds)
        if self.moves is not None:
            self.moves.cost.done(done.seconds)
        if self.looking.watched:
            self.looking.done(done, now)
        self.credits = self.most_credits - (done.seconds >= SHORT_STEP_SECONDS)
        self.idle_seconds += done.idle
        for failed in done.failed:
            await self._end_users(*failed)
        stuck = self.scheduler.stuck(done) if done.stuck else []
        replies = self.scheduler.commit_each(done, now)
        for rid, cause in stuck:
            self.scheduler.stop(rid)
            await self.front.send(Failed(rid, 400, "no_token_left", cause, "grammar"))
        # The next plan leaves before the tokens do: the device comes first.
        await self._fill_credits()
        for tokens in replies:
            await self.front.send(tokens)
        if not self.in_flight:
            await self._evict()  # of what was in use, there may be too much
            await self._send_stats()
            await self._answer_pauses()

    async def _end_users(self, copy: int, number: int, cause: str) -> None:
        """A copy of attention could not encode a medium: who runs there with it ends, and what was computed of it is in
        no cache. Whatever else is cached stays."""
        assert self.scheduler is not None
        scheduler = parts_of(self.scheduler)[copy]
        for rid in scheduler.encoder.users(number, scheduler.running_requests()):
            scheduler.stop(rid)
            await self.front.send(Failed(rid, 500, "media_failed", f"an image or video cannot be encoded: {cause}"))
        scheduler.places.spoiled(number)

    async def _answer_pauses(self) -> None:
        """Answer what waits for an answer, in order, unless the device is still to become idle."""
        if not self._pauses or (self.paused and self.in_flight):
            return
        pauses, self._pauses = self._pauses, []
        if self.scheduler and self.paused and any(pause.retract for pause in pauses):
            self.scheduler.retract_all()
        await self._send_stats()
        for pause in pauses:
            await self.front.send(Answer(pause.number))

    @property
    def _sessions(self) -> Sessions:
        """None live before there is a scheduler."""
        return Sessions() if self.scheduler is None else self.scheduler.live.sessions

    def _said(self, asked: ListSessions | EndSession | Look) -> bytes:
        """The answer to what can be answered at once, packed."""
        if not isinstance(asked, Look):
            return msgspec.msgpack.encode(self._sessions.answer(asked, time.monotonic()))
        if packed := self.looking.last():
            return packed
        own = ChannelLook("scheduler", len(self.inbox), self.inbox.capacity)
        ahead = ChannelLook("executor", self.in_flight, self.credits)
        makers = channels_to({kind: maker.inbox for kind, maker in self.makers.items()})
        about: dict[str, Any] = {"channels": (own, ahead, *makers), "assets": self.room.states()}
        about["ceiling"] = 0.0 if self.tiers is None else self.tiers.ceiling
        return self.looking.look(self.scheduler, self.worker, self.cause, paused=self.paused, **about)

    async def _ask_worker(self, message: Ask) -> None:
        if self.worker in RUNNING:
            self._asked.add(message.number)
            return await self.executor.send(message)
        cause = f"the device worker is {self.worker}, and answers nothing; ask again when /health says ready"
        await self.front.send(Answer(message.number, cause=cause))

    async def _pass_on(self, due: Due) -> None:
        """Send what is due in the waiting room to makers and device; queue and refuse requests."""
        assert self.scheduler is not None, "the front lets requests in only once the worker is ready"
        for make in due.makes:
            await self.makers[make.kind].inbox.send(make)
        for message in due.device:
            await self.executor.send(message)
        for admit, bound in due.ready:
            try:
                self.scheduler.admit(admit, bound)
            except RequestError as error:
                due.refused.append((admit.rid, error))
        self._leave(*[rid for rid, _ in due.refused])
        for rid, refusal in due.refused:
            await self.front.send(Failed.of(rid, refusal))

    async def _evict(self) -> None:
        assert self.scheduler is not None
        for drop in self.room.evict(self.scheduler.live.used()):
            for part in parts_of(self.scheduler):
                part.encoder.forget(drop.number)  # and the device with it: nobody asks for that number again
            await self.executor.send(drop)

    async def _abort(self, rid: str) -> None:
        if self.scheduler is None:
            return
        self._leave(rid)
        if self.room.abort(rid):
            await self.front.send(Tokens.aborted(rid))
        elif tokens_of_it := self.scheduler.abort(rid):
            await self.front.send(tokens_of_it)

    def _abort_all_of(self, front: int) -> None:
        """End what a front has sent that is gone: nobody is to be told."""
        if self.scheduler is None:
            return
        self._checked = False
        gone = [rid for rid in (*self.room.rids(), *self.scheduler.live.by_rid) if front_of(rid) == front]
        self._leave(*gone)
        for rid in gone:
            if not self.room.abort(rid):
                self.scheduler.stop(rid)

    def _leave(self, *rids: str) -> None:
        """Those requests have ended: nothing is fetched for them any more."""
        if self.moves is not None and rids:
            self.moves.leave(*rids)

    async def _ready(self, ready: WorkerReady) -> None:
        if self.scheduler is None:
            held = self.followers.held if self.followers is not None else None
            self.scheduler = scheduler_for(ready, self.config, self.policy, self.fronts, held)
            if ready.host_pages:
                self.moves = Moves(parts_of(self.scheduler))
            self._flushes.opened(self.scheduler)
            self._checks = checks(ready, self.config)
        for maker in self.makers.values():
            await maker.inbox.send(ready)
        await self._pass_on(self.room.started())
        if self.worker == "restarting":
            self.restarts += 1
            self.restart_seconds = time.monotonic() - self._lost_at
            log.info("the device worker is back after %.1f s", self.restart_seconds)
        self.worker, self.cause = "ready", ""
        await self._send_stats()
        await self.front.send(ready)

    async def _lost(self, cause: str) -> None:
        """Everything on the device is gone: end what ran there, keep what waits, start afresh."""
        assert self.scheduler is not None
        if self.worker != "restarting":  # else it is the one that was to take its place
            self._lost_at = time.monotonic()
        self.worker, self.cause = "restarting", cause
        self.in_flight = 0
        await self._send_stats()
        self._wanted.clear()
        if self.moves is not None:
            self.moves.lost()
        for rid in self.scheduler.reset():
            await self.front.send(Failed(rid, 503, "worker_lost", f"{LOST} (cause: {cause})"))
        await self._pass_on(self.room.lost())
        await self._answer_pauses()
        asked, self._asked = sorted(self._asked), set()
        for number in asked:
            said = f"the device worker was lost, and with it what it traced and counted: {cause}"
            await self.front.send(Answer(number, cause=said))
        await self.executor.send(Reset())

    async def _heartbeat(self) -> None:
        while True:
            if self._checks and self.scheduler is not None and not self.in_flight and not self._checked:
                self.scheduler.check_integrity()
                self.room.check_integrity()
                self._checked = True  # before anybody is told, who may ask for something then
            self._sessions.count(time.monotonic())
            await self._send_stats()
            if self.followers is not None:
                await self.followers.tell(all=True)
            if self.moves is not None and self.moves.tick(time.monotonic()):  # a store is offered again what it refused
                async with self._turn:
                    await self._send_moves()
            await anyio.sleep(HEARTBEAT_SECONDS)

    async def _give_up_waiting(self) -> None:
        """Who has waited long for a store computes."""
        while late := await self._wanted.passed():
            async with self._turn:
                await self._send_moves(late)

    async def _give_up_flushing(self) -> None:
        """Who has waited long for a store to forget is told so."""
        while late := await self._flushes.late():
            async with self._turn:
                assert self.moves is not None, "a flush waits for a store, but there are no tiers"
                await self._flushes.answer(self.moves, late)

    async def _send_stats(self) -> None:
        seconds, self.step_seconds = self.step_seconds.tobytes(), array("f")
        made, self.make_seconds = self.make_seconds, {}
        self.tiers = None if self.moves is None else self.moves.stats()
        counts = {} if self.scheduler is None else self.scheduler.counts()
        if counts:
            counts["waiting"] += self.room.waiting
        stats = Stats(
            self.worker,
            self.cause,
            step_seconds=seconds,
            paused=self.paused,
            idle_seconds_total=self.idle_seconds,
            make_seconds={kind: each.tobytes() for kind, each in made.items()},
            restarts_total=self.restarts,
            restart_seconds=self.restart_seconds,
            sessions=len(self._sessions),
            session_pages=self._sessions.pages,
            tiers=self.tiers,
            **counts,
        )
        await self.front.send(stats)
