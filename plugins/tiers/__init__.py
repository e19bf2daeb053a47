"""Manifest of the built-in tiers of KV pages below the device's memory."""

from collections.abc import Callable

from engine.plugin import hookimpl

API = 1


@hookimpl
def register_tiers(register: Callable[..., None]) -> None:
    register(
        "host",
        "engine_plugins.tiers.host:HostMemory",
        kind="pool",
        description="the memory of the host, for --kv-host",
    )
