"""A flush is answered once a store below the device has forgotten what it had, or says that it cannot."""

import anyio
import msgspec
import pytest
from test_turns import started

from engine.actors import flushing
from engine.actors import scheduler as actors
from engine.messages import ToExecutor
from engine.messages.control import Answer, Flush, Flushed, Reset, WorkerLost
from engine.messages.tiers import Move, Moved
from engine.runtime.channel import Receiver, open_channel

pytestmark = pytest.mark.anyio


async def cleared(executor: Receiver[ToExecutor]) -> int:
    """The number of the next move that clears a store."""
    while True:
        match await executor.receive():
            case Move(way="clear") as move:
                return move.number


async def test_a_flush_before_the_store_is_open_is_refused_and_done_later() -> None:
    to_executor, executor = open_channel()
    actor, to_scheduler = await started(to_executor, kv_disk="/kv:1GiB")
    (to_front, front), inbox = open_channel(), actor.inbox
    actor.front = actor._flushes._front = to_front
    ready = await inbox.receive()
    async with anyio.create_task_group() as group:
        group.start_soon(actor.run)
        with anyio.fail_after(20):
            for message in (Flush(7), ready):
                await to_scheduler.send(message)
            assert await cleared(executor)
            while not isinstance(answer := await front.receive(), Answer):
                pass
        group.cancel_scope.cancel()
    told = msgspec.msgpack.decode(answer.value, type=Flushed)
    assert told == Flushed(0, 0, "the device worker, which opens it, is starting")


@pytest.mark.parametrize("refusal", ["", "read-only", "lost", "silent"])
async def test_a_flush_waits_for_the_store(monkeypatch: pytest.MonkeyPatch, refusal: str) -> None:
    monkeypatch.setattr(actors, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(flushing, "PATIENCE_SECONDS", 0.0 if refusal == "silent" else 60.0)
    to_executor, executor = open_channel()
    actor, to_scheduler = await started(to_executor)
    to_front, front = open_channel()
    actor.front = actor._flushes._front = to_front
    told: list[Flushed] = []
    async with anyio.create_task_group() as group:
        group.start_soon(actor.run)
        with anyio.fail_after(20):
            await to_scheduler.send(Flush(7))
            number = await cleared(executor)
            if refusal == "lost":  # the next worker is told as well
                await to_scheduler.send(WorkerLost("killed"))
                while not isinstance(await executor.receive(), Reset):
                    pass
                assert actor._flushes.waiting
                actor.worker = "ready"
                number = await cleared(executor)
            if refusal != "silent":
                assert actor._flushes.waiting
                await to_scheduler.send(Moved(number, bytes([refusal != "read-only"]), cause=refusal))
            while not told:
                match await front.receive():
                    case Answer(number=7, value=value):
                        told.append(msgspec.msgpack.decode(value, type=Flushed))
        group.cancel_scope.cancel()
    silent = "it has not answered within 0 s"
    assert told == [Flushed(0, 0, {"lost": "", "silent": silent}.get(refusal, refusal))]
    assert not actor._flushes.waiting
