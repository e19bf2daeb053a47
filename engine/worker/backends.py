"""Which attention backend a model gets, the first that can serve its shape, and which quantization."""

import logging
from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.layers.attention import AttentionBackend
from engine.layers.quantization import Scheme
from engine.plugin.manager import Plugins, resolve

logger = logging.getLogger("engine.worker")


class Backends:
    """The attention backends for one device. `chosen` names the one that was built last; the log says why."""

    def __init__(self, plugins: Plugins, device: str) -> None:
        first, self._reason = plugins.attention_for(device)
        self._entries = [first, *plugins.attention_after(first, device)]
        self.chosen = ""

    def build(self, *arguments: Any) -> AttentionBackend:
        """As the backend's constructor. Raises the last one's ConfigError."""
        for entry in self._entries:
            try:
                backend: AttentionBackend = resolve(entry.target)(*arguments)
            except ConfigError as error:
                if entry is self._entries[-1]:
                    raise
                self._reason = str(error)
                continue
            if self.chosen != entry.name:
                logger.info("attention backend %s (%s)", entry.name, self._reason)
            self.chosen = entry.name
            return backend
        raise AssertionError("there is always a backend to try")


def quantization(plugins: Plugins, terms: Mapping[str, Any]) -> Scheme | None:
    """How the matrices of a checkpoint with these `terms` of config.json are stored; None: in the activations' type."""
    config = terms.get("quantization_config")
    found = plugins.quantization_for(None if config is None else str(config.get("quant_method")))
    if found is None:
        return None
    entry, reason = found
    logger.info("quantization %s (%s)", entry.name, reason)
    scheme: Scheme = resolve(entry.target)(config)
    return scheme
