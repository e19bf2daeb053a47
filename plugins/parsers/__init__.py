"""Manifest of the built-in parsers of replies: tool calls and reasoning."""

from engine.plugin import hookimpl
from engine.plugin.hookspecs import Register

DEEPSEEK = "<｜tool▁calls▁begin｜>"


@hookimpl
def register_parsers(register: Register) -> None:
    register(
        "hermes",
        "engine_plugins.parsers.hermes:Hermes",
        kind="tool",
        markers=("<tool_call>", '"arguments":'),
        architectures=("Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        description="<tool_call> with a JSON object: Hermes, Qwen2.5, Qwen3 and many others",
    )
    register(
        "qwen",
        "engine_plugins.parsers.hermes:Hermes",
        kind="tool",
        description="another name for hermes",
    )
    register(
        "llama3_json",
        "engine_plugins.parsers.llama:Llama3Json",
        kind="tool",
        markers=('{"name": function name, "parameters":',),
        description="a bare JSON object: Llama 3.1 to 3.3",
    )
    register(
        "pythonic",
        "engine_plugins.parsers.pythonic:Pythonic",
        kind="tool",
        markers=("[func_name1(",),
        architectures=("Llama4ForConditionalGeneration",),
        description="a list of Python calls: Llama 4, Llama 3.2 with such a template",
    )
    register(
        "mistral",
        "engine_plugins.parsers.mistral:Mistral",
        kind="tool",
        markers=("[TOOL_CALLS]",),
        architectures=("MistralForCausalLM",),
        description="[TOOL_CALLS] with a JSON list, or with names and [ARGS]: Mistral, Mixtral",
    )
    register(
        "deepseek_v3",
        "engine_plugins.parsers.deepseek:DeepseekV3",
        kind="tool",
        markers=(DEEPSEEK, "```json"),
        architectures=("DeepseekV3ForCausalLM",),
        description="fenced JSON between DeepSeek's marks: V3, V3-0324",
    )
    register(
        "deepseek_r1",
        "engine_plugins.parsers.deepseek:DeepseekR1",
        kind="tool",
        markers=(DEEPSEEK, "```json", "</think>"),
        description="the same, with the marks that R1 and its distilled models write in their place",
    )
    register(
        "deepseek_v31",
        "engine_plugins.parsers.deepseek:DeepseekV31",
        kind="tool",
        markers=(DEEPSEEK,),
        description="bare JSON between DeepSeek's marks: V3.1",
    )
    register(
        "deepseek-r1",
        "engine_plugins.parsers.reasoning:DeepseekR1",
        kind="reasoning",
        markers=("</think>", "<｜Assistant｜>"),
        description="<think>, opened by the prompt or taken for granted: DeepSeek R1 and its distilled models, V3.1",
    )
    register(
        "qwen3",
        "engine_plugins.parsers.reasoning:Qwen3",
        kind="reasoning",
        markers=("<think>",),
        description="<think> where the model or the prompt writes it: Qwen3, QwQ, SmolLM3, and others",
    )
