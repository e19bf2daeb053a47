"""Channels: any message crosses a socket whole, however the bytes are cut, blocking or not."""

import socket
import sys
import threading
from array import array

import anyio
import anyio.abc
import msgspec
import pytest

from engine import messages
from engine.config import Config
from engine.conversation.parts import said
from engine.messages.base import Message
from engine.messages.control import Boot, Stats, WorkerReady
from engine.messages.reply import Failed, Finish, Tokens
from engine.messages.request import Abort, Admit, Generate
from engine.messages.step import SlotAdmit, StepDone, StepPlan
from engine.params.sampling import Sampling, SamplingParams
from engine.runtime.channel import AT_ONCE, BlockingFrames, Frames, channel, open_channel, pack, received

IDS = array("i", [1, -2, 1 << 30]).tobytes()
SAMPLING = Sampling(0.7, 40, 0.9, 0.05, 1 << 62)
EXAMPLES: list[Message] = [
    Generate(
        "r",
        SamplingParams(stop=("é", "\n\n")),
        messages=[said("user", "hi")],
        priority=-1,
    ),
    Generate("r", SamplingParams(seed=-(1 << 63)), ids=IDS),
    Admit("r", IDS, SAMPLING, (2, 0), 17),
    StepPlan(7, IDS, IDS, IDS, IDS, (SlotAdmit(3, IDS, SAMPLING),), IDS, 1),
    StepDone(7, IDS, IDS, 0.25),
    Tokens(7, ["a", "b"], IDS, IDS, (Finish(1, "stop", 2), Finish(0, "length")), ((0, 128),)),
    Failed("a", 400, "code", "{field} is wrong", "field", {"at": 1}),
    Stats("restarting", "why", step_seconds=array("f", [0.5]).tobytes()),
    WorkerReady(10, 16, 4, 64, 160, 257, 8, "cpu", "torch", {"weights": 0.5}),
    Boot(Config()),
]
ANY = messages.ToTokenizer | messages.ToScheduler | messages.ToDetokenizer | messages.ToHttp | messages.ToWorker


def every_message() -> list[type[Message]]:
    found = [value for value in vars(messages).values() if isinstance(value, type) and issubclass(value, Message)]
    return [kind for kind in found if kind is not Message]


def test_every_message_has_its_own_tag() -> None:
    tags = [kind.__struct_config__.tag for kind in every_message()]
    assert len(tags) == len(set(tags)) > 15


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_survives_a_frame(message: Message) -> None:
    frame = pack(msgspec.msgpack.Encoder(), message)
    assert int.from_bytes(frame[:4], "little") == len(frame) - 4
    assert msgspec.msgpack.decode(frame[4:], type=type(message)) == message


@pytest.mark.anyio
async def test_frames_arrive_whole_from_any_cut_of_the_bytes() -> None:
    ours, theirs = socket.socketpair()
    wire = b"".join(bytes(pack(msgspec.msgpack.Encoder(), message)) for message in EXAMPLES)

    def dribble() -> None:
        for at in range(0, len(wire), 7):
            theirs.sendall(wire[at : at + 7])
        theirs.close()

    thread = threading.Thread(target=dribble)
    thread.start()
    frames: Frames[Message] = Frames(await anyio.abc.UNIXSocketStream.from_socket(ours), ANY)
    assert [message async for message in frames] == EXAMPLES
    await frames.aclose()
    thread.join()


@pytest.mark.anyio
async def test_frames_and_blocking_frames_understand_each_other() -> None:
    ours, theirs = socket.socketpair()
    blocking: BlockingFrames[Message] = BlockingFrames(theirs, ANY)

    def echo() -> None:
        while (message := blocking.receive()) is not None:
            blocking.send(message)
        theirs.close()

    thread = threading.Thread(target=echo)
    thread.start()
    frames: Frames[Message] = Frames(await anyio.abc.UNIXSocketStream.from_socket(ours), ANY)
    answers = aiter(frames)
    for message in [*EXAMPLES, Abort("x" * 1_000_000)]:
        await frames.send(message)
        assert await anext(answers) == message
    await frames.aclose()
    thread.join()


@pytest.mark.anyio
async def test_a_message_is_held_by_whoever_has_taken_it_and_nobody_else() -> None:
    """It may be a clip of 255 MiB, and the next one may come tomorrow."""
    ours, theirs = socket.socketpair()
    theirs.sendall(pack(msgspec.msgpack.Encoder(), Abort("x" * 1000)))
    frames: Frames[Abort] = Frames(await anyio.abc.UNIXSocketStream.from_socket(ours), Abort)
    async for message in frames:
        rid = message.rid
        del message
        assert sys.getrefcount(rid) == 2, "this function's, and that of the call"
        break
    await frames.aclose()
    theirs.close()


def test_waiting_tells_a_frame_from_silence_and_from_the_end() -> None:
    ours, theirs = socket.socketpair()
    blocking: BlockingFrames[Abort] = BlockingFrames(theirs, Abort)
    assert not blocking.waiting()
    ours.sendall(pack(msgspec.msgpack.Encoder(), Abort("a")))
    assert blocking.waiting()
    assert blocking.receive() == Abort("a")
    ours.close()
    assert blocking.waiting()
    assert blocking.receive() is None
    theirs.close()


def test_a_peer_that_speaks_another_protocol_is_refused() -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(b"GET / HTTP/1.1\r\n")
    with pytest.raises(ConnectionError, match="not our protocol"):
        BlockingFrames(theirs, Abort).receive()
    ours.close()
    theirs.close()


@pytest.mark.anyio
async def test_a_full_channel_makes_its_sender_wait() -> None:
    outbox, inbox = channel(1)
    await outbox.send(1)
    with anyio.move_on_after(0.02) as scope:
        await outbox.send(2)
    assert scope.cancelled_caught
    assert received(inbox, await inbox.receive()) == [1]


@pytest.mark.anyio
async def test_a_channel_keeps_order_and_loses_nothing_when_a_waiting_end_is_cancelled() -> None:
    outbox, inbox = channel(1)
    with anyio.move_on_after(0) as scope:
        await inbox.receive()
    assert scope.cancelled_caught
    taken: list[int] = []

    async def send(first: int) -> None:
        for number in range(first, first + 40):
            await outbox.send(number)

    async with anyio.create_task_group() as group:
        group.start_soon(send, 0)
        group.start_soon(send, 100)
        while len(taken) < 80:
            taken.append(await inbox.receive())
    assert [number for number in taken if number < 100] == list(range(40))
    assert [number for number in taken if number >= 100] == list(range(100, 140))
    with pytest.raises(anyio.WouldBlock):
        inbox.receive_nowait()


@pytest.mark.anyio
async def test_a_receiver_with_much_to_take_lets_others_have_their_turn() -> None:
    outbox, inbox = open_channel()
    for number in range(100):
        outbox.send_nowait(number)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(other)
        for number in range(100):
            assert await inbox.receive() == number
        assert turns >= 100 // AT_ONCE - 1
        group.cancel_scope.cancel()
