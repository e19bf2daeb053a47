"""The only package that plugins import. This face of it needs no torch; `layers` and `testing` do."""

from engine.errors import ConfigError, PluginError
from engine.plugin.hookspecs import hookimpl
from engine.plugin.specs import (
    Checkpoint,
    KVGroup,
    KVSpec,
    LazyTensor,
    Policy,
    TextSpec,
)

__all__ = [
    "Checkpoint",
    "ConfigError",
    "KVGroup",
    "KVSpec",
    "LazyTensor",
    "PluginError",
    "Policy",
    "TextSpec",
    "hookimpl",
]
