"""The hooks of a plugin manifest. Each runs once, at start, and fills a registry that is then frozen.

A manifest is a torch-free module named by an entry point of group `engine.plugins`:

    from engine.plugin import hookimpl

    @hookimpl
    def register_models(register):
        register("mamba", "my_package.mamba:Mamba", architectures=("MambaForCausalLM",))
"""

from collections.abc import Callable

import pluggy

hookspec = pluggy.HookspecMarker("engine")
hookimpl = pluggy.HookimplMarker("engine")

Register = Callable[..., None]


@hookspec
def register_models(register: Register) -> None:
    """register(name, target, architectures=(...,), description=""): a `layers.Model` subclass."""


@hookspec
def register_attention(register: Register) -> None:
    """register(name, target, devices=("cpu", "cuda"), preference=0): a `layers.AttentionBackend`."""


@hookspec
def register_latent_attention(register: Register) -> None:
    """As register_attention, for models whose cache holds latents (MLA): a `layers.LatentBackend`."""


@hookspec
def register_quantization(register: Register) -> None:
    """register(name, target, methods=("fp8",)): a `layers.Scheme` subclass."""


@hookspec
def register_checkpoints(register: Register) -> None:
    """register(name, target, models={}): a `specs.Checkpoint` class."""


@hookspec
def register_policies(register: Register) -> None:
    """register(name, target): a `specs.Policy` class, constructed without arguments."""


@hookspec
def register_parsers(register: Register) -> None:
    """register(name, target, kind="tool", markers=(), architectures=()): a `parsing.ToolParser`, or with kind
    "reasoning" a `parsing.ReasoningParser`."""


@hookspec
def register_grammars(register: Register) -> None:
    """register(name, target, kinds=("json_schema", ...), package="what-pip-installs", preference=0): a
    `specs.GrammarEngine` class."""
