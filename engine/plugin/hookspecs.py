"""The hooks of a plugin manifest, each with the entry that it registers: all that the registry knows of a kind.

A manifest is a torch-free module named by an entry point of group `engine.plugins`, or a file:

    from engine.plugin import hookimpl

    API = 1

    @hookimpl
    def register_models(register):
        register("mamba", "my_package.mamba:Mamba", architectures=("MambaForCausalLM",))

Each hook runs once, at start, and fills a registry that is then frozen. An entry names its code as "module:attribute";
the code is imported where it is used, once. A new kind of plugin is an entry and a hook here; the room that uses it
asks for `Plugins.entries(kind)` and chooses.
"""

from collections.abc import Callable, Mapping
from types import FunctionType, MappingProxyType
from typing import Annotated, Literal, get_args, get_type_hints

import pluggy
from msgspec import Struct

from engine.params.grammar import GrammarKind

API_VERSION = (
    1  # of this file and of engine.plugin: what manifests say as `API`; a change that breaks plugins raises it
)

hookspec = pluggy.HookspecMarker("engine")
hookimpl = pluggy.HookimplMarker("engine")


class Entry(Struct, frozen=True, kw_only=True):
    """What every kind shares: a `name` users type and a `target` "module:attribute"."""

    name: str
    target: str
    description: str = ""


Register = Callable[..., None]  # with `name`, `target` and, by keyword, the other fields of the entry


class ModelEntry(Entry, frozen=True, kw_only=True):
    """A model family. `architectures` are the names of config.json that it answers to."""

    architectures: tuple[str, ...]


@hookspec
def register_models(register: Annotated[Register, ModelEntry]) -> None:
    """register(name, target, architectures=(...,), description=""): a `layers.Model` subclass."""


class AttentionEntry(Entry, frozen=True, kw_only=True):
    """An attention backend. Of those that run on a device, the highest `preference` is chosen."""

    devices: tuple[Literal["cpu", "cuda"], ...]
    preference: int = 0


@hookspec
def register_attention(register: Annotated[Register, AttentionEntry]) -> None:
    """register(name, target, devices=("cpu", "cuda"), preference=0): a `layers.AttentionBackend`."""


@hookspec
def register_latent_attention(register: Annotated[Register, AttentionEntry]) -> None:
    """As register_attention, for models whose cache holds latents (MLA): a `layers.LatentBackend`."""


class QuantizationEntry(Entry, frozen=True, kw_only=True):
    """A quantization. `methods` are the `quant_method`s of config.json that it reads."""

    methods: tuple[str, ...] = ()


@hookspec
def register_quantization(register: Annotated[Register, QuantizationEntry]) -> None:
    """register(name, target, methods=("fp8",)): a `layers.Scheme` subclass."""


class CheckpointEntry(Entry, frozen=True, kw_only=True):
    """A checkpoint format. `models` maps names that come with it ("smollm2-135m") to what they are."""

    models: dict[str, str] = {}


@hookspec
def register_checkpoints(register: Annotated[Register, CheckpointEntry]) -> None:
    """register(name, target, models={}): a `specs.Checkpoint` class."""


class PolicyEntry(Entry, frozen=True, kw_only=True):
    """An order of the waiting queue."""


@hookspec
def register_policies(register: Annotated[Register, PolicyEntry]) -> None:
    """register(name, target): a `specs.Policy` class, constructed without arguments."""


class RoutingEntry(Entry, frozen=True, kw_only=True):
    """A policy of the router."""


@hookspec
def register_routing(register: Annotated[Register, RoutingEntry]) -> None:
    """register(name, target): a `routing.RoutingPolicy` subclass, constructed without arguments."""


class MediaEntry(Entry, frozen=True, kw_only=True):
    """A processor of pictures and clips. `architectures` are the names of config.json whose models see by it."""

    architectures: tuple[str, ...]


@hookspec
def register_media(register: Annotated[Register, MediaEntry]) -> None:
    """register(name, target, architectures=(...,)): a `media.MediaProcessor` class, imported without torch."""


class ParserEntry(Entry, frozen=True, kw_only=True):
    """A parser of replies. It is chosen for a model whose chat template holds all of `markers`, the one with the most
    of them first, else for a model of one of `architectures`."""

    kind: Literal["tool", "reasoning"]
    markers: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()


@hookspec
def register_parsers(register: Annotated[Register, ParserEntry]) -> None:
    """register(name, target, kind="tool", markers=(), architectures=()): a `parsing.ToolParser`, or with kind
    "reasoning" a `parsing.ReasoningParser`."""


class GrammarEntry(Entry, frozen=True, kw_only=True):
    """A grammar engine. Those that are installed are asked in order of `preference`, the highest first; the first that
    takes a grammar has it. `kinds` are those of Grammar.kind, `package` is what `pip install` must have got."""

    kinds: tuple[GrammarKind, ...]
    package: str
    preference: int = 0


@hookspec
def register_grammars(register: Annotated[Register, GrammarEntry]) -> None:
    """register(name, target, kinds=("json_schema", ...), package="what-pip-installs", preference=0): a
    `specs.GrammarEngine` class."""


class TierEntry(Entry, frozen=True, kw_only=True):
    """A tier of KV pages below the device's memory. `kind` is "pool", what --kv-host asks for, or "store", what
    --kv-disk asks for."""

    kind: Literal["pool", "store"]


@hookspec
def register_tiers(register: Annotated[Register, TierEntry]) -> None:
    """register(name, target, kind="store"): a `tiers.BuildTier`, a function or a class that makes a `tiers.Store`, or
    with kind "pool" a `tiers.Pool`."""


class RouteEntry(Entry, frozen=True, kw_only=True):
    """An HTTP route: its name is "METHOD /path", and `target` its handler. Imported in the front alone.

    `takes` and `gives` are targets, too: the struct that a body (or the query of a GET) is read into, and the struct
    of the answer. Both are for the OpenAPI document; the handler's second argument is a `takes`. `content` is the type
    of an answer that is not JSON; `open` routes ask for no API key.
    """

    takes: str | None = None
    gives: str | None = None
    content: str = "application/json"
    open: bool = False


@hookspec
def register_routes(register: Annotated[Register, RouteEntry]) -> None:
    """register("GET /path", target, takes=None, gives=None, content="application/json", open=False): a coroutine
    function of the request and, if there is a `takes`, of what it was read into ([engine.plugin.http])."""


class CommandEntry(Entry, frozen=True, kw_only=True):
    """A subcommand of `engine`; `description` is its line of help."""


@hookspec
def register_commands(register: Annotated[Register, CommandEntry]) -> None:
    """register(name, target, description="..."): a class with the methods of `specs.Command`, made without
    arguments."""


def _entries() -> dict[str, type[Entry]]:
    """The entry of each kind, from the hooks above: `register_models` registers the kind "models"."""
    found = {}
    for name, hook in globals().items():
        if name.startswith("register_") and isinstance(hook, FunctionType):
            _, found[name.removeprefix("register_")] = get_args(get_type_hints(hook, include_extras=True)["register"])
    return found


KINDS: Mapping[str, type[Entry]] = MappingProxyType(_entries())
