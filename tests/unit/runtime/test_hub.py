"""The hub: whose message is whose, what fronts ask each other, and a line whose front does not read."""

import socket
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest
from house import counted, open_house, prompt

from engine.errors import WorkerError
from engine.messages import ToFrontProcess
from engine.messages.control import Answer, Fatal, Stats, WorkerReady
from engine.messages.fronts import FrontLost, PeerAnswer, PeerAnswers, PeerAsk, PeerValue
from engine.messages.reply import Failed, Tokens
from engine.messages.request import Abort
from engine.runtime import hub as hub_module
from engine.runtime.channel import HEADER, frame_length, pack
from engine.runtime.hub import Hub, SocketLine
from engine.sched.fronts import front_of

pytestmark = pytest.mark.anyio
READY = WorkerReady(8, 4, 2, 64, 64, 257, 4, "none", "none", {})
DECODER = msgspec.msgpack.Decoder(ToFrontProcess)


class Line:
    """Remembers what a front is sent."""

    holds_back = False

    def __init__(self) -> None:
        self.said: list[Any] = []

    def put(self, frame: bytes) -> None:
        assert frame_length(frame) == len(frame) - HEADER
        self.said.append(DECODER.decode(frame[HEADER:]))

    async def room(self) -> None:
        raise AssertionError("nobody holds back")


class Scheduler:
    """Remembers what the hub passes on."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    async def send(self, item: Any) -> None:
        self.said.append(item)


def joined(count: int) -> tuple[Hub, Scheduler, list[Line]]:
    hub, scheduler, lines = Hub(count), Scheduler(), [Line() for _ in range(count)]
    hub.scheduler = scheduler
    for number, line in enumerate(lines):
        hub.join(number, line)
    return hub, scheduler, lines


def tokens(*rids: str) -> Tokens:
    return Tokens(1, list(rids), b"\1\0\0\0" * len(rids), b"\7\0\0\0" * len(rids))


async def test_what_is_of_a_front_goes_to_it_alone() -> None:
    hub, _, lines = joined(3)
    mine: list[Any] = [tokens("302", "2"), Failed("102", 400, "c", "m"), Answer(256 * 9 + 2, b"x")]
    for message in mine:
        await hub.send(message)
    await hub.send(tokens("1"))
    assert lines[2].said == mine
    assert lines[0].said == [] and lines[1].said == [tokens("1")]


async def test_what_is_of_all_goes_to_all_and_to_who_comes_later() -> None:
    hub, _, lines = joined(2)
    heard: list[Stats] = []
    hub.on_stats.append(heard.append)
    old, new = Stats("ready", steps=1), Stats("ready", steps=2)
    messages: list[Any] = [old, READY, new]
    for message in messages:
        await hub.send(message)
    assert lines[0].said == lines[1].said == [old, READY, new]
    assert heard == [old, new] and await hub.ready() == READY
    await hub.leave(1)
    hub.join(1, late := Line())
    assert late.said == [new, READY]


async def test_the_end_of_the_core_is_told_to_all_and_to_who_waits() -> None:
    hub, _, lines = joined(2)
    fatal = Fatal("worker", "no memory")
    causes = []

    async def wait() -> None:
        causes.append(await hub.failed())

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.lowlevel.checkpoint()
        await hub.send(fatal)
    assert causes == ["the worker cannot go on: no memory"] and lines[0].said == lines[1].said == [fatal]
    with pytest.raises(WorkerError, match="no memory"):
        await hub.ready()


async def test_what_a_front_says_goes_to_the_scheduler_and_its_death_ends_its_requests() -> None:
    hub, scheduler, lines = joined(2)
    await hub.take(1, Abort("101"))
    await hub.leave(1)
    await hub.leave(1)
    assert scheduler.said == [Abort("101"), FrontLost(1)]
    await hub.send(tokens("101"))  # nobody is there
    assert lines[1].said == []


async def test_a_question_goes_to_the_others_and_the_answers_come_back_in_order() -> None:
    hub, scheduler, lines = joined(4)
    ask = PeerAsk(1, 5, "Count", b"q")
    await hub.take(1, ask)
    assert [line.said for line in lines] == [[ask], [], [ask], [ask]]
    await hub.take(3, PeerAnswer(1, 5, b"three"))
    await hub.take(0, PeerAnswer(1, 5, b"zero"))
    assert lines[1].said == []
    await hub.take(2, PeerAnswer(1, 5, None))
    assert lines[1].said == [PeerAnswers(5, (PeerValue(0, b"zero"), PeerValue(3, b"three")))]
    await hub.take(2, PeerAnswer(1, 5, b"again"))
    assert len(lines[1].said) == 1 and scheduler.said == []


async def test_a_front_that_dies_or_is_alone_answers_no_question() -> None:
    hub, _, lines = joined(3)
    await hub.take(0, PeerAsk(0, 1, "Count", b""))
    await hub.take(2, PeerAnswer(0, 1, b"two"))
    await hub.leave(1)
    assert lines[0].said == [PeerAnswers(1, (PeerValue(2, b"two"),))]
    await hub.take(2, PeerAsk(2, 1, "Count", b""))
    await hub.leave(2)
    await hub.take(0, PeerAnswer(2, 1, b"late"))  # who asked is gone
    await hub.take(0, PeerAsk(0, 2, "Count", b""))
    assert lines[0].said[-1] == PeerAnswers(2, ())


async def test_a_front_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "ANSWER_SECONDS", 0.01)
    hub, _, lines = joined(3)
    await hub.take(0, PeerAsk(0, 1, "Count", b""))
    await hub.take(1, PeerAnswer(0, 1, b"one"))
    with anyio.fail_after(60):
        while not lines[0].said:
            await anyio.sleep(0.005)
    assert lines[0].said == [PeerAnswers(1, (PeerValue(1, b"one"),))]


async def test_the_scheduler_ends_what_a_lost_front_has_sent_wherever_it_is() -> None:
    """One waits in the queue, and one runs; the others go on to their end."""
    async with open_house(max_running=2) as house, anyio.create_task_group() as group:
        texts: dict[str, str] = {}
        begun = {rid: anyio.Event() for rid in "abcd"}

        async def one(rid: str, count: int) -> None:
            text = ""
            async for chunk in house.front.generate(prompt("a", rid=rid, max_tokens=count)):
                text += chunk.text
                begun[rid].set()
            texts[rid] = text

        await house.front.pause(True)
        for rid, count in (("a", 300), ("b", 300), ("c", 5), ("d", 5)):  # their keys are those of fronts 1, 2, 3, 4
            group.start_soon(one, rid, count)
        logic = house.scheduler.scheduler
        assert logic is not None
        with anyio.fail_after(60):
            while len(logic.live.by_rid) < 4:
                await anyio.sleep(0.002)
        fronts = {rid: front_of(house.front._open[rid].key) for rid in "abcd"}
        assert sorted(fronts.values()) == list(range(min(fronts.values()), min(fronts.values()) + 4))
        await house.front._scheduler.send(FrontLost(fronts["c"]))  # type: ignore[arg-type]
        await house.front.pause(False)
        await begun["a"].wait()
        await house.front._scheduler.send(FrontLost(fronts["a"]))  # type: ignore[arg-type]
        with anyio.fail_after(60):
            while len(texts) < 2:
                await anyio.sleep(0.002)
        assert texts == {"b": counted("a", 300), "d": counted("a", 5)}
        await house.settled()
        group.cancel_scope.cancel()


@pytest.fixture
def pair() -> Any:
    ours, theirs = socket.socketpair()
    for each in (ours, theirs):
        each.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


async def read_all(sock: socket.socket, count: int) -> bytes:
    data = b""
    with anyio.fail_after(60):
        while len(data) < count:
            try:
                data += sock.recv(1 << 16)
            except BlockingIOError:
                await anyio.lowlevel.checkpoint()
    return data


async def test_a_line_keeps_what_is_not_read_and_sends_it_whole_and_in_order(pair: Any) -> None:
    ours, theirs = pair
    line = SocketLine(ours)
    frames = [
        pack(msgspec.msgpack.Encoder(), tokens(*[f"{number}{row:04x}" for row in range(99)])) for number in range(400)
    ]
    for frame in frames:
        line.put(frame)
    whole = b"".join(frames)
    assert 0 < line.kept < len(whole)
    assert await read_all(theirs, len(whole)) == whole
    assert line.kept == 0 and not line.holds_back
    line.put(frames[0])
    assert theirs.recv(1 << 16) == frames[0]
    line.close()


async def test_the_core_waits_for_a_front_that_reads_and_not_for_one_that_does_not(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "ENOUGH", 1 << 16)
    monkeypatch.setattr(hub_module, "PATIENCE", 0.2)
    ours, theirs = pair
    hub = Hub(2)
    hub.join(1, line := SocketLine(ours))
    message = tokens(*[f"{row:04x}01" for row in range(5000)])
    while not line.holds_back:
        line.put(pack(msgspec.msgpack.Encoder(), message))
    sent = anyio.Event()

    async def send() -> None:
        await hub.send(message)
        sent.set()

    async with anyio.create_task_group() as group:
        group.start_soon(send)
        await anyio.lowlevel.checkpoint()
        assert not sent.is_set()
        with anyio.fail_after(60):
            while not sent.is_set():
                theirs.recv(1 << 20)
                await anyio.sleep(0.001)
    while not line.holds_back:
        line.put(pack(msgspec.msgpack.Encoder(), message))
    with anyio.fail_after(60):  # it reads nothing from here on
        for _ in range(50):
            await hub.send(message)
    assert line.kept > 50 * 5000
    line.close()
    assert line.kept == 0


async def test_a_line_whose_front_is_gone_takes_what_it_gets(pair: Any) -> None:
    ours, theirs = pair
    line = SocketLine(ours)
    theirs.close()
    line.put(bytes(b"\0" * 100))
    line.put(bytes(b"\0" * 100))
    assert line.kept == 0 and not line.holds_back
