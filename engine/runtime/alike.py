"""What the hosts of one engine must have alike: versions, options, the model; and how a difference is told.

Values travel as text, by the names that people know, so that engines of different versions can still tell each other
how they differ. Left out: the contents of weights, of which only names and sizes of files are compared.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from engine import __version__
from engine.config import Config, groups
from engine.options.option import options_of
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins

WEIGHTS = ("*.safetensors", "*.gguf")
OWN = {  # options that each host has for itself
    "model", "chat_template", "sampling_defaults", "memory_fraction", "node_rank", "rendezvous", "dist_interface",
    "token_file", "launcher", "threads", "placement", "fronts", "spare_worker", "log_level",
}  # fmt: skip
MOST_TOLD = 4


def alike(config: Config) -> dict[str, str]:
    """Of this host, what all must have alike. Opens the checkpoint, which may have to be downloaded first."""
    said = {"engine": __version__, "python": "{}.{}".format(*sys.version_info), "torch": _version("torch")}
    for group, struct in groups().items():
        if group != "server":
            values = getattr(config, group)
            said |= {o.flag: str(getattr(values, o.name)) for o in options_of(struct) if o.name not in OWN}
    checkpoint = open_checkpoint(Plugins.load(config.model.plugins), config.model.model)
    described = msgspec.json.encode(checkpoint.config(), order="deterministic")
    said["the model's configuration (sha256)"] = hashlib.sha256(described).hexdigest()[:16]
    return said | dict(_weights(Path(config.model.model).expanduser()))


def _weights(model: Path) -> Iterator[tuple[str, str]]:
    """Names and sizes of the weight files, where the model is a path of this host."""
    files = [model] if model.is_file() else [path for kind in WEIGHTS for path in model.glob(kind)]
    for path in sorted(files):
        yield f"the weights in {path.name}", f"{path.stat().st_size} bytes"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def differences(node: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """How what `node` has differs from ours, node 0's, with both values; empty where it does not."""
    names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    told = [f"{name} {theirs.get(name, 'none')} there and {ours.get(name, 'none')} here" for name in names[:MOST_TOLD]]
    if len(names) > MOST_TOLD:
        told.append(f"and {len(names) - MOST_TOLD} more")
    if not told:
        return ""
    return f"{node} differs from node 0: {', '.join(told)}; give all hosts the same versions, options and model"
