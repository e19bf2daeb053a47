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
from msgspec.structs import asdict, replace

from engine.actors.detokenizer import DetokenizerActor, Replies
from engine.actors.tokenizer import Admission, TokenizerActor
from engine.config import Config
from engine.conversation.parsers import check_parsers
from engine.conversation.template import read_template
from engine.errors import WorkerError
from engine.logs import set_up_logging
from engine.messages import FromFront, ToDetokenizer, ToFront, ToHttp
from engine.messages.control import WorkerReady
from engine.messages.reply import Failed, Tokens
from engine.params.sampling import SamplingDefaults
from engine.plugin.registry import Plugins
from engine.plugin.specs import TextSpec
from engine.runtime.actor import Actor, supervise
from engine.runtime.allocator import give_back_large_blocks
from engine.runtime.channel import Outbox, channel, open_channel
from engine.runtime.core import CoreLink, core_actors, early_worker
from engine.runtime.front import Front
from engine.text.fallback import sampling_defaults, text_of
from engine.text.pool import TextPool

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


def say_sampling_defaults(spec: TextSpec, config: Config) -> None:
    """Log what the model's makers recommend for fields that requests leave out, and what of it cannot be used."""
    defaults, wrong = sampling_defaults(spec, config)
    for sentence in wrong:
        log.warning("of the model's own sampling defaults, %s; the API's default takes its place", sentence)
    stated = {name: value for name, value in asdict(defaults).items() if value != getattr(SamplingDefaults(), name)}
    if stated:
        said = ", ".join(f"{name} {value}" for name, value in stated.items())
        log.info("sampling defaults of the model: %s (--sampling-defaults openai leaves them out)", said)


def say_scheduling(plugins: Plugins, config: Config) -> None:
    """Log the policy and the grammar engines that the user chose. Raises PluginError for one that is none."""
    plugins.policy(config.schedule.policy)
    name, asked = plugins.policy_name(config.schedule.policy), config.schedule.policy
    if ("policies", name) in plugins.named or asked != "auto":
        log.info("scheduling policy: %s (%s)", name, "named in --plugins" if asked == "auto" else "--policy")
    engines = [entry.name for entry in plugins.grammar_engines() if ("grammars", entry.name) in plugins.named]
    if engines:
        log.info("grammar engines: %s (named in --plugins)", ", ".join(engines))


@asynccontextmanager
async def open_front(config: Config, core: Core | None = None) -> AsyncIterator[Front]:
    """A running engine as its clients see it; the device may still be loading (`await front.ready()`).

    `core` overrules where and of what the core is made; tests drive it without a device.
    Raises ConfigError and PluginError for what cannot work, before anything is started.
    """
    plugins = Plugins.load(config.model.plugins)
    say_scheduling(plugins, config)
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
        front.text = text = await anyio.to_thread.run_sync(text_of, plugins, checkpoint, config, template)
        say_sampling_defaults(text.spec, config)
        admission = Admission(text, bool(grammars))
        front.texts = pool = TextPool(config, template, admission)
        tokenizer = TokenizerActor(admission, tokenizer_inbox, to_detokenizer, to_scheduler, pool)
        detokenizer = DetokenizerActor(Replies(text), detokenizer_inbox, to_scheduler, to_front)
        async with supervise(pool, tokenizer, detokenizer):
            try:
                yield front
            finally:
                front.fail("the engine is closed")


def serve(config: Config) -> int:
    """Serve over HTTP until a signal or a failure; the process's exit code."""
    set_up_logging(config.process.log_level)
    give_back_large_blocks()
    if config.process.spare_worker is None:
        config = replace(config, process=replace(config.process, spare_worker=True))
    with early_worker(config) if placement(config) == "single" else nullcontext() as start:
        core = None if start is None else partial(core_actors, start=start)
        return anyio.run(_serve, config, core, backend_options={"use_uvloop": True})


async def _serve(config: Config, core: Core | None) -> int:
    from engine.http.app import serve as serve_http
    from engine.http.keys import Keys
    from engine.http.origins import Access

    began = time.monotonic()
    Access.of(config.server)  # what is wrong with who may call is said before anything is started
    keyed = Keys(config.server).asked
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
            print(try_line(url, front.model_name, keyed=keyed, embeds=embeds), flush=True)

        async def signals() -> None:
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
                async for _ in received:
                    if front.draining:
                        break
                    if front.open:
                        log.info(
                            "draining: %s open and may go on for up to %.0f s; a second signal ends what is open",
                            _requests(front.open), config.server.drain_seconds,
                        )  # fmt: skip
                    group.start_soon(drain)
            close()

        async def drain() -> None:
            await front.drain(config.server.drain_seconds)
            close()

        def close() -> None:
            if left := front.end():
                log.warning("%s still open and now ended with an error", _requests(left))
            group.cancel_scope.cancel()

        async def failure() -> None:
            nonlocal code
            log.error("%s", await front.failed())
            code = 1
            group.cancel_scope.cancel()

        for task in (http, announce, signals, failure):
            group.start_soon(task)
    return code


def _requests(count: int) -> str:
    return "1 request is" if count == 1 else f"{count} requests are"


def try_line(url: str, model: str, *, keyed: bool = False, embeds: bool = False) -> str:
    """A curl command that a newcomer can paste; `keyed` says that an API key is asked for."""
    key = "-H 'Authorization: Bearer YOUR_KEY' " if keyed else ""
    path = "chat/completions"
    said = '"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 60, "stream": true'
    if embeds:
        path, said = "embeddings", '"input": ["Say hello."]'
    body = f'{{"model": "{model}", {said}}}'
    return f"\nTry:\n  curl -N {url}/v1/{path} {key}-H 'Content-Type: application/json' -d '{body}'\n"
