"""A small, fast, pluggable serving engine for large language models.

The names below are the whole public Python API; everything else may change. They are imported when
first used, so that `import engine` costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import Config
    from engine.errors import ConfigError, EngineError, PluginError, RequestError, WorkerError
    from engine.messages.reply import Chunk
    from engine.params.sampling import SamplingParams
    from engine.runtime.offline import AsyncEngine, Engine, Reply

__version__ = "0.1.0"

_HOMES = {
    "AsyncEngine": "engine.runtime.offline",
    "Chunk": "engine.messages.reply",
    "Config": "engine.config",
    "ConfigError": "engine.errors",
    "Engine": "engine.runtime.offline",
    "EngineError": "engine.errors",
    "PluginError": "engine.errors",
    "Reply": "engine.runtime.offline",
    "RequestError": "engine.errors",
    "SamplingParams": "engine.params.sampling",
    "WorkerError": "engine.errors",
}

__all__ = [
    "AsyncEngine",
    "Chunk",
    "Config",
    "ConfigError",
    "Engine",
    "EngineError",
    "PluginError",
    "Reply",
    "RequestError",
    "SamplingParams",
    "WorkerError",
]


def __getattr__(name: str) -> Any:
    import importlib

    if home := _HOMES.get(name):
        return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
