"""What requests bring along again crosses to the core once, and the scheduler sees each request whole."""

import socket
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.actors.tokenizer import UNSAMPLED
from engine.config import Config
from engine.messages.assets import Need
from engine.messages.control import Boot
from engine.messages.request import Abort, Admit
from engine.runtime import core, repeats
from engine.runtime.channel import Frames
from engine.runtime.core import CoreLink
from engine.runtime.front_process import HubLink
from engine.runtime.fronts import FrontProcesses, Life
from engine.runtime.hub import Hub
from engine.runtime.repeats import Restored, Spared

pytestmark = pytest.mark.anyio
SIZE = 20_000  # bytes of a picture


def admit(rid: str, *shown: int, grammar: bool = False) -> Admit:
    """A request that shows pictures by number."""
    needs = [Need("media", b"%d" % each, rid.encode(), b"%d" % each * SIZE) for each in shown]
    return Admit(rid, b"", UNSAMPLED, (), 1, needs=(*needs, *[Need("grammar", b"g")] * grammar))


ASKED: list[Any] = [
    admit("a", 1, 2),
    Abort("a"),
    admit("b", 2, 1, grammar=True),
    admit("c"),
    admit("d", 2, 3),
    admit("e", 2),
]


def brought(message: Any) -> list[int]:
    return [len(need.payload) // SIZE for need in message.needs] if isinstance(message, Admit) else []


@given(st.lists(st.tuples(st.lists(st.integers(1, 5), max_size=4), st.booleans()), max_size=16), st.integers(0, 4))
def test_each_message_arrives_as_it_was(asked: list[tuple[list[int], bool]], most: int) -> None:
    messages = [admit(f"{at}", *shown, grammar=grammar) for at, (shown, grammar) in enumerate(asked)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats, "MOST", most * SIZE)
        spared, restored = Spared(), Restored()
        for message in messages:
            assert restored(spared(message)) == message
            assert len(restored._came) <= max(most, 4) and restored._came.keys() == restored._recent._sizes.keys()
            assert restored._recent._total == sum(map(len, restored._came.values()))


def test_what_requests_before_brought_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "MOST", 2 * SIZE)
    spared = Spared()
    assert [brought(spared(message)) for message in ASKED] == [[1, 1], [], [0, 0, 0], [], [0, 1], [0]]
    more = [admit("f", 3), admit("g", 1), admit("h", 3), admit("i", 2), admit("j", 1, 2, 3), admit("k", 1)]
    assert [brought(spared(message)) for message in more] == [[0], [1], [0], [1], [1, 0, 0], [0]]


def test_both_ends_count_alike_where_a_processor_knows_different_pixels_by_one_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(repeats, "MOST", 3)
    spared, restored = Spared(), Restored()
    got = []
    for content, payload in ((b"a", b"1"), (b"b", b"22"), (b"a", b"333"), (b"b", b"22"), (b"c", b"4"), (b"a", b"555")):
        asked = Admit("r", b"", UNSAMPLED, (), 1, needs=(Need("media", content, b"", payload),))
        got += [need.payload for need in restored(spared(asked)).needs]
        assert spared._recent._sizes == restored._recent._sizes
    assert got == [b"1", b"22", b"1", b"22", b"4", b"555"]


class Sent(Frames[Any]):
    """Counts the bytes of frames."""

    size = 0

    async def send_packed(self, frame: bytes) -> None:
        self.size += len(frame)
        await super().send_packed(frame)


class Scheduler:
    """Remembers what comes."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    async def send(self, item: Any) -> None:
        self.said.append(item)


async def frames() -> tuple[Sent, socket.socket]:
    ours, theirs = socket.socketpair()
    return Sent(await anyio.abc.UNIXSocketStream.from_socket(ours), None), theirs


async def test_a_core_of_its_own_is_sent_pictures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler()
    monkeypatch.setattr(core, "core_actors", lambda *_: ([], scheduler))
    monkeypatch.setattr(core, "set_up_logging", lambda *_: None)
    link = CoreLink(Config(), scheduler)
    link._frames, theirs = await frames()
    link._open.set()
    async with anyio.create_task_group() as group:
        group.start_soon(core._run, theirs.detach())
        await link._frames.send(Boot(Config()))
        for message in ASKED:
            await link.send(message)
        await link._frames.aclose()
    assert scheduler.said == ASKED
    assert isinstance(link._frames, Sent) and 3 * SIZE < link._frames.size < 4 * SIZE


async def test_each_life_of_a_front_sends_pictures_once() -> None:
    processes, hub, scheduler = object.__new__(FrontProcesses), Hub(1), Scheduler()
    processes._hub, hub.scheduler = hub, scheduler
    for _ in range(2):
        sent, theirs = await frames()
        received: Frames[Any] = Frames(await anyio.abc.UNIXSocketStream.from_socket(theirs), Admit | Abort)
        life, link = Life(None, None), HubLink(sent, None)  # type: ignore[arg-type]
        async with anyio.create_task_group() as group:
            for message in ASKED:
                group.start_soon(link.send, message)
            for _ in ASKED:
                await processes._take(0, life, await anext(aiter(received)))
        assert scheduler.said == ASKED and 3 * SIZE < sent.size < 4 * SIZE
        scheduler.said.clear()
        await sent.aclose()
        await received.aclose()
