"""Which plugins serve a checkpoint on a device: its model family, attention backends and quantization.

Needs no torch, as no code of a plugin is imported here. What is named in --plugins wins, or is refused in words.
"""

from collections.abc import Mapping, Sequence

from engine.errors import PluginError
from engine.plugin.hookspecs import AttentionEntry, MediaEntry, ModelEntry, QuantizationEntry, TierEntry
from engine.plugin.registry import Plugins


def model_for(plugins: Plugins, architectures: Sequence[str]) -> ModelEntry:
    """The model family for a checkpoint of these `architectures` (of its config.json)."""
    fitting = [entry for entry in plugins.entries("models").values() if set(entry.architectures) & set(architectures)]
    wanted = [plugins.entries("models")[name] for kind, name in sorted(plugins.insisted) if kind == "models"]
    preferred = [entry for entry in fitting if ("models", entry.name) in plugins.named]
    if wanted and not preferred:
        serves = "; ".join(f"{entry.name} serves {', '.join(entry.architectures)}" for entry in wanted)
        raise PluginError(f"of the models in --plugins, {serves}; the checkpoint is a {' or '.join(architectures)}")
    chosen = preferred or fitting
    if not chosen:
        served = ", ".join(name for entry in plugins.entries("models").values() for name in entry.architectures)
        wanted_by = " or ".join(architectures) or "this checkpoint"
        raise PluginError(f"no model plugin serves {wanted_by}; served: {served}; {_may_be_named(plugins)}")
    if len(chosen) > 1:
        names = " and ".join(entry.name for entry in chosen)
        raise PluginError(f"{names} all serve {' or '.join(architectures)}; name one of them in --plugins")
    return chosen[0]


def check_sight(plugins: Plugins, model: ModelEntry, architectures: Sequence[str], sees: bool) -> None:
    """Raises PluginError where --plugins names a processor for a `model` that does not see. A built-in one is left, so
    that a model of its architecture may read text alone: requests are told."""
    for entry in plugins.entries("media").values():
        assert isinstance(entry, MediaEntry)
        named = ("media", entry.name) in plugins.named
        if named and not sees and set(entry.architectures) & set(architectures):
            theirs, its = (plugins.sources[key] for key in (("media", entry.name), ("models", model.name)))
            raise PluginError(
                f"{entry.name!r} of {theirs} prepares media for {' or '.join(architectures)}, and the model "
                f"{model.name!r} of {its} does not take them; give the model encode and sees = True, or leave "
                f"{entry.name!r} out"
            )


def _may_be_named(plugins: Plugins) -> str:
    """The remedy where no plugin that is loaded serves."""
    available = plugins.available()
    there = f"; installed and not named: {', '.join(available)}" if available else ""
    return f"name a plugin that does in --plugins{there}"


def attention_for(plugins: Plugins, device: str, latent: bool = False) -> tuple[AttentionEntry, str]:
    """The attention backend for `device` ("cpu" or "cuda"), and the reason for it, to be logged; with `latent` one
    for latent attention."""
    entries, kind, what = _attention(plugins, latent)
    fitting = [entry for entry in entries.values() if device in entry.devices]
    named = [name for other, name in sorted(plugins.insisted) if other in ("attention", "latent_attention")]
    if named and not set(named) & set(entries):
        raise PluginError(f"--plugins names {' and '.join(named)}, which is no {what}; there is {', '.join(entries)}")
    for name in set(named) & set(entries):
        if device not in entries[name].devices:
            runs = ", ".join(entries[name].devices)
            raise PluginError(f"--plugins names the {what} {name!r}, which runs on {runs}, not on {device}")
    if not fitting:
        listed = ", ".join(f"{entry.name} ({', '.join(entry.devices)})" for entry in entries.values())
        raise PluginError(f"no {what} runs on {device!r}; registered: {listed}")
    preferred = [entry for entry in fitting if (kind, entry.name) in plugins.named]
    best = max(preferred or fitting, key=lambda entry: entry.preference)
    if preferred:
        return best, "named in --plugins"
    if len(fitting) == 1:
        return best, f"the only one for {device}"
    others = ", ".join(f"{entry.name} ({entry.preference})" for entry in fitting if entry is not best)
    return best, f"preference {best.preference} on {device}, before {others}"


def attention_after(plugins: Plugins, entry: AttentionEntry, device: str, latent: bool = False) -> list[AttentionEntry]:
    """What takes the place of `entry` where it cannot serve a model: nothing, if it was named."""
    entries, kind, _ = _attention(plugins, latent)
    if (kind, entry.name) in plugins.named:
        return []
    others = [other for other in entries.values() if device in other.devices and other.name != entry.name]
    return sorted(others, key=lambda other: -other.preference)


def _attention(plugins: Plugins, latent: bool) -> tuple[Mapping[str, AttentionEntry], str, str]:
    """The registry of one kind of attention, its name, and what an entry is called."""
    if latent:
        return plugins.entries("latent_attention"), "latent_attention", "latent attention backend"
    return plugins.entries("attention"), "attention", "attention backend"


def quantization_for(plugins: Plugins, method: str | None) -> tuple[QuantizationEntry, str] | None:
    """The quantization of a checkpoint of that `quant_method`, and the reason for it, to be logged. None for a
    checkpoint that is not quantized, where none is named in --plugins."""
    named = [
        entry for entry in plugins.entries("quantization").values() if ("quantization", entry.name) in plugins.named
    ]
    if method is None:
        insisted = [entry for entry in named if ("quantization", entry.name) in plugins.insisted] or named
        if len(insisted) > 1:
            both = " and ".join(entry.name for entry in insisted)
            raise PluginError(f"--plugins names the quantizations {both}; a model can have one")
        return (insisted[0], "named in --plugins: weights are quantized as they are loaded") if insisted else None
    fitting = [entry for entry in plugins.entries("quantization").values() if method in entry.methods]
    if not fitting:
        reads = "; ".join(
            f"{entry.name} reads {', '.join(entry.methods)}" for entry in plugins.entries("quantization").values()
        )
        raise PluginError(
            f"the checkpoint's quant_method is {method!r}, which no quantization reads; known: {reads}; "
            f"{_may_be_named(plugins)}"
        )
    for entry in named:
        if ("quantization", entry.name) in plugins.insisted and entry not in fitting:
            reads = ", ".join(entry.methods)
            raise PluginError(
                f"--plugins names the quantization {entry.name!r}, which reads {reads}; the checkpoint's "
                f"quant_method is {method!r}"
            )
    chosen = [entry for entry in named if entry in fitting] or fitting
    if len(chosen) > 1:
        both = " and ".join(entry.name for entry in chosen)
        raise PluginError(f"{both} all read the checkpoint's quant_method {method!r}; name one of them in --plugins")
    return chosen[0], f"the checkpoint's quant_method is {method}"


def tier_for(plugins: Plugins, kind: str, option: str) -> TierEntry:
    """The tier of `kind` ("pool" or "store"), which `option` asks for."""
    fitting = [entry for entry in plugins.entries("tiers").values() if entry.kind == kind]
    named = [entry for entry in fitting if ("tiers", entry.name) in plugins.named]
    chosen = named or fitting
    if not chosen:
        raise PluginError(f"no plugin provides a {kind} of KV pages, which {option} asks for; name one in --plugins")
    if len(chosen) > 1:
        names = " and ".join(entry.name for entry in chosen)
        raise PluginError(f"{names} all provide a {kind} of KV pages for {option}; name one of them in --plugins")
    return chosen[0]
