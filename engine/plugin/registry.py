"""Find manifests, call their hooks once, and hold what they registered in registries that no one can change.

    entry points of group "engine.plugins"
      ├─ of our own distribution: always known
      └─ of others: imported only when --plugins or ENGINE_PLUGINS names them

Every process of an engine loads the same names again and so comes to the same registries; nothing is passed
between processes but names. Loading needs no torch: an entry's code is imported by `resolve`, where it is used.
There is no unloading and no reloading.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple, TypeVar

import msgspec
import pluggy
from msgspec import Struct

from engine.errors import ConfigError, PluginError, did_you_mean
from engine.plugin import hookspecs
from engine.plugin.hub import download, is_hub_id
from engine.plugin.specs import (
    AttentionEntry,
    Checkpoint,
    CheckpointEntry,
    Entry,
    GrammarEntry,
    ModelEntry,
    ParserEntry,
    Policy,
    PolicyEntry,
    QuantizationEntry,
)

GROUP = "engine.plugins"
OURS = "actorserve"  # the distribution whose manifests are built in
DEFAULT_POLICY = "fcfs"
TARGET = re.compile(r"[\w.]+:[\w.]+")

KINDS: Mapping[str, type[Entry]] = MappingProxyType(
    {
        "models": ModelEntry,
        "attention": AttentionEntry,
        "latent_attention": AttentionEntry,
        "quantization": QuantizationEntry,
        "checkpoints": CheckpointEntry,
        "policies": PolicyEntry,
        "parsers": ParserEntry,
        "grammars": GrammarEntry,
    }
)
HOOKS: Mapping[str, str] = MappingProxyType({f"register_{kind}": kind for kind in KINDS})

AnyEntry = TypeVar("AnyEntry", bound=Entry)


class PluginRow(Struct, frozen=True):
    """One line of `engine plugins`. `state` is loaded, named (by --plugins) or available (to be named)."""

    name: str
    kind: str
    version: str
    distribution: str
    hooks: tuple[str, ...]
    state: str
    description: str = ""


@dataclass(frozen=True)
class Plugins:
    """What is registered, by kind and name, in order of registration; and which of it the user named."""

    models: Mapping[str, ModelEntry]
    attention: Mapping[str, AttentionEntry]
    latent_attention: Mapping[str, AttentionEntry]
    quantization: Mapping[str, QuantizationEntry]
    checkpoints: Mapping[str, CheckpointEntry]
    policies: Mapping[str, PolicyEntry]
    parsers: Mapping[str, ParserEntry]
    grammars: Mapping[str, GrammarEntry]
    named: frozenset[tuple[str, str]]  # (kind, name): to be preferred
    insisted: frozenset[tuple[str, str]]  # those of `named` that --plugins says by their own name
    rows: tuple[PluginRow, ...]

    @classmethod
    def load(cls, named: Sequence[str] = ()) -> "Plugins":
        """Import the built-in manifests and those of `named`, and run their hooks.

        A name is a registered name ("llama", "torch") or a third-party entry point's; the latter names all that
        it registers. Raises PluginError for a name that is neither, and for a manifest that does not load.
        """
        loader = _Loader()
        ours, others = _discover()
        for point in ours:
            loader.add(point)
        for name in named:
            if name in others:
                loader.add(_only(others[name]))
        known = [*others, *(name for registry in loader.registries.values() for name in registry)]
        for name in named:
            if name not in known:
                listed = ", ".join(sorted(set(known)))
                raise PluginError(f"unknown plugin {name!r}{did_you_mean(name, known)}; known: {listed}")
        return loader.frozen(named, others)

    def model_for(self, architectures: Sequence[str]) -> ModelEntry:
        """The model family for a checkpoint of these `architectures` (of its config.json)."""
        fitting = [entry for entry in self.models.values() if set(entry.architectures) & set(architectures)]
        wanted = [self.models[name] for kind, name in sorted(self.insisted) if kind == "models"]
        preferred = [entry for entry in fitting if ("models", entry.name) in self.named]
        if wanted and not preferred:
            serves = "; ".join(f"{entry.name} serves {', '.join(entry.architectures)}" for entry in wanted)
            raise PluginError(f"of the models in --plugins, {serves}; the checkpoint is a {' or '.join(architectures)}")
        chosen = preferred or fitting
        if not chosen:
            served = ", ".join(name for entry in self.models.values() for name in entry.architectures)
            raise PluginError(
                f"no model plugin serves {' or '.join(architectures) or 'this checkpoint'}; served: {served}"
            )
        if len(chosen) > 1:
            names = " and ".join(entry.name for entry in chosen)
            raise PluginError(f"{names} all serve {' or '.join(architectures)}; name one of them in --plugins")
        return chosen[0]

    def attention_for(self, device: str, latent: bool = False) -> tuple[AttentionEntry, str]:
        """The attention backend for `device` ("cpu" or "cuda"), and the reason for it, to be logged; with `latent` one
        for latent attention."""
        entries, kind, what = self._attention(latent)
        fitting = [entry for entry in entries.values() if device in entry.devices]
        named = [name for other, name in sorted(self.insisted) if other in ("attention", "latent_attention")]
        if named and not set(named) & set(entries):
            raise PluginError(
                f"--plugins names {' and '.join(named)}, which is no {what}; there is {', '.join(entries)}"
            )
        for name in set(named) & set(entries):
            if device not in entries[name].devices:
                runs = ", ".join(entries[name].devices)
                raise PluginError(f"--plugins names the {what} {name!r}, which runs on {runs}, not on {device}")
        if not fitting:
            listed = ", ".join(f"{entry.name} ({', '.join(entry.devices)})" for entry in entries.values())
            raise PluginError(f"no {what} runs on {device!r}; registered: {listed}")
        preferred = [entry for entry in fitting if (kind, entry.name) in self.named]
        best = max(preferred or fitting, key=lambda entry: entry.preference)
        if preferred:
            return best, "named in --plugins"
        if len(fitting) == 1:
            return best, f"the only one for {device}"
        others = ", ".join(f"{entry.name} ({entry.preference})" for entry in fitting if entry is not best)
        return best, f"preference {best.preference} on {device}, before {others}"

    def attention_after(self, entry: AttentionEntry, device: str, latent: bool = False) -> list[AttentionEntry]:
        """What takes the place of `entry` where it cannot serve a model: nothing, if it was named."""
        entries, kind, _ = self._attention(latent)
        if (kind, entry.name) in self.named:
            return []
        others = [other for other in entries.values() if device in other.devices and other.name != entry.name]
        return sorted(others, key=lambda other: -other.preference)

    def _attention(self, latent: bool) -> tuple[Mapping[str, AttentionEntry], str, str]:
        """The registry of one kind of attention, its name, and what an entry is called."""
        if latent:
            return self.latent_attention, "latent_attention", "latent attention backend"
        return self.attention, "attention", "attention backend"

    def quantization_for(self, method: str | None) -> tuple[QuantizationEntry, str] | None:
        """The quantization of a checkpoint of that `quant_method`, and the reason for it, to be logged. None for a
        checkpoint that is not quantized, where none is named in --plugins."""
        named = [entry for entry in self.quantization.values() if ("quantization", entry.name) in self.named]
        if method is None:
            insisted = [entry for entry in named if ("quantization", entry.name) in self.insisted] or named
            if len(insisted) > 1:
                both = " and ".join(entry.name for entry in insisted)
                raise PluginError(f"--plugins names the quantizations {both}; a model can have one")
            return (insisted[0], "named in --plugins: weights are quantized as they are loaded") if insisted else None
        fitting = [entry for entry in self.quantization.values() if method in entry.methods]
        if not fitting:
            reads = "; ".join(f"{entry.name} reads {', '.join(entry.methods)}" for entry in self.quantization.values())
            raise PluginError(
                f"the checkpoint's quant_method is {method!r}, which no quantization reads; known: {reads}"
            )
        for entry in named:
            if ("quantization", entry.name) in self.insisted and entry not in fitting:
                reads = ", ".join(entry.methods)
                raise PluginError(
                    f"--plugins names the quantization {entry.name!r}, which reads {reads}; the checkpoint's "
                    f"quant_method is {method!r}"
                )
        chosen = [entry for entry in named if entry in fitting] or fitting
        if len(chosen) > 1:
            both = " and ".join(entry.name for entry in chosen)
            raise PluginError(
                f"{both} all read the checkpoint's quant_method {method!r}; name one of them in --plugins"
            )
        return chosen[0], f"the checkpoint's quant_method is {method}"

    def policy_name(self, name: str = "auto") -> str:
        """Which policy `name` is: "auto" is one that --plugins names, else fcfs. Raises PluginError for none."""
        if name == "auto":
            named = sorted(name for kind, name in self.named if kind == "policies")
            if len(named) > 1:
                raise PluginError(f"--plugins names the policies {' and '.join(named)}; choose one with --policy")
            name = named[0] if named else DEFAULT_POLICY
        if name not in self.policies:
            listed = ", ".join(["auto", *self.policies])
            raise PluginError(f"unknown policy {name!r}{did_you_mean(name, self.policies)}; known: {listed}")
        return name

    def policy(self, name: str = "auto") -> Policy:
        """The policy that `policy_name` finds, constructed."""
        policy: Policy = resolve(self.policies[self.policy_name(name)].target)()
        return policy

    def grammar_engines(self) -> list[GrammarEntry]:
        """The grammar engines to be asked, in that order, of those that are installed: those named in --plugins, else
        all. Raises PluginError for a named one that is not installed."""
        ordered = sorted(self.grammars.values(), key=lambda entry: -entry.preference)
        named = [entry for entry in ordered if ("grammars", entry.name) in self.named]
        for entry in named:
            if not _installed(entry):
                raise PluginError(
                    f"--plugins names the grammar engine {entry.name!r}, and its package is not installed; "
                    f"pip install {entry.package}"
                )
        return named or [entry for entry in ordered if _installed(entry)]

    def open_checkpoint(self, model: str) -> Checkpoint:
        """Open `model`: an embedded name, then a path that a format knows, then an id of the Hugging Face hub.

        Raises ConfigError that says what `--model` takes when it is none of these."""
        for entry in self._formats():
            if model in entry.models:
                return self._opened(entry, model)
        found = self._open_path(str(Path(model).expanduser()))
        if found is not None:
            return found
        if Path(model).expanduser().exists():
            formats = ", ".join(self.checkpoints)
            raise ConfigError(
                f"--model {model} exists, but no checkpoint format ({formats}) can read it; {self._takes()}"
            )
        if not is_hub_id(model):
            embedded = [name for entry in self.checkpoints.values() for name in entry.models]
            raise ConfigError(f"--model {model} does not exist{did_you_mean(model, embedded)}; {self._takes()}")
        folder = download(model)
        found = self._open_path(folder)
        if found is None:
            raise ConfigError(f"{model} on the Hugging Face hub holds no safetensors weights; {self._takes()}")
        return found

    def listing(self) -> list[PluginRow]:
        """What `engine plugins` shows."""
        return list(self.rows)

    def _formats(self) -> list[CheckpointEntry]:
        """Checkpoint formats in the order they are asked: those named in --plugins first."""
        return sorted(self.checkpoints.values(), key=lambda entry: ("checkpoints", entry.name) not in self.named)

    def _open_path(self, path: str) -> Checkpoint | None:
        for entry in self._formats():
            try:
                opened: Checkpoint | None = resolve(entry.target).open(path)
            except OSError as error:
                raise ConfigError(f"--model {path} cannot be read: {error}") from error
            if opened is not None:
                return opened
        return None

    def _opened(self, entry: CheckpointEntry, model: str) -> Checkpoint:
        opened: Checkpoint | None = resolve(entry.target).open(model)
        if opened is None:
            raise PluginError(f"the checkpoint plugin {entry.name!r} lists {model!r}, but does not open it")
        return opened

    def _takes(self) -> str:
        embedded = ", ".join(name for entry in self.checkpoints.values() for name in entry.models)
        return (
            "it takes a safetensors directory, a .gguf file, a Hugging Face id (organization/name), "
            f"or an embedded name: {embedded or 'none here'}"
        )


def _installed(entry: GrammarEntry) -> bool:
    try:
        version(entry.package)
    except PackageNotFoundError:
        return False
    return True


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


class _Manifest(NamedTuple):
    """An entry point, and the distribution that it is of."""

    point: EntryPoint
    distribution: str
    version: str

    @property
    def name(self) -> str:
        return self.point.name

    @property
    def source(self) -> str:
        """The distribution, for people: "actorserve 0.1.0"."""
        return f"{self.distribution} {self.version}"


def _discover() -> tuple[list[_Manifest], dict[str, list[_Manifest]]]:
    """Our own manifests, and those of others by entry-point name; nothing is imported."""
    ours: list[_Manifest] = []
    others: dict[str, list[_Manifest]] = {}
    read: dict[Distribution, tuple[str, str]] = {}  # the metadata of each, once: all else takes less time
    for point in entry_points(group=GROUP):
        if (distribution := point.dist) is None:
            continue
        if distribution not in read:
            about = distribution.metadata
            read[distribution] = about["Name"], about["Version"]
        manifest = _Manifest(point, *read[distribution])
        if manifest.distribution == OURS:
            ours.append(manifest)
        else:
            others.setdefault(point.name, []).append(manifest)
    if not ours:
        raise PluginError(f"the distribution {OURS!r} is not installed here, so no plugin is known; run `make install`")
    return sorted(ours, key=lambda point: point.name), others


def _only(manifests: list[_Manifest]) -> _Manifest:
    if len(manifests) > 1:
        sources = " and ".join(manifest.source for manifest in manifests)
        raise PluginError(f"two distributions have a plugin {manifests[0].name!r}: {sources}")
    return manifests[0]


class _Loader:
    """The registries while they are filled. One per load; frozen at its end."""

    def __init__(self) -> None:
        self.registries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
        self.sources: dict[tuple[str, str], _Manifest] = {}
        self.manifests: list[_Manifest] = []
        self._pluggy = pluggy.PluginManager("engine")
        self._pluggy.add_hookspecs(hookspecs)

    def add(self, manifest: _Manifest) -> None:
        """Import one manifest, check its hooks, and run them. Adding it again does nothing."""
        if manifest in self.manifests:
            return
        said = f"plugin {manifest.name!r} of {manifest.source}"
        try:
            module = manifest.point.load()
        except Exception as error:
            raise PluginError(f"{said} fails to load: {type(error).__name__}: {error}") from error
        if not isinstance(module, ModuleType):
            raise PluginError(f"{said}: the entry point must name a module, not {manifest.point.value!r}")
        _refuse_unknown_hooks(module, said)
        self.manifests.append(manifest)
        try:
            self._pluggy.register(module, name=f"{manifest.source}: {manifest.name}")
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"{said}: {error}") from error
        for hook, kind in HOOKS.items():
            self._run(module, hook, kind, manifest, said)

    def _run(self, module: ModuleType, hook: str, kind: str, manifest: _Manifest, said: str) -> None:
        rest = [plugin for plugin in self._pluggy.get_plugins() if plugin is not module]
        try:
            self._pluggy.subset_hook_caller(hook, rest)(register=self._registrar(kind, manifest, said))
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(f"{said}: {hook} fails: {type(error).__name__}: {error}") from error

    def _registrar(self, kind: str, manifest: _Manifest, said: str) -> Callable[..., None]:
        """The `register` that one manifest's hook of `kind` is called with."""

        def register(name: str, target: str, **fields: Any) -> None:
            entry = _entry(KINDS[kind], {"name": name, "target": target, **fields}, f"{said}: register({name!r})")
            if name in self.registries[kind]:
                both = f"{self.sources[kind, name].source} and {manifest.source}"
                raise PluginError(f"two plugins register {name!r} among {kind}: {both}; leave one out of --plugins")
            self.registries[kind][name] = entry
            self.sources[kind, name] = manifest

        return register

    def frozen(self, named: Sequence[str], others: Mapping[str, list[_Manifest]]) -> Plugins:
        insisted = {key for key in self.sources if key[1] in named and key[1] not in others}
        preferred = {key for key, manifest in self.sources.items() if key in insisted or manifest.name in others}
        registries: dict[str, Any] = {
            kind: MappingProxyType(dict(entries)) for kind, entries in self.registries.items()
        }
        return Plugins(
            **registries,
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

    def _available_rows(self, others: Mapping[str, list[_Manifest]]) -> list[PluginRow]:
        """Third-party entry points that were not named: not imported, so their hooks are not known."""
        return [
            PluginRow(manifest.name, "", manifest.version, manifest.distribution, (), "available")
            for manifests in others.values()
            for manifest in manifests
            if manifest not in self.manifests
        ]


def _refuse_unknown_hooks(manifest: ModuleType, said: str) -> None:
    """A misspelled or unmarked hook would be a plugin that silently does nothing."""
    for name, value in inspect.getmembers(manifest, inspect.isroutine):
        mark = getattr(value, "engine_impl", None)
        hook = (mark and mark.get("specname")) or name
        defined_here = getattr(value, "__module__", None) == manifest.__name__
        if hook not in HOOKS and (mark or (name.startswith("register_") and defined_here)):
            listed = ", ".join(HOOKS)
            raise PluginError(f"{said}: no hook is called {hook!r}{did_you_mean(hook, HOOKS)}; hooks: {listed}")
        if hook in HOOKS and not mark and defined_here:
            raise PluginError(f"{said}: {hook} lacks the @hookimpl of engine.plugin, so it would never be called")


def _entry(kind: type[AnyEntry], fields: dict[str, Any], said: str) -> AnyEntry:
    """Build a registry entry from what a manifest passed to `register`, checking every field."""
    known = kind.__struct_fields__
    for field in fields:
        if field not in known:
            raise PluginError(f"{said} has no field {field!r}{did_you_mean(field, known)}; fields: {', '.join(known)}")
    try:
        entry = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise PluginError(f"{said}: {error}") from error
    if not TARGET.fullmatch(entry.target):
        raise PluginError(f"{said}: the target must be 'module:attribute', not {entry.target!r}")
    return entry
