"""What the options of tiers ask for, in bytes and paths, and whether they go together: said before a process starts."""

from dataclasses import dataclass

from engine.config import CacheOptions, Config
from engine.errors import ConfigError
from engine.options.sizes import read_size, show_size
from engine.runtime.memory import free_memory

MOST_UNASKED = 4 << 30  # bytes of host memory beside a disk, where none are asked for
SHARE_UNASKED = 8  # the same, as a part of what is free: one so-manieth


@dataclass(frozen=True, slots=True)
class TierSizes:
    """Bytes of a whole host; without a store `store` is 0. `place` is what the option says beside the size."""

    host: int
    store: int = 0
    place: str = ""


def tier_sizes(options: CacheOptions) -> TierSizes | None:
    """What is asked for; None if nothing is. Raises ConfigError for what is no size."""
    if options.kv_host is None and options.kv_disk is None:
        return None
    if not options.prefix_cache:
        name = "--kv-host" if options.kv_host is not None else "--kv-disk"
        raise ConfigError(f"{name} keeps cached prefixes, and --no-prefix-cache has none; leave one of them out")
    host = options.kv_host or 0
    if options.kv_disk is None:
        return TierSizes(host)
    place, colon, size = options.kv_disk.rpartition(":")
    if not (colon and place):
        raise ConfigError(f"--kv-disk is {options.kv_disk!r}, but takes a path and a size, such as /var/kv:500GiB")
    host = host or min(MOST_UNASKED, free_memory() // SHARE_UNASKED)
    return TierSizes(host, read_size(size, "the size in --kv-disk"), place)


def check_tiers(config: Config) -> None:
    """Raises ConfigError for sizes that are none, and for more memory than this host may take."""
    sizes = tier_sizes(config.cache)
    if sizes is not None and sizes.host > (free := free_memory()):
        raise ConfigError(
            f"--kv-host {show_size(sizes.host)} is more than the {show_size(free)} that this process may still take, "
            "by its memory limit and by what is free; lower it"
        )
