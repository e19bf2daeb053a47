"""The scheduler decides and sends in one order, also where what it sends has to wait."""

from array import array
from collections.abc import Mapping

import anyio
import pytest
from msgspec.structs import replace

from engine.actors import opening
from engine.actors import scheduler as actors
from engine.actors.deadlines import Deadlines
from engine.actors.opening import Maker, checks
from engine.actors.scheduler import SchedulerActor
from engine.cache import keeping
from engine.config import resolve
from engine.messages import ToExecutor, ToScheduler
from engine.messages.assets import Made, Need
from engine.messages.control import WorkerReady
from engine.messages.fronts import FrontLost
from engine.messages.request import Abort, Admit
from engine.messages.step import StepDone, StepPlan
from engine.messages.tiers import Move, Moved
from engine.params.sampling import Sampling
from engine.plugin.registry import Plugins
from engine.runtime.channel import Outbox, channel, open_channel
from engine.sched import moves
from engine.sched.looking import parts_of
from engine.sched.policies import make_policy

pytestmark = pytest.mark.anyio

NO_MAKERS: Mapping[str, Maker] = {}
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


async def started(
    to_executor: Outbox[ToExecutor], *, makers: Mapping[str, Maker] = NO_MAKERS, **options: str
) -> tuple[SchedulerActor, Outbox[ToScheduler]]:
    """A scheduler whose worker is ready and has tiers, not running yet, and what leads to it."""
    config = resolve({"model": "echo", "page_size": 4, **options})
    (to_scheduler, inbox), (front, _) = open_channel(), open_channel()
    actor = SchedulerActor(
        config, make_policy(Plugins.load(()), "fcfs"), inbox, executor=to_executor, makers=makers, front=front
    )
    await to_scheduler.send(
        WorkerReady(512, 4, 16, 4096, 2048, 257, 4, "none", "none", {}, host_pages=256, stores=True)
    )
    return actor, to_scheduler


def admit(number: int, length: int = 300) -> Admit:
    return Admit(f"r{number}", array("i", [number] * length).tobytes(), GREEDY, (), 1)


async def test_a_store_that_is_given_up_on_does_not_overtake_what_waits_to_be_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A heartbeat lets those run who have waited long. Its plan leaves after the moves that were due before it."""
    monkeypatch.setattr(moves, "FETCH_SECONDS", 0.0)
    monkeypatch.setattr(actors, "HEARTBEAT_SECONDS", 0.01)
    to_executor, executor = channel(1)
    actor, to_scheduler = await started(to_executor)
    for number in range(4):
        await to_scheduler.send(admit(number))
    async with anyio.create_task_group() as group:
        group.start_soon(actor.run)
        with anyio.fail_after(60):
            while len(executor) < 1 or actor._wanted:
                await anyio.sleep(0.01)
            await anyio.sleep(0.1)  # for some heartbeats
            sent = []
            while not (sent and isinstance(sent[-1], StepPlan)):
                sent.append(await executor.receive())
        group.cancel_scope.cancel()
    found = [(each.way, each.count) for each in sent if isinstance(each, Move)]
    assert found == [("find", 0), *[("find", 299 // 4)] * 4]  # what the store holds, and what each request lacks


OPAQUE = Need("opaque", b"that cannot be made")  # the first number that is given is its
ENDS = {
    "aborted": Abort("r201"),
    "front lost": FrontLost(1),
    "refused": Made("opaque", 1, 0.0, status=400, cause="it cannot be made"),
}


@pytest.mark.parametrize("end", ENDS)
async def test_nothing_more_is_fetched_for_a_request_that_has_ended(end: str) -> None:
    to_executor, executor = open_channel()
    made, _ = open_channel()
    actor, to_scheduler = await started(to_executor, makers={"opaque": Maker(made, kept=1)})
    needs = (OPAQUE,) if end == "refused" else ()
    await to_scheduler.send(replace(admit(1, 1000), rid="r201", needs=needs))
    fetches: list[Move] = []
    async with anyio.create_task_group() as group:
        group.start_soon(actor.run)
        with anyio.fail_after(10):
            while len(fetches) < 3:
                match await executor.receive():
                    case Move(way="fetch") as move:
                        fetches.append(move)
                    case Move() as move:
                        await to_scheduler.send(Moved(move.number, b"\1" * move.count))
            assert actor.scheduler is not None
            tiers = parts_of(actor.scheduler)[0].tiers
            assert tiers is not None and tiers.fetching.later
            await to_scheduler.send(ENDS[end])
            for move in fetches:
                await to_scheduler.send(Moved(move.number, b"\1" * move.count))
            await to_scheduler.send(admit(2, 10))
            sent = []
            while not (sent and isinstance(sent[-1], StepPlan)):
                sent.append(await executor.receive())
        group.cancel_scope.cancel()
    assert len(sent) == 1 and not tiers.fetching.later


async def test_a_heartbeat_offers_a_store_again_what_it_has_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks for anything meanwhile."""
    monkeypatch.setattr(keeping, "LEAST_PAUSE", 0.05)
    monkeypatch.setattr(actors, "HEARTBEAT_SECONDS", 0.01)
    to_executor, executor = open_channel()
    actor, to_scheduler = await started(to_executor)
    await to_scheduler.send(admit(1, 100))
    offers: list[int] = []
    async with anyio.create_task_group() as group:
        group.start_soon(actor.run)
        with anyio.fail_after(10):
            while len(offers) < 3:
                match await executor.receive():
                    case StepPlan(step=step):
                        await to_scheduler.send(StepDone(step, *(array("i", [1]).tobytes() for _ in range(2)), 0.01))
                    case Move(way="keep") as move:
                        offers.append(move.count)
                        await to_scheduler.send(Moved(move.number, bytes([len(offers) > 2] * move.count)))
                    case Move(way=way) as move:
                        await to_scheduler.send(Moved(move.number, bytes([way == "down"] * move.count)))
        group.cancel_scope.cancel()
    assert offers == [25, 25, 25]


async def test_who_hears_a_heartbeat_finds_a_scheduler_that_is_not_busy_checking_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check goes through all pages, of the host too: who asks as soon as there are figures must not wait for it."""
    monkeypatch.setattr(actors, "HEARTBEAT_SECONDS", 0.01)
    actor, _ = await started(open_channel()[0])
    told: list[str] = []

    async def send_stats() -> None:
        told.append("stats")

    async with anyio.create_task_group() as group:
        group.start_soon(actor.run)
        with anyio.fail_after(10):
            while actor.scheduler is None:
                await anyio.sleep(0.01)
            monkeypatch.setattr(actor.room, "check_integrity", lambda: told.append("checked"))
            monkeypatch.setattr(actor, "_send_stats", send_stats)
            del told[:]
            actor._checked = False
            while len(told) < 2:
                await anyio.sleep(0.01)
        group.cancel_scope.cancel()
    assert told[:2] == ["checked", "stats"]


async def test_an_idle_scheduler_does_not_go_through_many_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A request that comes meanwhile would wait, the longer the more pages there are, below the device too."""
    monkeypatch.setattr(actors, "HEARTBEAT_SECONDS", 0.001)
    monkeypatch.setattr(opening, "MOST_CHECKED", 512 + 255)
    actor, _ = await started(open_channel()[0])
    async with anyio.create_task_group() as group:
        group.start_soon(actor.run)
        with anyio.fail_after(10):
            while actor.scheduler is None:
                await anyio.sleep(0.01)
            actor._checked = False
            monkeypatch.setattr(actor.scheduler, "check_integrity", group.cancel_scope.cancel)
            await anyio.sleep(0.05)
        assert not group.cancel_scope.cancel_called and not actor._checked
        ready = WorkerReady(512, 4, 16, 4096, 2048, 257, 4, "none", "none", {}, host_pages=256)
        assert checks(ready, resolve({"model": "echo", "check_integrity": "true"}))
        monkeypatch.setattr(opening, "MOST_CHECKED", 512 + 256)
        assert checks(ready, actor.config) and not checks(replace(ready, copies=2), actor.config)
        group.cancel_scope.cancel()


async def test_the_first_deadline_that_passes_is_told_of_and_a_sooner_one_wakes_who_sleeps() -> None:
    deadlines, passed = Deadlines(), list[int]()

    async def tell() -> None:
        while len(passed) < 2:
            passed.extend(await deadlines.passed())

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(tell)
            deadlines.set(1, 3600.0)
            deadlines.set(2, 3600.0)
            await anyio.sleep(0.01)
            deadlines.shorten([(2, 0.0), (3, 0.0)])  # nobody waits for the last
            while not passed:
                await anyio.sleep(0.01)
            deadlines.shorten([(1, 7200.0)])
            deadlines.set(4, 0.0)
    assert passed == [2, 4] and len(deadlines) == 1


async def test_who_lacks_no_page_runs_in_the_next_step_also_if_one_ends_at_that_moment() -> None:
    to_executor, executor = open_channel()
    actor, to_scheduler = await started(to_executor)
    first, second = (replace(admit(1), rid=rid, max_new=50) for rid in ("first", "second"))
    await to_scheduler.send(first)
    plans: list[StepPlan] = []

    async def planned() -> StepPlan:
        while True:
            match await executor.receive():
                case StepPlan() as plan:
                    return plan
                case Move() as move:  # a store has nothing, and gets all
                    await to_scheduler.send(Moved(move.number, bytes([move.way != "find"] * move.count)))

    async with anyio.create_task_group() as group:
        group.start_soon(actor.run)
        with anyio.fail_after(10):
            plans = [await planned() for _ in range(2)]
            await to_scheduler.send(second)  # whose pages the device has
            await to_scheduler.send(
                StepDone(plans[0].step, *(array("i", [1]).tobytes() for _ in range(2)), seconds=0.01)
            )
            plans.append(await planned())
        group.cancel_scope.cancel()
    assert [len(plan.admits) for plan in plans] == [1, 0, 1]
