"""Manifest of the built-in models."""

from engine.plugin import hookimpl
from engine.plugin.hookspecs import Register

API = 1

# name, target, architectures, description
MODELS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    (
        "llama",
        "llama:Llama",
        ("LlamaForCausalLM", "MistralForCausalLM"),
        "Llama 1 to 3, SmolLM2, Mistral and what else shares their shape",
    ),
    ("qwen", "qwen:Qwen", ("Qwen2ForCausalLM", "Qwen3ForCausalLM"), "Qwen2, Qwen2.5 and Qwen3, the dense ones"),
    (
        "qwen2_5_vl",
        "qwen2_5_vl:Qwen25VL",
        ("Qwen2_5_VLForConditionalGeneration",),
        "Qwen2.5-VL: images and video of any resolution",
    ),
    (
        "qwen3_vl",
        "qwen3_vl:Qwen3VL",
        ("Qwen3VLForConditionalGeneration",),
        "Qwen3-VL, the dense ones: images and video of any resolution",
    ),
    (
        "qwen3_vl_moe",
        "qwen3_vl:Qwen3VLMoe",
        ("Qwen3VLMoeForConditionalGeneration",),
        "Qwen3-VL, the mixtures of experts",
    ),
    (
        "qwen3_5",
        "qwen3_5:Qwen35",
        ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "Qwen3NextForCausalLM"),
        "Qwen3.5 and Qwen3-Next, text: gated delta nets and gated attention",
    ),
    (
        "qwen3_5_vl",
        "qwen3_5:Qwen35VL",
        ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
        "Qwen3.5: images and video of any resolution",
    ),
    ("qwen3_moe", "qwen3_moe:Qwen3Moe", ("Qwen3MoeForCausalLM",), "Qwen3, the mixtures of experts"),
    ("mixtral", "mixtral:Mixtral", ("MixtralForCausalLM",), "Mixtral 8x7B and 8x22B"),
    (
        "deepseek",
        "deepseek:Deepseek",
        ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
        "DeepSeek-V2, V2-Lite, V3 and R1",
    ),
    ("gemma", "gemma:Gemma3", ("Gemma3ForCausalLM",), "Gemma 3, text"),
    ("gemma3_vl", "gemma3_vl:Gemma3VL", ("Gemma3ForConditionalGeneration",), "Gemma 3, text and images"),
    (
        "llava_onevision",
        "llava_onevision:LlavaOnevision",
        ("LlavaOnevisionForConditionalGeneration",),
        "LLaVA-OneVision, with Qwen2: images in tiles, and video",
    ),
    ("phi", "phi:Phi3", ("Phi3ForCausalLM",), "Phi-3, Phi-3.5 and Phi-4, the dense ones"),
    (
        "bert",
        "bert:Bert",
        ("BertModel", "BertForMaskedLM"),
        "BERT, MiniLM, BGE and what else shares its shape: embeddings",
    ),
    ("echo", "echo:Echo", ("EchoForTests",), "counts up from the prompt's last byte; no weights, for tests"),
)


@hookimpl
def register_models(register: Register) -> None:
    for name, target, architectures, description in MODELS:
        register(name, f"engine_plugins.models.{target}", architectures=architectures, description=description)
