"""Manifest of the built-in models."""

from engine.plugin import hookimpl
from engine.plugin.hookspecs import Register


@hookimpl
def register_models(register: Register) -> None:
    register(
        "llama",
        "engine_plugins.models.llama:Llama",
        architectures=("LlamaForCausalLM", "MistralForCausalLM"),
        description="Llama 1 to 3, SmolLM2, Mistral and what else shares their shape",
    )
    register(
        "echo",
        "engine_plugins.models.echo:Echo",
        architectures=("EchoForTests",),
        description="counts up from the prompt's last byte; no weights, for tests",
    )
