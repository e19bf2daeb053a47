"""The scheduler that a device needs: one, or one for each copy of attention, for what the device says it can hold."""

from typing import Any

from engine.cache.blocks import HeldBlocks
from engine.cache.tiers import TierOptions
from engine.config import Config
from engine.messages.control import WorkerReady
from engine.plugin.specs import Policy
from engine.sched import Scheduler
from engine.sched.chunks import ChunkRule
from engine.sched.copies import Copies
from engine.sched.encoder import Encoder

LEAST_RISEN, LEAST_FETCHED = 64, 256  # tokens: fewer are computed sooner than they come from the host, or a store


def scheduler_for(
    ready: WorkerReady, config: Config, policy: Policy, fronts: int, held: HeldBlocks | None
) -> Scheduler | Copies:
    """It orders its queue by `policy`, has requests of so many `fronts`, and tells `held` what the cache holds."""
    stages = config.parallel.pp
    options: dict[str, Any] = {
        "pages": ready.pages,
        "page_size": ready.page_size,
        "slots": ready.slots,
        "max_model_len": ready.max_model_len,
        "max_step_tokens": ready.max_step_tokens,
        "policy": policy,
        "prefix_cache": config.cache.prefix_cache and not ready.recurrent,
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
        )
    return Copies(ready.copies, **options) if ready.copies > 1 else Scheduler(**options)
