"""`python -m engine.runtime.front_process FD`: one of several fronts, which has tokenizer, detokenizer and HTTP.

What it imports is imported while the supervisor (fronts.py) still makes sure that a start can work; then comes its
FrontBoot. It ends when the supervisor closes the way to the hub or is gone. It heeds no signal: a Ctrl-C in a terminal,
or the SIGTERM of a service manager to all processes, is for the supervisor, which lets replies come to their end first.
"""

import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator

import anyio
import anyio.abc

from engine.config import Config
from engine.errors import ConfigError, EngineError, PluginError
from engine.http.app import ROUTES
from engine.http.app import serve as serve_http
from engine.http.plugins import with_plugins
from engine.logs import set_up_logging
from engine.messages import FromFront, FromFrontProcess, ToFront, ToFrontProcess
from engine.messages.fronts import Drain, Drained, FrontBoot, Listening, PeerAnswers, PeerAsk, Refused
from engine.plugin.registry import Plugins
from engine.runtime.actor import Actor
from engine.runtime.allocator import give_back_large_blocks, keep_for_good
from engine.runtime.board import Board, Counter
from engine.runtime.channel import Frames, Outbox
from engine.runtime.front import Front, Place
from engine.runtime.launch import open_front
from engine.runtime.peers import Peers
from engine.runtime.repeats import Spared
from engine.sched.fronts import numbers_of

BEAT_SECONDS = 1.0


class Ended(EngineError):
    """The supervisor has ended this front, or is gone."""


class HubLink:
    """The way to the hub: an actor that passes on what comes from there, and an outbox to it."""

    name = "hub"

    def __init__(self, frames: Frames[ToFrontProcess], messages: AsyncIterator[ToFrontProcess]) -> None:
        self.front: Front | None = None  # once it serves
        self.peers: Peers | None = None
        self._frames = frames
        self._messages = messages
        self._to_front: Outbox[ToFront] | None = None
        self._spared = Spared()

    def core(self, config: Config, front: Outbox[ToFront]) -> tuple[list[Actor], Outbox[FromFront]]:
        """This link in the place of the actors of a core."""
        self._to_front = front
        return [self], self

    async def send(self, message: FromFrontProcess) -> None:
        """To the hub. If that is gone, `run` ends the process."""
        try:
            await self._frames.send(self._spared(message))
        except anyio.BrokenResourceError:
            await anyio.sleep_forever()

    async def run(self) -> None:
        """Pass on messages until there are no more, which Ended says."""
        assert self._to_front is not None and self.peers is not None
        async with anyio.create_task_group() as group:
            async for message in self._messages:
                match message:
                    case PeerAsk():
                        group.start_soon(self._answer, message)
                    case PeerAnswers():
                        self.peers.answered(message)
                    case Drain():
                        group.start_soon(self._drain, message.seconds)
                    case FrontBoot():
                        raise AssertionError("a front is booted once")
                    case _:
                        await self._to_front.send(message)
            group.cancel_scope.cancel()
        raise Ended("the supervisor has ended this front, or is gone")

    async def _answer(self, asked: PeerAsk) -> None:
        assert self.peers is not None
        await self.send(await self.peers.answer(asked))

    async def _drain(self, seconds: float) -> None:
        if self.front is not None:
            await self.front.drain(seconds)
        await self.send(Drained())


async def _serve(boot: FrontBoot, link: HubLink) -> None:
    config = boot.config
    board = Board(boot.board, boot.number, boot.count)
    link.peers = Peers(boot.number, boot.count, link, folder=boot.folder)
    place = Place(link.peers, board, numbers_of(boot.number, boot.life))
    sockets = [socket.socket(fileno=descriptor) for descriptor in boot.sockets]
    plugins = Plugins.load(config.model.plugins)
    routes = with_plugins(ROUTES, plugins)

    async def beat() -> None:
        while True:
            board.add(Counter.BEATS)
            await anyio.sleep(BEAT_SECONDS)

    async def say_listening(front: Front) -> None:
        await listening.wait()
        keep_for_good()
        await link.send(Listening(front.chats))

    async with open_front(config, link.core, plugins, place) as front, anyio.create_task_group() as group:
        link.front = front
        front.created = boot.created  # as all tell it, whenever they were started
        logging.getLogger("engine").setLevel(config.process.log_level.upper())
        listening = anyio.Event()
        group.start_soon(beat)
        group.start_soon(say_listening, front)
        await serve_http(front, config.server, routes, started=lambda url: listening.set(), sockets=sockets)


async def _run(descriptor: int) -> None:
    stream = await anyio.abc.UNIXSocketStream.from_socket(socket.socket(fileno=descriptor))
    frames: Frames[ToFrontProcess] = Frames(stream, ToFrontProcess)
    messages = aiter(frames)
    boot = await anext(messages, None)
    if not isinstance(boot, FrontBoot):
        return
    first = boot.number == boot.life == 0  # says what all of them find as they start
    set_up_logging(boot.config.process.log_level if first else "error", f"front {boot.number}")
    link = HubLink(frames, messages)
    try:
        await _serve(boot, link)
    except Ended:
        return
    except (ConfigError, PluginError) as error:
        await link.send(Refused("ConfigError" if isinstance(error, ConfigError) else "PluginError", str(error)))


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a handler, as its children would inherit that it is ignored
        signal.signal(number, lambda *_: None)
    give_back_large_blocks()
    anyio.run(_run, int(sys.argv[1]), backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main()
