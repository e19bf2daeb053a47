"""Which processor of media a checkpoint's model has."""

from typing import Any

from engine.conversation.media import Encode, MediaProcessor
from engine.plugin.hookspecs import MediaEntry
from engine.plugin.registry import Plugins
from engine.plugin.specs import Checkpoint
from engine.plugin.terms import Terms


def choose_processor(plugins: Plugins, checkpoint: Checkpoint, encode: Encode | None = None) -> MediaProcessor | None:
    """The processor of the checkpoint's model; None where it reads text alone."""
    config = Terms(checkpoint.config())
    architectures = set(config.words("architectures"))
    for entry in plugins.entries("media").values():
        assert isinstance(entry, MediaEntry)
        if not architectures.isdisjoint(entry.architectures):
            described: dict[str, Any] = getattr(checkpoint, "processor", dict)()
            made: MediaProcessor = plugins.code("media", entry.name)(
                config, Terms(described, "the model's processor"), encode
            )
            return made
    return None
