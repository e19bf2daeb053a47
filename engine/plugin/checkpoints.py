"""Which checkpoint format opens what --model says."""

from pathlib import Path

from engine.errors import ConfigError, PluginError, did_you_mean
from engine.plugin.hookspecs import CheckpointEntry
from engine.plugin.hub import download, is_hub_id
from engine.plugin.registry import Plugins
from engine.plugin.specs import Checkpoint


def open_checkpoint(plugins: Plugins, model: str) -> Checkpoint:
    """Open `model`: an embedded name, then a path that a format knows, then an id of the Hugging Face hub.

    Raises ConfigError that says what `--model` takes when it is none of these."""
    for entry in _formats(plugins):
        if model in entry.models:
            return _opened(plugins, entry, model)
    found = _open_path(plugins, str(Path(model).expanduser()))
    if found is not None:
        return found
    if Path(model).expanduser().exists():
        formats = ", ".join(plugins.entries("checkpoints"))
        raise ConfigError(
            f"--model {model} exists, but no checkpoint format ({formats}) can read it; {_takes(plugins)}"
        )
    if not is_hub_id(model):
        embedded = [name for entry in plugins.entries("checkpoints").values() for name in entry.models]
        raise ConfigError(f"--model {model} does not exist{did_you_mean(model, embedded)}; {_takes(plugins)}")
    folder = download(model)
    found = _open_path(plugins, folder)
    if found is None:
        raise ConfigError(f"{model} on the Hugging Face hub holds no safetensors weights; {_takes(plugins)}")
    return found


def _formats(plugins: Plugins) -> list[CheckpointEntry]:
    """Checkpoint formats in the order they are asked: those named in --plugins first."""
    return sorted(
        plugins.entries("checkpoints").values(), key=lambda entry: ("checkpoints", entry.name) not in plugins.named
    )


def _open_path(plugins: Plugins, path: str) -> Checkpoint | None:
    for entry in _formats(plugins):
        try:
            opened = _open(plugins, entry, path)
        except OSError as error:
            raise ConfigError(f"--model {path} cannot be read: {error}") from error
        if opened is not None:
            return opened
    return None


def _open(plugins: Plugins, entry: CheckpointEntry, model: str) -> Checkpoint | None:
    """What the format opens, which may be what another one opened, so not of the class that is asked."""
    found = plugins.code("checkpoints", entry.name)
    opened: Checkpoint | None = found.open(model) if hasattr(found, "open") else found
    if opened is not None:
        plugins.check("checkpoints", entry.name, opened)
    return opened


def _opened(plugins: Plugins, entry: CheckpointEntry, model: str) -> Checkpoint:
    opened = _open(plugins, entry, model)
    if opened is None:
        raise PluginError(f"the checkpoint plugin {entry.name!r} lists {model!r}, but does not open it")
    return opened


def _takes(plugins: Plugins) -> str:
    embedded = ", ".join(name for entry in plugins.entries("checkpoints").values() for name in entry.models)
    return (
        "it takes a safetensors directory, a .gguf file, a Hugging Face id (organization/name), "
        f"or an embedded name: {embedded or 'none here'}"
    )
