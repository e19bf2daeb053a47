"""Which parser a model gets, and why."""

import logging

import pytest

from engine.config import ServerOptions, resolve
from engine.conversation.parsers import choose_parser, choose_parsers
from engine.errors import PluginError
from engine.plugin.registry import Plugins

PLUGINS = Plugins.load()
# What the templates of the families hold, by which they are known.
QWEN3 = 'x {\\"name\\": <name>, \\"arguments\\": <args>} in <tool_call> … <think> {% if enable_thinking %}'
THINKING = 'x {"name": <name>, "arguments": <args>} in <tool_call> … <think>'
XML = "<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1> … '<think>\\n'"
LLAMA = 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}'
MISTRAL = "{{ '[TOOL_CALLS] [' }}"
DEEPSEEK = "<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
PYTHONIC = "Respond in the format [func_name1(params_name1=params_value1)]"


@pytest.mark.parametrize(
    ("template", "architecture", "tool", "reasoning"),
    [
        (QWEN3, "Qwen3ForCausalLM", "hermes", "qwen3"),
        (THINKING, "Qwen3ForCausalLM", "hermes", "qwen3"),
        (XML, "Qwen3_5ForConditionalGeneration", "qwen3_coder", "qwen3"),
        (XML, "Qwen3NextForCausalLM", "qwen3_coder", "qwen3"),  # of Qwen3-Coder-Next; Qwen3-Next writes JSON
        (QWEN3, "Qwen3NextForCausalLM", "hermes", "qwen3"),
        ("", "Qwen3_5MoeForConditionalGeneration", "qwen3_coder", None),
        ("", "Qwen2ForCausalLM", "hermes", None),
        (LLAMA, "LlamaForCausalLM", "llama3_json", None),
        (PYTHONIC, "LlamaForCausalLM", "pythonic", None),
        ("", "Llama4ForConditionalGeneration", "pythonic", None),
        (MISTRAL, "MistralForCausalLM", "mistral", None),
        ("", "MistralForCausalLM", "mistral", None),
        (DEEPSEEK + "```json", "DeepseekV3ForCausalLM", "deepseek_v3", None),
        (DEEPSEEK + "```json <think> </think>", "Qwen2ForCausalLM", "deepseek_r1", "deepseek-r1"),
        (DEEPSEEK + "<think> </think>", "DeepseekV3ForCausalLM", "deepseek_v31", "deepseek-r1"),
        ("", "DeepseekV3ForCausalLM", "deepseek_v3", None),
        ("{{ messages }}", "LlamaForCausalLM", "hermes", None),  # of no known family
        (None, "EchoForTests", "hermes", None),
    ],
)
def test_the_automatic_choice(template: str | None, architecture: str, tool: str, reasoning: str | None) -> None:
    found, reason = choose_parser(PLUGINS, "tool", "auto", [architecture], template)
    assert found is not None and found.name == tool and reason
    found, reason = choose_parser(PLUGINS, "reasoning", "auto", [architecture], template)
    assert (found and found.name) == reasoning and reason


def test_a_name_wins(caplog: pytest.LogCaptureFixture) -> None:
    options = resolve({"tool_parser": "pythonic", "reasoning_parser": "none"}).server
    with caplog.at_level(logging.INFO):
        chosen = choose_parsers(PLUGINS, options, ["Qwen3ForCausalLM"], QWEN3)
    assert chosen.tool is not None and chosen.tool.__name__ == "Pythonic" and chosen.reasoning is None
    assert caplog.messages == [
        "tool parser: pythonic (--tool-parser)",
        "reasoning parser: none (--reasoning-parser none)",
    ]
    with caplog.at_level(logging.INFO):
        caplog.clear()
        choose_parsers(PLUGINS, ServerOptions(), [], QWEN3)
    assert caplog.messages[0] == 'tool parser: hermes (the chat template has <tool_call> and "arguments":)'


def test_a_parser_named_in_plugins_wins_over_the_automatic_choice() -> None:
    found, reason = choose_parser(Plugins.load(["mistral", "qwen3"]), "tool", "auto", ["Qwen3ForCausalLM"], QWEN3)
    assert (found and found.name, reason) == ("mistral", "named in --plugins")
    with pytest.raises(PluginError, match="tool parsers hermes and mistral; choose one with --tool-parser"):
        choose_parser(Plugins.load(["mistral", "hermes"]), "tool", "auto", [], None)


def test_another_name_for_the_same() -> None:
    entries = PLUGINS.entries("parsers")
    assert entries["qwen"].target == entries["hermes"].target
    assert entries["qwen3_xml"].target == entries["qwen3_coder"].target


@pytest.mark.parametrize(
    ("option", "name", "says"),
    [
        ("tool_parser", "hermès", r"unknown tool parser 'hermès'; did you mean 'hermes'\?; known: auto, none, hermes"),
        ("reasoning_parser", "hermes", "unknown reasoning parser 'hermes'.*qwen3"),  # of the other kind
    ],
)
@pytest.mark.anyio
async def test_an_unknown_name_stops_the_start(option: str, name: str, says: str) -> None:
    from engine.runtime.launch import open_front

    with pytest.raises(PluginError, match=says):
        async with open_front(resolve({"model": "echo", option: name})):
            pass


@pytest.mark.anyio
async def test_the_parsers_of_an_engine() -> None:
    from house import open_house

    async with open_house(tool_parser="mistral") as house:
        assert house.front.text is not None
        assert house.front.text.parsers.tool is not None and house.front.text.parsers.tool.__name__ == "Mistral"
