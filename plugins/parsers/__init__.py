"""Manifest of the built-in parsers of replies: tool calls and reasoning."""

from engine.plugin import hookimpl
from engine.plugin.hookspecs import Register

DEEPSEEK = "<｜tool▁calls▁begin｜>"
# name, target, marks of the chat template, architectures, description
TOOLS: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        "hermes",
        "hermes:Hermes",
        ("<tool_call>", '"arguments":'),
        ("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
        "<tool_call> with a JSON object: Hermes, Qwen2.5, Qwen3 and many others",
    ),
    ("qwen", "hermes:Hermes", (), (), "another name for hermes"),
    (
        "qwen3_coder",
        "qwen3_coder:Qwen3Coder",
        ("<tool_call>", "<function=", "<parameter="),
        (
            *("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"),
            *("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
        ),
        "<tool_call> with <function=…> and <parameter=…>: Qwen3-Coder, Qwen3.5",
    ),
    ("qwen3_xml", "qwen3_coder:Qwen3Coder", (), (), "another name for qwen3_coder"),
    (
        "llama3_json",
        "llama:Llama3Json",
        ('{"name": function name, "parameters":',),
        (),
        "a bare JSON object: Llama 3.1 to 3.3",
    ),
    (
        "pythonic",
        "pythonic:Pythonic",
        ("[func_name1(",),
        ("Llama4ForConditionalGeneration",),
        "a list of Python calls: Llama 4, Llama 3.2 with such a template",
    ),
    (
        "mistral",
        "mistral:Mistral",
        ("[TOOL_CALLS]",),
        ("MistralForCausalLM", "MixtralForCausalLM"),
        "[TOOL_CALLS] with a JSON list, or with names and [ARGS]: Mistral, Mixtral",
    ),
    (
        "deepseek_v3",
        "deepseek:DeepseekV3",
        (DEEPSEEK, "```json"),
        ("DeepseekV3ForCausalLM",),
        "fenced JSON between DeepSeek's marks: V3, V3-0324",
    ),
    (
        "deepseek_r1",
        "deepseek:DeepseekR1",
        (DEEPSEEK, "```json", "</think>"),
        (),
        "the same, with the marks that R1 and its distilled models write in their place",
    ),
    ("deepseek_v31", "deepseek:DeepseekV31", (DEEPSEEK,), (), "bare JSON between DeepSeek's marks: V3.1"),
)
REASONING: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    (
        "deepseek-r1",
        "reasoning:DeepseekR1",
        ("</think>", "<｜Assistant｜>"),
        "<think>, opened by the prompt or taken for granted: DeepSeek R1 and its distilled models, V3.1",
    ),
    (
        "qwen3",
        "reasoning:Qwen3",
        ("<think>",),
        "<think> where the model or the prompt writes it: Qwen3, QwQ, SmolLM3, and others",
    ),
)

API = 1


@hookimpl
def register_parsers(register: Register) -> None:
    for name, target, markers, architectures, about in TOOLS:
        target = f"engine_plugins.parsers.{target}"
        register(name, target, kind="tool", markers=markers, architectures=architectures, description=about)
    for name, target, markers, about in REASONING:
        register(name, f"engine_plugins.parsers.{target}", kind="reasoning", markers=markers, description=about)
