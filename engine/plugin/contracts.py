"""What the code that an entry names must be, checked where it is imported: before it is used, not at its first call.

A protocol asks for its methods, a base class for a subclass that leaves none of its methods open. Left out: how methods
are called, which the contract checks of engine.plugin.testing find; grammar engines; routes and commands.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.errors import PluginError

CONTRACTS: Mapping[str, str] = MappingProxyType(
    {
        "models": "engine.plugin.layers:Model",
        "attention": "engine.plugin.layers:AttentionBackend",
        "latent_attention": "engine.plugin.layers:LatentBackend",
        "quantization": "engine.plugin.layers:Scheme",
        "checkpoints": "engine.plugin:Checkpoint",
        "policies": "engine.plugin:Policy",
        "routing": "engine.plugin.routing:RoutingPolicy",
        "media": "engine.plugin.media:MediaProcessor",
        "tool": "engine.plugin.parsing:ToolParser",
        "reasoning": "engine.plugin.parsing:ReasoningParser",
        "store": "engine.plugin.tiers:Store",
        "pool": "engine.plugin.tiers:Pool",
    }
)


def check_contract(found: Any, contract: Any, said: str) -> None:
    """Raises PluginError that begins with `said` if `found`, a class or what was made, is not as `contract`."""
    base = found if isinstance(found, type) else type(found)
    if getattr(contract, "_is_protocol", False):
        asked = [*vars(contract), *contract.__annotations__]
        lacks = [name for name in asked if not name.startswith("_") and not hasattr(found, name)]
    elif issubclass(base, contract):
        lacks = sorted(getattr(base, "__abstractmethods__", ()))
    else:
        raise PluginError(f"{said} is no subclass of {contract.__name__}, and must be one")
    if lacks:
        raise PluginError(f"{said} lacks {', '.join(lacks)}, which {contract.__name__} has; docs/plugins.md says more")
