"""The scheduler actor: keeps the device ahead by a step or more, whatever else arrives.

All decisions are `engine.sched`'s; this file holds the loop, the credits, the way of grammars and the heartbeat.
While step n+1 runs, StepDone(n) arrives, is committed, and n+2 is planned and sent: the device never waits for the
host. Paused, it plans nothing; what is in flight ends, and only then is the Pause answered.
"""

import logging
import time
from array import array
from typing import Literal

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream

from engine.config import Config
from engine.errors import RequestError
from engine.messages import ToExecutor, ToFront, ToScheduler
from engine.messages.assets import Compile, Compiled, GrammarLoaded
from engine.messages.control import (
    CountExperts,
    ExpertCounts,
    Fatal,
    Flush,
    Flushed,
    Pause,
    Paused,
    Profile,
    Profiled,
    Reset,
    Stats,
    WorkerLost,
    WorkerReady,
    WorkerSilent,
)
from engine.messages.reply import Failed, Finish, Tokens
from engine.messages.request import Abort, Admit, StopHit
from engine.messages.step import STEPS_IN_FLIGHT, StepDone
from engine.plugin.specs import Policy
from engine.runtime.channel import Outbox, received
from engine.sched import Scheduler
from engine.sched.shelf import Shelf

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
        inbox: MemoryObjectReceiveStream[ToScheduler],
        executor: Outbox[ToExecutor],
        compiler: Outbox[Compile],
        front: Outbox[ToFront],
    ) -> None:
        self.config = config
        self.policy = policy
        self.inbox = inbox
        self.executor = executor
        self.compiler = compiler
        self.front = front
        self.scheduler: Scheduler | None = None
        self.shelf: Shelf | None = None
        self.worker: Literal["starting", "ready", "restarting", "stalled", "failed"] = "starting"
        self.cause = ""
        self.in_flight = 0
        self.credits = STEPS_IN_FLIGHT - 1
        self.paused = False
        self._pauses: list[Pause] = []  # not answered yet
        self._asked: dict[int, type[Profiled | ExpertCounts]] = {}  # by its number, what the worker is still to answer
        self.step_seconds = array("f")
        self.compile_seconds = array("f")
        self.idle_seconds = 0.0
        self.restarts = 0
        self.restart_seconds = 0.0  # of the last one
        self._lost_at = 0.0  # when the worker died that is being replaced
        self._checked = True

    async def run(self) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._heartbeat)
            async for first in self.inbox:
                for message in received(self.inbox, first):
                    await self._handle(message)
                await self._fill_credits()
            group.cancel_scope.cancel()

    async def _fill_credits(self) -> None:
        scheduler = self.scheduler
        if scheduler is None or self.paused or self.worker not in RUNNING:
            return
        while self.in_flight < self.credits and (plan := scheduler.plan(time.monotonic())) is not None:
            self.in_flight += 1
            self._checked = False
            await self.executor.send(plan)

    async def _handle(self, message: ToScheduler) -> None:
        match message:
            case StepDone():
                await self._commit(message)
            case Admit():
                await self._admit(message)
            case Abort():
                await self._abort(message.rid)
            case Compiled():
                await self._compiled(message)
            case GrammarLoaded():
                await self._loaded(message)
            case StopHit():
                if self.scheduler:
                    self.scheduler.stop(message.rid, message.keep)
            case Flush():
                freed, in_use = self.scheduler.flush() if self.scheduler else (0, 0)
                await self.front.send(Flushed(message.number, freed, in_use))
            case Pause():
                self.paused = message.paused
                self._pauses.append(message)
                await self._answer_pauses()
            case Profile():
                await self._ask_worker(message, Profiled)
            case CountExperts():
                await self._ask_worker(message, ExpertCounts)
            case Profiled() | ExpertCounts():
                del self._asked[message.number]
                await self.front.send(message)
            case WorkerReady():
                await self._ready(message)
            case WorkerLost():
                await self._lost(message.cause)
            case WorkerSilent():
                self.worker = "stalled" if message.seconds else "ready"
                self.cause = f"no word from the device for {message.seconds:.0f} s" if message.seconds else ""
                await self._send_stats()
            case Fatal():
                self.worker, self.cause = "failed", message.cause
                await self._send_stats()
                await self.front.send(message)

    async def _commit(self, done: StepDone) -> None:
        assert self.scheduler is not None
        self.in_flight -= 1
        self.step_seconds.append(done.seconds)
        self.credits = STEPS_IN_FLIGHT - (done.seconds >= SHORT_STEP_SECONDS)
        self.idle_seconds += done.idle
        stuck = self.scheduler.stuck(done) if done.stuck else []
        tokens = self.scheduler.commit(done, time.monotonic())
        for rid, cause in stuck:
            self.scheduler.stop(rid)
            await self.front.send(Failed(rid, 400, "no_token_left", cause, "grammar"))
        # The next plan leaves before the tokens do: the device comes first.
        await self._fill_credits()
        if tokens is not None:
            await self.front.send(tokens)
        if not self.in_flight:
            await self._send_stats()
            await self._answer_pauses()

    async def _answer_pauses(self) -> None:
        """Answer what waits for an answer, in order, unless the device is still to become idle."""
        if not self._pauses or (self.paused and self.in_flight):
            return
        pauses, self._pauses = self._pauses, []
        if self.scheduler and self.paused and any(pause.retract for pause in pauses):
            self.scheduler.retract_all()
        await self._send_stats()
        for pause in pauses:
            await self.front.send(Paused(pause.number, pause.paused))

    async def _ask_worker(self, message: Profile | CountExperts, answer: type[Profiled | ExpertCounts]) -> None:
        if self.worker not in RUNNING:
            cause = f"the device worker is {self.worker}, and answers nothing; ask again when /health says ready"
            await self.front.send(answer(message.number, cause=cause))
        else:
            self._asked[message.number] = answer
            await self.executor.send(message)

    async def _admit(self, message: Admit) -> None:
        assert self.scheduler is not None, "the front lets requests in only once the worker is ready"
        try:
            if message.grammar is None:
                self.scheduler.admit(message)
            else:
                await self._admit_with_grammar(message)
        except RequestError as error:
            await self._refuse(message.rid, error)

    async def _refuse(self, rid: str, error: RequestError) -> None:
        await self.front.send(Failed.of(rid, error))

    async def _abort(self, rid: str) -> None:
        if self.scheduler is None or self.shelf is None:
            return
        if self.shelf.abort(rid):
            no_tokens = array("i", [0]).tobytes()
            tokens = Tokens(step=0, rids=[rid], counts=no_tokens, tokens=b"", finishes=(Finish(0, "abort"),))
            await self.front.send(tokens)
        elif tokens_of_it := self.scheduler.abort(rid):
            await self.front.send(tokens_of_it)

    # ── grammars ─────────────────────────────────────────────────────────────────────────────

    async def _admit_with_grammar(self, message: Admit) -> None:
        """Queue a request whose grammar the device has; let others wait for theirs."""
        assert self.scheduler is not None and self.shelf is not None
        if number := self.shelf.number(message):
            self.scheduler.admit(message, number)
        elif compile := self.shelf.wait(message):
            await self.compiler.send(compile)

    async def _compiled(self, message: Compiled) -> None:
        assert self.scheduler is not None and self.shelf is not None
        self.compile_seconds.append(message.seconds)
        load, waited, refusal = self.shelf.compiled(message)
        if load is not None and self.worker in RUNNING:  # one that starts gets all there are once it is ready
            await self.executor.send(load)
        for admit in waited:
            assert refusal is not None
            await self._refuse(admit.rid, refusal)
        await self._forget_grammars()
        await self._send_stats()

    async def _loaded(self, message: GrammarLoaded) -> None:
        assert self.scheduler is not None and self.shelf is not None
        waited, refusal = self.shelf.loaded(message)
        for admit in waited:
            try:
                if refusal is not None:
                    raise refusal
                self.scheduler.admit(admit, message.number)
            except RequestError as error:
                await self._refuse(admit.rid, error)
        await self._forget_grammars()

    async def _forget_grammars(self) -> None:
        assert self.scheduler is not None and self.shelf is not None
        for drop in self.shelf.evict(self.scheduler.grammars()):
            if self.worker in RUNNING:
                await self.executor.send(drop)

    async def _ready(self, ready: WorkerReady) -> None:
        if self.scheduler is None:
            schedule = self.config.schedule
            self.scheduler = Scheduler(
                pages=ready.pages,
                page_size=ready.page_size,
                slots=ready.slots,
                max_model_len=ready.max_model_len,
                max_step_tokens=ready.max_step_tokens,
                policy=self.policy,
                prefix_cache=self.config.cache.prefix_cache,
                max_waiting=schedule.max_waiting,
            )
            self.shelf = Shelf(self.config.grammar.grammar_cache, ready.vocab_size)
        assert self.shelf is not None
        for load in self.shelf.again():  # before any plan that needs them
            await self.executor.send(load)
        if self.worker == "restarting":
            self.restarts += 1
            self.restart_seconds = time.monotonic() - self._lost_at
            log.info("the device worker is back after %.1f s", self.restart_seconds)
        self.worker, self.cause = "ready", ""
        await self._send_stats()
        await self.front.send(ready)

    async def _lost(self, cause: str) -> None:
        """Everything on the device is gone: end what ran there, keep what waits, start afresh."""
        assert self.scheduler is not None and self.shelf is not None
        if self.worker != "restarting":  # else it is the one that was to take its place
            self._lost_at = time.monotonic()
        self.worker, self.cause = "restarting", cause
        self.in_flight = 0
        await self._send_stats()
        for rid in self.scheduler.reset():
            await self.front.send(Failed(rid, 503, "worker_lost", f"{LOST} (cause: {cause})"))
        waited, refusal = self.shelf.lost()
        for admit in waited:
            await self._refuse(admit.rid, refusal)
        await self._answer_pauses()
        asked, self._asked = self._asked, {}
        for number, answer in asked.items():
            said = f"the device worker was lost, and with it what it traced and counted: {cause}"
            await self.front.send(answer(number, cause=said))
        await self.executor.send(Reset())

    async def _heartbeat(self) -> None:
        while True:
            await self._send_stats()
            if self.scheduler is not None and not self.in_flight and not self._checked:
                self.scheduler.check_integrity()
                self._checked = True
            await anyio.sleep(HEARTBEAT_SECONDS)

    async def _send_stats(self) -> None:
        seconds, self.step_seconds = self.step_seconds.tobytes(), array("f")
        compiled, self.compile_seconds = self.compile_seconds.tobytes(), array("f")
        counts = self.scheduler.counts() if self.scheduler else {}
        if self.shelf is not None:
            counts["waiting"] += self.shelf.waiting
        stats = Stats(
            self.worker,
            self.cause,
            step_seconds=seconds,
            paused=self.paused,
            idle_seconds_total=self.idle_seconds,
            compile_seconds=compiled,
            restarts_total=self.restarts,
            restart_seconds=self.restart_seconds,
            **counts,
        )
        await self.front.send(stats)
