"""Which attention backend a model gets: the first, in the order of the plugins, that can serve its shape."""

import logging
from typing import Any

from engine.errors import ConfigError
from engine.layers.attention import Backend
from engine.layers.latent import LatentShape
from engine.plugin.manager import Plugins, resolve

logger = logging.getLogger("engine.worker")


class Backends:
    """The attention backends for one device. `chosen` names the one that was built last; the log says why."""

    def __init__(self, plugins: Plugins, device: str) -> None:
        self._plugins = plugins
        self._device = device
        self.chosen = ""

    def build(self, shape: Any, *arguments: Any) -> Backend:
        """As the backend's constructor; `shape` says which kind is wanted. Raises the last one's ConfigError."""
        latent = isinstance(shape, LatentShape)
        first, reason = self._plugins.attention_for(self._device, latent)
        entries = [first, *self._plugins.attention_after(first, self._device, latent)]
        for entry in entries:
            try:
                backend: Backend = resolve(entry.target)(shape, *arguments)
            except ConfigError as error:
                if entry is entries[-1]:
                    raise
                reason = str(error)
                continue
            if self.chosen != entry.name:
                logger.info("%sattention backend %s (%s)", "latent " if latent else "", entry.name, reason)
            self.chosen = entry.name
            return backend
        raise AssertionError("there is always a backend to try")
