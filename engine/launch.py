"""Start an engine: make the channels, start the actors, join them; `serve` adds HTTP and signals.

open_front(config) ── tokenizer, detokenizer, front ── and the core, here or in its own process
"""

import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import partial

import anyio
import anyio.to_thread
from msgspec.structs import replace

from engine.actor import Actor, supervise
from engine.actors.detokenizer import DetokenizerActor, Replies
from engine.actors.tokenizer import Admission, TokenizerActor
from engine.channel import Outbox, channel, open_channel
from engine.config import Config
from engine.core import CoreLink, core_actors, early_worker
from engine.errors import WorkerError
from engine.front import Front
from engine.logs import set_up_logging
from engine.messages import Failed, FromFront, ToDetokenizer, ToFront, ToHttp, Tokens, WorkerReady
from engine.model_text import read_text
from engine.parsers import check_parsers, choose_parsers
from engine.plugin.manager import Plugins
from engine.plugin.specs import Checkpoint
from engine.template import read_template
from engine.text import Text

log = logging.getLogger("engine")

SMALL_MACHINE = 4  # processors up to which one process for front and core is the faster placement
STEPS_AHEAD = 8  # steps of text that may wait before the scheduler does
REPLIES_AHEAD = 64


class FromCore:
    """Sorts what the core says: tokens and failures to the detokenizer, the rest to the front."""

    def __init__(self, detokenizer: Outbox[ToDetokenizer], front: Outbox[ToHttp]) -> None:
        self._detokenizer = detokenizer
        self._front = front

    async def send(self, message: ToFront) -> None:
        if isinstance(message, Tokens | Failed):
            await self._detokenizer.send(message)
        else:
            await self._front.send(message)


def placement(config: Config) -> str:
    """`single` or `split`, with `auto` decided."""
    if config.process.placement != "auto":
        return config.process.placement
    return "single" if (os.cpu_count() or 1) <= SMALL_MACHINE else "split"


Core = Callable[[Config, Outbox[ToFront]], tuple[list[Actor], Outbox[FromFront]]]


def linked_core(config: Config, front: Outbox[ToFront]) -> tuple[list[Actor], Outbox[FromFront]]:
    """As `core_actors`, in a process of its own."""
    link = CoreLink(config, front)
    return [link], link


def _text(plugins: Plugins, checkpoint: Checkpoint, config: Config, template: str | None) -> Text:
    """The model's text, with the parsers that go with it; `template` takes the place of its own."""
    spec = read_text(checkpoint, config)
    architectures = checkpoint.config().get("architectures") or ()
    parsers = choose_parsers(plugins, config.server, architectures, template or spec.chat_template)
    return Text(spec, template, parsers)


@asynccontextmanager
async def open_front(config: Config, core: Core | None = None) -> AsyncIterator[Front]:
    """A running engine as its clients see it; the device may still be loading (`await front.ready()`).

    `core` overrules where and of what the core is made; tests drive it without a device.
    Raises ConfigError and PluginError for what cannot work, before anything is started.
    """
    plugins = Plugins.load(config.model.plugins)
    plugins.policy(config.schedule.policy)
    check_parsers(plugins, config.server)
    # In a thread that a Ctrl-C may leave behind: the model may be on its way from the hub.
    checkpoint = await anyio.to_thread.run_sync(plugins.open_checkpoint, config.model.model, abandon_on_cancel=True)
    template = read_template(config.model.chat_template)
    grammars = plugins.grammar_engines()
    to_tokenizer, tokenizer_inbox = open_channel()
    to_detokenizer, detokenizer_inbox = channel(STEPS_AHEAD)
    to_front, front_inbox = channel(REPLIES_AHEAD)
    from_core = FromCore(to_detokenizer, to_front)
    core = core or (core_actors if placement(config) == "single" else linked_core)
    actors, to_scheduler = core(config, from_core)
    name = (*config.server.served_model_name, checkpoint.name())[0]
    front = Front(config, name, front_inbox, to_tokenizer, to_scheduler)
    # The device process starts first: it loads for seconds while the tokenizer is read here.
    async with supervise(*actors, front):
        front.text = text = await anyio.to_thread.run_sync(_text, plugins, checkpoint, config, template)
        tokenizer = TokenizerActor(Admission(text, bool(grammars)), tokenizer_inbox, to_detokenizer, to_scheduler)
        detokenizer = DetokenizerActor(Replies(text), detokenizer_inbox, to_scheduler, to_front)
        async with supervise(tokenizer, detokenizer):
            try:
                yield front
            finally:
                front.fail("the engine is closed")


def serve(config: Config) -> int:
    """Serve over HTTP until a signal or a failure; the process's exit code."""
    set_up_logging(config.process.log_level)
    if config.process.spare_worker is None:
        config = replace(config, process=replace(config.process, spare_worker=True))
    with early_worker(config) if placement(config) == "single" else nullcontext() as start:
        core = None if start is None else partial(core_actors, start=start)
        return anyio.run(_serve, config, core, backend_options={"use_uvloop": True})


async def _serve(config: Config, core: Core | None) -> int:
    from engine.http.app import serve as serve_http

    began = time.monotonic()
    code = 0
    async with open_front(config, core) as front, anyio.create_task_group() as group:
        listening = anyio.Event()
        url = ""

        def started(at: str) -> None:
            nonlocal url
            url = at
            listening.set()

        async def http() -> None:
            await serve_http(front, config.server, started=started)

        async def announce() -> None:
            await listening.wait()
            with suppress(WorkerError):  # `failure` says so
                say_ready(url, await front.ready())

        def say_ready(url: str, info: WorkerReady) -> None:
            phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in info.phases.items())
            log.info("worker on %s: %s", info.device, phases)
            if info.embedding_size:
                log.info("vectors of %d numbers, of at most %d tokens", info.embedding_size, info.max_model_len)
            else:
                size, tokens = info.page_size, info.pages * info.page_size
                log.info("KV cache: %d tokens in pages of %d; attention: %s", tokens, size, info.attention)
            log.info("ready after %.1f s on %s", time.monotonic() - began, url)
            embeds = info.embedding_size > 0
            print(try_line(url, front.model_name, config.server.api_key, embeds=embeds), flush=True)

        async def signals() -> None:
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
                async for _ in received:
                    if front.draining:
                        break
                    log.info("draining: waiting up to %.0f s for open requests", config.server.drain_seconds)
                    group.start_soon(drain)
            group.cancel_scope.cancel()

        async def drain() -> None:
            if left := await front.drain(config.server.drain_seconds):
                log.warning("%d requests were still open and are cut off", left)
            group.cancel_scope.cancel()

        async def failure() -> None:
            nonlocal code
            log.error("%s", await front.failed())
            code = 1
            group.cancel_scope.cancel()

        for task in (http, announce, signals, failure):
            group.start_soon(task)
    return code


def try_line(url: str, model: str, api_key: str | None, *, embeds: bool = False) -> str:
    """A curl command that a newcomer can paste."""
    key = "-H 'Authorization: Bearer YOUR_KEY' " if api_key else ""
    path, said = "chat/completions", '"messages": [{"role": "user", "content": "Say hello."}], "stream": true'
    if embeds:
        path, said = "embeddings", '"input": ["Say hello."]'
    body = f'{{"model": "{model}", {said}}}'
    return f"\nTry:\n  curl -N {url}/v1/{path} {key}-H 'Content-Type: application/json' -d '{body}'\n"
