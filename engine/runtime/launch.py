"""Start an engine: make the channels, start the actors, join them. serve.py adds HTTP and signals.

open_front(config) ── tokenizer, detokenizer, front ── and the core, here or in its own process
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import anyio
import anyio.to_thread
from msgspec.structs import asdict

from engine.actors.detokenizer import DetokenizerActor
from engine.actors.tokenizer import Admission, TokenizerActor
from engine.config import Config
from engine.conversation.parsers import check_parsers
from engine.conversation.template import read_template
from engine.grammars.engines import grammar_engines
from engine.media.addresses import check_sources
from engine.messages import FromFront, ToDetokenizer, ToFront, ToHttp, ToTokenizer
from engine.messages.reply import Failed, Tokens
from engine.params.sampling import SamplingDefaults
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.plugin.specs import TextSpec
from engine.runtime.actor import Actor, supervise
from engine.runtime.channel import Outbox, Receiver, channel, open_channel
from engine.runtime.core import CoreLink, core_actors, say_scheduling
from engine.runtime.front import Front, Place
from engine.runtime.process import placement
from engine.text.fallback import sampling_defaults, text_of
from engine.text.pool import TextPool
from engine.text.tokenizer import Text

log = logging.getLogger("engine")

STEPS_AHEAD = 8  # steps of text that may wait before the scheduler does
NEWS_AHEAD = 64  # of the engine, for the front


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


def seeing_actors(
    front: Front, text: Text, inbox: Receiver[ToTokenizer], detokenizer: Outbox[ToDetokenizer]
) -> tuple[list[Actor], Receiver[ToTokenizer]]:
    """The actors that a model with a processor of media has before its tokenizer, which reads what comes to `inbox`
    without them; and where it reads with them."""
    if text.media is None:
        return [], inbox
    from engine.actors.media import MediaActor  # here, where there is use for all that they import
    from engine.media.pool import MediaPool
    from engine.media.store import MediaStore

    pool = MediaPool(front.config.media, text.media, front.config.model.plugins)
    front.media = store = MediaStore(front.config.media, pool.ask)
    to_tokenizer, tokenizer_inbox = open_channel()
    return [pool, MediaActor(store, inbox, to_tokenizer, detokenizer)], tokenizer_inbox


@asynccontextmanager
async def open_front(
    config: Config, core: Core | None = None, plugins: Plugins | None = None, place: Place | None = None
) -> AsyncIterator[Front]:
    """A running engine as its clients see it; the device may still be loading (`await front.ready()`).

    `core` overrules where and of what the core is made; tests drive it without a device. `plugins` are those of the
    config, where they are loaded already. `place` is that of one front of several.
    Raises ConfigError and PluginError for what cannot work, before anything is started.
    """
    plugins = plugins or Plugins.load(config.model.plugins)
    if place is None:
        say_scheduling(plugins, config)
    check_parsers(plugins, config.server)
    check_sources(config.media)
    # In a thread that a Ctrl-C may leave behind: the model may be on its way from the hub.
    checkpoint = await anyio.to_thread.run_sync(open_checkpoint, plugins, config.model.model, abandon_on_cancel=True)
    template = read_template(config.model.chat_template)
    grammars = grammar_engines(plugins)
    to_tokenizer, tokenizer_inbox = open_channel()
    to_detokenizer, detokenizer_inbox = channel(STEPS_AHEAD)
    to_front, front_inbox = channel(NEWS_AHEAD)
    from_core = FromCore(to_detokenizer, to_front)
    core = core or (partial(core_actors, plugins=plugins) if placement(config) == "single" else linked_core)
    actors, to_scheduler = core(config, from_core)
    name = (*config.server.served_model_name, checkpoint.name())[0]
    front = Front(config, name, front_inbox, tokenizer=to_tokenizer, scheduler=to_scheduler, place=place)
    front.senders["detokenizer"] = to_detokenizer
    # The device process starts first: it loads for seconds while the tokenizer is read here.
    async with supervise(*actors, front):
        front.text = text = await anyio.to_thread.run_sync(text_of, plugins, checkpoint, config, template)
        say_sampling_defaults(text.spec, config)
        admission = Admission(text, bool(grammars), named=config.cache.cache_events)
        front.texts = pool = TextPool(config, template, admission)
        seeing, tokenizer_inbox = seeing_actors(front, text, tokenizer_inbox, to_detokenizer)
        tokenizer = TokenizerActor(admission, tokenizer_inbox, to_detokenizer, to_scheduler, pool)
        detokenizer = DetokenizerActor(text, front.boxes, detokenizer_inbox, to_scheduler)
        async with supervise(pool, *seeing, tokenizer, detokenizer):
            try:
                yield front
            finally:
                front.fail("the engine is closed")
