"""Manifest of the built-in models."""

from engine.plugin import hookimpl
from engine.plugin.hookspecs import Register

API = 1


@hookimpl
def register_models(register: Register) -> None:
    register(
        "llama",
        "engine_plugins.models.llama:Llama",
        architectures=("LlamaForCausalLM", "MistralForCausalLM"),
        description="Llama 1 to 3, SmolLM2, Mistral and what else shares their shape",
    )
    register(
        "qwen",
        "engine_plugins.models.qwen:Qwen",
        architectures=("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
        description="Qwen2, Qwen2.5 and Qwen3, the dense ones",
    )
    register(
        "qwen3_moe",
        "engine_plugins.models.qwen3_moe:Qwen3Moe",
        architectures=("Qwen3MoeForCausalLM",),
        description="Qwen3, the mixtures of experts",
    )
    register(
        "mixtral",
        "engine_plugins.models.mixtral:Mixtral",
        architectures=("MixtralForCausalLM",),
        description="Mixtral 8x7B and 8x22B",
    )
    register(
        "deepseek",
        "engine_plugins.models.deepseek:Deepseek",
        architectures=("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
        description="DeepSeek-V2, V2-Lite, V3 and R1",
    )
    register(
        "gemma",
        "engine_plugins.models.gemma:Gemma3",
        architectures=("Gemma3ForCausalLM",),
        description="Gemma 3, text",
    )
    register(
        "phi",
        "engine_plugins.models.phi:Phi3",
        architectures=("Phi3ForCausalLM",),
        description="Phi-3, Phi-3.5 and Phi-4, the dense ones",
    )
    register(
        "bert",
        "engine_plugins.models.bert:Bert",
        architectures=("BertModel", "BertForMaskedLM"),
        description="BERT, MiniLM, BGE and what else shares its shape: embeddings",
    )
    register(
        "echo",
        "engine_plugins.models.echo:Echo",
        architectures=("EchoForTests",),
        description="counts up from the prompt's last byte; no weights, for tests",
    )
