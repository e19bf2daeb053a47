"""Which attention backend a model gets, the first that can serve its shape, and which quantization."""

import logging
from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.layers.attention import Backend
from engine.layers.build import Scheme
from engine.layers.latent import LatentShape
from engine.plugin.registry import Plugins
from engine.plugin.terms import Terms
from engine.worker.choices import attention_after, attention_for, quantization_for

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
        first, reason = attention_for(self._plugins, self._device, latent)
        kind = "latent_attention" if latent else "attention"
        entries = [first, *attention_after(self._plugins, first, self._device, latent)]
        for entry in entries:
            try:
                backend: Backend = self._plugins.code(kind, entry.name)(shape, *arguments)
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


def quantization(plugins: Plugins, terms: Mapping[str, Any]) -> Scheme | None:
    """How the matrices of a checkpoint with these `terms` of config.json are stored; None: in the activations' type."""
    terms = Terms.of(terms)
    config = terms.section("quantization_config") if terms.get("quantization_config") is not None else None
    found = quantization_for(plugins, None if config is None else config.word("quant_method"))
    if found is None:
        return None
    entry, reason = found
    logger.info("quantization %s (%s)", entry.name, reason)
    scheme: Scheme = plugins.code("quantization", entry.name)(config)
    return scheme
