"""The memory of the host as a pool of KV pages."""

from engine_plugins.tiers.host.memory import HostMemory

__all__ = ["HostMemory"]
