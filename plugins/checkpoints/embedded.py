"""Models that come inside Python packages, found without importing the packages, whose dependencies may be missing."""

from importlib.util import find_spec
from pathlib import Path

from engine.plugin import ConfigError


def embedded_path(name: str, package: str, inside: str, remedy: str) -> Path:
    """Where the file or folder `inside` of `package` lies, which holds the model `name`.

    Raises ConfigError, with the command `remedy` that installs it, when it is absent."""
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / inside).exists():
            return path
    raise ConfigError(f"the embedded model {name} is not installed; run: {remedy}")
