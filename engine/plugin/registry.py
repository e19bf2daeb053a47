"""Load manifests, call their hooks once, and hold what they registered in registries that no one can change.

Every process of an engine loads the same names again and so comes to the same registries; nothing is passed
between processes but names. Loading needs no torch: an entry's code is imported by `resolve`, where it is used.
Nothing is chosen here: the room that needs a kind of plugin asks for its entries. There is no unloading and no
reloading.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any

import pluggy
from msgspec import Struct

from engine.errors import PluginError, did_you_mean
from engine.plugin import hookspecs
from engine.plugin.contracts import CONTRACTS, check_contract
from engine.plugin.entries import entry_of
from engine.plugin.hookspecs import KINDS, Entry
from engine.plugin.manifests import OURS, Manifest, discover, file_manifest, is_path, only


class PluginRow(Struct, frozen=True):
    """One line of `engine plugins`. `state` is loaded, named (by --plugins) or available (to be named)."""

    name: str
    kind: str
    version: str
    distribution: str
    hooks: tuple[str, ...]
    state: str
    description: str = ""


MADE = ("checkpoints", "policies", "tiers")  # kinds whose entries are checked once they have made something


@dataclass(frozen=True)
class Plugins:
    """What is registered, by kind and name, in order of registration; and which of it the user named."""

    registries: Mapping[str, Mapping[str, Entry]]
    sources: Mapping[tuple[str, str], str]  # by kind and name, whose it is: "actorserve 0.1.0", or the path of a file
    named: frozenset[tuple[str, str]]  # (kind, name): to be preferred
    insisted: frozenset[tuple[str, str]]  # those of `named` that --plugins says by their own name
    rows: tuple[PluginRow, ...]

    @classmethod
    def load(cls, named: Sequence[str] = ()) -> "Plugins":
        """Import the built-in manifests and those of `named`, and run their hooks.

        A name is a registered name ("llama", "torch"), a third-party entry point's, or the path of a file; the latter
        two name all that they register. Raises PluginError for a name that is none of these, and for a manifest that
        does not load.
        """
        loader = _Loader()
        ours, others = discover()
        for manifest in ours:
            loader.add(manifest)
        for name in named:
            if is_path(name):
                loader.add(file_manifest(name))
            elif name in others:
                loader.add(only(others[name]))
        known = [*others, *(name for registry in loader.registries.values() for name in registry)]
        for name in named:
            if name not in known and not is_path(name):
                raise PluginError(f"unknown plugin {name!r}{_meant(name, known, others)}")
        return loader.frozen(named, others)

    def entries(self, kind: str) -> Mapping[str, Any]:
        """What is registered of `kind`, by name: entries as its hook in hookspecs.py says."""
        return self.registries[kind]

    def code(self, kind: str, name: str) -> Any:
        """What the entry `name` of `kind` names, imported. Raises PluginError, which names the plugin, for what cannot
        be imported, and for a class that is not as one of its kind must be."""
        try:
            found = resolve(self.entries(kind)[name].target)
        except PluginError as error:
            raise PluginError(f"{name!r} of {self.sources[kind, name]}: {error}") from error.__cause__
        if kind not in MADE:
            self.check(kind, name, found)
        return found

    def check(self, kind: str, name: str, found: Any) -> None:
        """Raises PluginError if `found`, which that entry names or made, is not as one of its kind must be."""
        entry = self.entries(kind)[name]
        contract = resolve(CONTRACTS[getattr(entry, "kind", kind)])
        check_contract(found, contract, f"{name!r} of {self.sources[kind, name]}: {entry.target}")

    def available(self) -> list[str]:
        """The entry points of other distributions that --plugins might name, and does not."""
        return [row.name for row in self.rows if row.state == "available"]

    def listing(self) -> list[PluginRow]:
        """What `engine plugins` shows."""
        return list(self.rows)


def resolve(target: str) -> Any:
    """Import "module:attribute". Raises PluginError, with what went wrong as its cause."""
    module, _, attribute = target.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    except Exception as error:
        raise PluginError(f"{target} cannot be imported: {type(error).__name__}: {error}") from error
    return value


# ── loading ──────────────────────────────────────────────────────────────────────────────────


class _Loader:
    """The registries while they are filled. One per load; frozen at its end."""

    def __init__(self) -> None:
        self.registries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
        self.sources: dict[tuple[str, str], Manifest] = {}
        self.manifests: list[Manifest] = []
        self._pluggy = pluggy.PluginManager("engine")
        self._pluggy.add_hookspecs(hookspecs)

    def add(self, manifest: Manifest) -> None:
        """Import one manifest, and run its hooks. Adding it again does nothing."""
        if manifest in self.manifests:
            return
        module = manifest.load()
        self.manifests.append(manifest)
        try:
            self._pluggy.register(module, name=f"{manifest.source}: {manifest.name}")
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"{manifest.said}: {error}") from error
        for kind in KINDS:
            self._run(module, kind, manifest)

    def _run(self, module: ModuleType, kind: str, manifest: Manifest) -> None:
        hook = f"register_{kind}"
        rest = [plugin for plugin in self._pluggy.get_plugins() if plugin is not module]
        try:
            self._pluggy.subset_hook_caller(hook, rest)(register=self._registrar(kind, manifest))
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(f"{manifest.said}: {hook} fails: {type(error).__name__}: {error}") from error

    def _registrar(self, kind: str, manifest: Manifest) -> Callable[..., None]:
        """The `register` that one manifest's hook of `kind` is called with."""

        def register(name: str, target: str, **fields: Any) -> None:
            entry = entry_of(
                KINDS[kind], {"name": name, "target": target, **fields}, f"{manifest.said}: register({name!r})"
            )
            if name in self.registries[kind]:
                both = f"{self.sources[kind, name].source} and {manifest.source}"
                raise PluginError(f"two plugins register {name!r} among {kind}: {both}; leave one out of --plugins")
            self.registries[kind][name] = entry
            self.sources[kind, name] = manifest

        return register

    def frozen(self, named: Sequence[str], others: Mapping[str, list[Manifest]]) -> Plugins:
        """What was registered; a third party's is named, else it would not be here."""
        insisted = {key for key in self.sources if key[1] in named and key[1] not in others}
        preferred = insisted | {key for key, manifest in self.sources.items() if manifest.distribution != OURS}
        return Plugins(
            registries=MappingProxyType(
                {kind: MappingProxyType(dict(entries)) for kind, entries in self.registries.items()}
            ),
            sources=MappingProxyType({key: manifest.source for key, manifest in self.sources.items()}),
            named=frozenset(preferred),
            insisted=frozenset(insisted),
            rows=(*self._loaded_rows(preferred), *self._available_rows(others)),
        )

    def _loaded_rows(self, named: set[tuple[str, str]]) -> list[PluginRow]:
        rows = []
        for (kind, name), manifest in self.sources.items():
            state = "named" if (kind, name) in named else "loaded"
            about = self.registries[kind][name].description
            hooks = (f"register_{kind}",)
            rows.append(PluginRow(name, kind, manifest.version, manifest.distribution, hooks, state, about))
        return rows

    def _available_rows(self, others: Mapping[str, list[Manifest]]) -> list[PluginRow]:
        """Third-party entry points that were not named: not imported, so their hooks are not known."""
        return [
            PluginRow(manifest.name, "", manifest.version, manifest.distribution, (), "available")
            for manifests in others.values()
            for manifest in manifests
            if manifest not in self.manifests
        ]


def _meant(name: str, known: Sequence[str], others: Mapping[str, list[Manifest]]) -> str:
    """What to write in the place of `name`, which is none of `known`: pip knows a distribution by another name."""
    points = [point for point, manifests in others.items() for manifest in manifests if manifest.distribution == name]
    if points:
        return f"; the distribution {name} has {' and '.join(map(repr, points))}, so name that"
    return f"{did_you_mean(name, known)}; known: {', '.join(sorted(set(known)))}"
