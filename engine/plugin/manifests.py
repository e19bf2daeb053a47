"""Where manifests come from: entry points of installed distributions, and files; and what a manifest must not do.

entry points of group "engine.plugins"
  ├─ of our own distribution: always known
  └─ of others: imported only when --plugins or ENGINE_PLUGINS names them
a path such as ./mine.py in --plugins: a manifest and its code in one file
"""

import ast
import importlib.util
import inspect
import os
import sys
from contextlib import suppress
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from engine.errors import PluginError, did_you_mean
from engine.plugin.hookspecs import API_VERSION, KINDS

GROUP = "engine.plugins"
OURS = "actorserve"  # the distribution whose manifests are built in


class Manifest(NamedTuple):
    """One that can be loaded, and the distribution that it is of; a file is its own distribution."""

    name: str
    distribution: str
    version: str
    point: EntryPoint | None = None

    @property
    def source(self) -> str:
        """Where it is from, for people: "actorserve 0.1.0", or the path of a file."""
        return f"{self.distribution} {self.version}".rstrip()

    @property
    def said(self) -> str:
        """The beginning of an error about it."""
        return f"plugin {self.name!r} of {self.source}" if self.point else f"plugin {self.name}"

    def load(self) -> ModuleType:
        """The manifest, imported and checked. Raises PluginError that says what is wrong, with its cause."""
        try:
            module = self.point.load() if self.point else _module_of(self.name)
        except PluginError:
            raise
        except Exception as error:
            _check_api(self._stated_api(), self.said)  # made for another API, it may well not load
            raise PluginError(f"{self.said} fails to load: {type(error).__name__}: {error}") from error
        if not isinstance(module, ModuleType):
            assert self.point is not None, "a file is a module"
            raise PluginError(f"{self.said}: the entry point must name a module, not {self.point.value!r}")
        _check_api(getattr(module, "API", API_VERSION), self.said)
        _refuse_unknown_hooks(module, self.said)
        return module

    def _stated_api(self) -> object:
        """What the source of a manifest that does not load says as its API."""
        with suppress(Exception):
            spec = importlib.util.find_spec(self.point.module) if self.point else None
            path = self.name if spec is None else spec.origin
            for node in ast.parse(Path(path or "").read_bytes()).body:
                match node:
                    case ast.Assign(targets=[ast.Name(id="API")], value=ast.Constant(value=number)):
                        return number
        return API_VERSION


def discover() -> tuple[list[Manifest], dict[str, list[Manifest]]]:
    """Our own manifests, and those of others by entry-point name; nothing is imported."""
    ours: list[Manifest] = []
    others: dict[str, list[Manifest]] = {}
    read: dict[Distribution, tuple[str, str]] = {}  # the metadata of each, once: all else takes less time
    for point in entry_points(group=GROUP):
        if (distribution := point.dist) is None:
            continue
        if distribution not in read:
            about = distribution.metadata
            read[distribution] = about["Name"], about["Version"]
        manifest = Manifest(point.name, *read[distribution], point)
        if manifest.distribution == OURS:
            ours.append(manifest)
        else:
            others.setdefault(point.name, []).append(manifest)
    if not ours:
        raise PluginError(f"the distribution {OURS!r} is not installed here, so no plugin is known; run `make install`")
    return sorted(ours, key=lambda manifest: manifest.name), others


def only(manifests: list[Manifest]) -> Manifest:
    """The one of `manifests`; PluginError if there are two."""
    if len(manifests) > 1:
        sources = " and ".join(manifest.source for manifest in manifests)
        raise PluginError(f"two distributions have a plugin {manifests[0].name!r}: {sources}")
    return manifests[0]


def is_path(name: str) -> bool:
    """Whether `name`, of --plugins, is a file rather than a name."""
    return name.endswith(".py") or os.sep in name


def file_manifest(path: str) -> Manifest:
    """The manifest in the file `path`; its targets name it by its stem. Raises PluginError for what is no such file."""
    if not Path(path).is_file():
        raise PluginError(f"--plugins {path}: there is no such file; give the path of a manifest, or a plugin's name")
    stem = Path(path).stem
    if not (path.endswith(".py") and stem.isidentifier()):
        raise PluginError(f"--plugins {path}: a manifest is a Python module; name the file like one, as in mine.py")
    return Manifest(path, path, "")


def _module_of(path: str) -> ModuleType:
    """The file `path` as the module of its stem, so that its targets find it. Imported once in a process."""
    name, origin = Path(path).stem, os.path.realpath(path)
    known = sys.modules.get(name)
    found = importlib.util.find_spec(name)  # itself, where its folder is on the path: that of `python -m` is
    if found is not None and os.path.realpath(found.origin or "") != origin:
        raise PluginError(f"--plugins {path}: there is another module {name!r}; rename the file")
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(name, origin)
    assert spec is not None and spec.loader is not None, "a path that ends in .py has a loader"
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _check_api(stated: object, said: str) -> None:
    """A manifest without an API is taken as 1, the first there was: none can be older."""
    if type(stated) is not int or stated < 1:
        raise PluginError(f"{said}: its API is {stated!r}, and must be a number such as {API_VERSION}")
    if stated > API_VERSION:
        raise PluginError(
            f"{said} is written for plugin API {stated}, and this engine has API {API_VERSION}; upgrade the engine, "
            "or install a version of the plugin for this API"
        )


def _refuse_unknown_hooks(manifest: ModuleType, said: str) -> None:
    """A misspelled or unmarked hook would be a plugin that silently does nothing."""
    hooks = [f"register_{kind}" for kind in KINDS]
    for name, value in inspect.getmembers(manifest, inspect.isroutine):
        mark = getattr(value, "engine_impl", None)
        hook = (mark and mark.get("specname")) or name
        defined_here = getattr(value, "__module__", None) == manifest.__name__
        if hook not in hooks and (mark or (name.startswith("register_") and defined_here)):
            listed = ", ".join(hooks)
            raise PluginError(f"{said}: no hook is called {hook!r}{did_you_mean(hook, hooks)}; hooks: {listed}")
        if hook in hooks and not mark and defined_here:
            raise PluginError(f"{said}: {hook} lacks the @hookimpl of engine.plugin, so it would never be called")
