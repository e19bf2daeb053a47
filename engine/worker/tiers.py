"""The tiers of a rank: what the options ask for, built by the plugins that provide it."""

import inspect
import logging
from typing import Any, Literal

from engine.config import Config
from engine.errors import ConfigError, PluginError, counted
from engine.options.sizes import show_size
from engine.plugin.registry import Plugins
from engine.runtime.tiers import tier_sizes
from engine.worker.choices import tier_for
from engine.worker.manifest import manifest_of
from engine.worker.runner import Runner
from engine.worker.steps.uses import PageUses
from engine.worker.transfers import Transfers

logger = logging.getLogger("engine.worker")


def begin_transfers(config: Config, plugins: Plugins, runner: Runner, here: int, **about: Any) -> Transfers | None:
    """What moves the pages of a rank, one of so many `here`; None where no option asks for tiers.

    `about` is for its manifest. Raises ConfigError for a model that keeps no pages, and for a size that is less than
    one."""
    sizes, spec = tier_sizes(config.cache), runner.model.kv_spec()
    if sizes is None:
        return None
    if not spec.groups:
        what = "keeps states of requests and no pages" if spec.states else "keeps no pages"
        raise ConfigError(f"{type(runner.model).__name__} {what}; leave --kv-host and --kv-disk out")
    pages = sizes.host // here // spec.page_bytes
    if not pages:
        raise ConfigError(
            f"--kv-host {show_size(sizes.host)}, divided by {counted(here, 'rank')}, is less than one page of "
            f"{show_size(spec.page_bytes)}; raise it"
        )
    stores = bool(sizes.store)
    manifest = manifest_of(runner.model, **about) if stores else {}
    size = {"page_bytes": spec.page_bytes, "manifest": manifest}
    pool = make_tier(plugins, "pool", "--kv-host", capacity_bytes=pages * spec.page_bytes, argument="", **size)
    store = None
    if stores:
        store = make_tier(plugins, "store", "--kv-disk", capacity_bytes=sizes.store, argument=sizes.place, **size)
    told = f", and {show_size(sizes.store)} in {sizes.place} with all other ranks" if stores else ""
    logger.info("%d KV pages in %s of host memory%s", pages, show_size(pages * spec.page_bytes), told)
    copy = 0 if runner.copy is None else runner.copy.number
    slots, each = runner.page_table.shape
    uses = PageUses(slots, each, runner.page_size, len(runner.caches[0][0]))
    return Transfers(runner.caches, runner.device, pool, store, manifest, copy, uses)


def make_tier(plugins: Plugins, kind: Literal["pool", "store"], option: str, **about: Any) -> Any:
    """The pool or the store that `option` asks for. Raises PluginError for one that is made of something else."""
    entry = tier_for(plugins, kind, option)
    name, build = entry.name, plugins.code("tiers", entry.name)
    try:
        inspect.signature(build).bind(**about)
    except ValueError:  # what is in C may not say what it takes
        pass
    except TypeError as error:
        raise PluginError(f"the {kind} {name!r} of {plugins.sources['tiers', name]}: {entry.target}: {error}") from None
    made = build(**about)
    plugins.check("tiers", name, made)
    return made
