"""What the scheduler actor opens: the waiting room for what is made, and the scheduler for what a device can hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.cache.blocks import HeldBlocks
from engine.cache.tiers import TierOptions
from engine.config import Config
from engine.messages import ToMaker
from engine.messages.control import WorkerReady
from engine.messages.media import MEDIA
from engine.plugin.specs import Policy
from engine.runtime.channel import Outbox
from engine.sched import Scheduler
from engine.sched.assets import WaitingRoom
from engine.sched.chunks import ChunkRule
from engine.sched.copies import Copies
from engine.sched.encoder import Encoder

MOST_CHECKED = 1024  # pages of device and host: to go through them takes a few milliseconds
LEAST_RISEN, LEAST_FETCHED = 64, 256  # tokens: fewer are computed sooner than they come from the host, or a store


@dataclass(frozen=True, slots=True)
class Maker:
    """What makes one kind of need, and how many things of it are `kept` that no request uses."""

    inbox: Outbox[ToMaker]
    kept: int


def room_for(makers: Mapping[str, Maker], config: Config) -> WaitingRoom:
    """Where requests wait for what `makers` make, and for what they bring along. Pictures and clips that no request
    shows now are known all the same, so that what is encoded of them is found again."""
    kept = {kind: maker.kept for kind, maker in makers.items()}
    return WaitingRoom(kept, {MEDIA: config.media.media_known_memory})


def checks(ready: WorkerReady, config: Config) -> bool:
    """Whether an idle scheduler goes through its pages: where these are few, as a request that comes meanwhile waits
    for that, or where it is told to."""
    pages = ready.copies * (ready.pages + ready.host_pages)
    return config.process.check_integrity or pages <= MOST_CHECKED


def scheduler_for(
    ready: WorkerReady, config: Config, policy: Policy, fronts: int, held: HeldBlocks | None
) -> Scheduler | Copies:
    """One, or one for each copy of attention. It orders its queue by `policy`, has requests of so many `fronts`, and
    tells `held` what the cache holds."""
    stages = config.parallel.pp
    options: dict[str, Any] = {
        "pages": ready.pages,
        "page_size": ready.page_size,
        "slots": ready.slots,
        "max_model_len": ready.max_model_len,
        "max_step_tokens": ready.max_step_tokens,
        "policy": policy,
        "prefix_cache": config.cache.prefix_cache and (bool(ready.state_pages) or not ready.recurrent),
        "state_pages": ready.state_pages,
        "max_waiting": config.schedule.max_waiting,
        "fronts": fronts,
        "held": held,
    }
    if ready.encoder_tokens:
        options["encoder"] = Encoder(ready.encoder_tokens, ready.embeddings)
    if stages > 1:
        options["chunks"] = ChunkRule(ready.max_step_tokens, stages, ready.attention_work)
    if ready.host_pages:
        options["tiers"] = TierOptions(
            ready.host_pages,
            config.cache.kv_policy,
            ready.stores,
            least_risen=-(-LEAST_RISEN // ready.page_size),
            least_fetched=-(-LEAST_FETCHED // ready.page_size),
            always=config.cache.kv_fetch == "always",
            state=ready.state_pages,
        )
    return Copies(ready.copies, **options) if ready.copies > 1 else Scheduler(**options)
