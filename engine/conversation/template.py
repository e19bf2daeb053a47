"""A chat template: what it makes of a conversation, and what it is able to say.

Templates are programs of the checkpoint's. Whether one tells the model of tools, or writes past calls, nothing
declares: it is found out by rendering a small conversation once. What a template lacks is said in its messages
(tools.py). Pure logic. Left out: documents and media.
"""

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec import Struct

from engine.conversation.tools import as_written, in_other_words, plain_message, with_names
from engine.errors import ConfigError, RequestError
from engine.plugin.parsing import CallSyntax

OPEN_END = "\ue000 the reply goes on here \ue000"  # private-use characters: no text holds this by chance
ENDINGS = 64  # ends of prompts that are remembered, by the variables of the template that they follow from


class Abilities(Struct, frozen=True):
    """What a template does with what it is given: describes `tools`, writes past `calls` and their results, takes a
    `system` message. `text_arguments` and `alone` are how it wants calls, as `as_written` has it."""

    tools: bool
    calls: bool
    system: bool
    text_arguments: bool = False
    alone: bool = False


class ChatTemplate:
    """One compiled template. `tokens` are special tokens by the names that it knows ("bos_token"), `syntax` is how the
    model is told to write calls if the template does not say it.

    Raises ConfigError when it is malformed."""

    def __init__(self, source: str, tokens: Mapping[str, str], syntax: CallSyntax) -> None:
        self._compiled = compile_template(source)
        self._source = source
        self._tokens = dict(tokens)
        self._syntax = syntax
        self._ending = lru_cache(ENDINGS)(self._find_ending)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The conversation as the template writes it, up to where the assistant speaks.

        `tools` are those that may be called, as OpenAI writes them. `continue_final_message` ends the text inside the
        last message, for the reply to go on from there. `template_kwargs` are variables of the template's own.
        Raises RequestError for malformed messages, and when the template refuses them."""
        if not messages:
            raise RequestError("{messages} is empty; send at least one message", param="messages", facts={})
        plain = [plain_message(index, message) for index, message in enumerate(messages)]
        begun = plain[-1]["content"]
        if continue_final_message:
            plain[-1] = _left_open(plain[-1])
        if tools or any(message["role"] == "tool" or "tool_calls" in message for message in plain):
            plain, tools = self._told(plain, tools)
        own = {
            "messages": plain,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "tools": tools or None,
            **self._tokens,
        }
        if taken := sorted(own.keys() & (template_kwargs or {})):
            raise RequestError(
                "{chat_template_kwargs} sets {taken}, which the request itself does; leave it out there",
                param="chat_template_kwargs",
                facts={"taken": ", ".join(taken)},
            )
        try:
            text = self._compiled.render({"documents": None, **(template_kwargs or {}), **own})
        except Exception as error:  # the template is a program of the checkpoint's: it may raise anything
            raise RequestError(f"the chat template refuses the messages: {error}", param="messages") from error
        return _up_to_mark(text, begun) if continue_final_message else text

    def _told(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """`messages` and `tools` as this template takes them; what it cannot say is said in messages."""
        able = self.abilities
        named = with_names(messages)
        messages = list(as_written(named, text_arguments=able.text_arguments, alone=able.alone))
        untold = None if able.tools else tools
        if able.calls and untold is None:
            return messages, tools
        messages = in_other_words(messages, untold, self._syntax, calls=not able.calls, system=able.system)
        return messages, tools if able.tools else None

    # ── what it is able to say ───────────────────────────────────────────────────────────────

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that it reads and does not set."""
        return frozenset(meta.find_undeclared_variables(environment().parse(self._source)))

    @cached_property
    def abilities(self) -> Abilities:
        """Found out once, by rendering."""
        tools = "probe_tool" in self._probe([PROBE_USER], tools=[PROBE_TOOL])
        system = "probe_system" in self._probe([{"role": "system", "content": "probe_system"}, PROBE_USER])
        for alone in (False, True):
            for text_arguments in (False, True):
                called = as_written([PROBE_USER, PROBE_CALL, PROBE_RESULT], text_arguments=text_arguments, alone=alone)
                text = self._probe(list(called), tools=[PROBE_TOOL] if tools else None)
                if "probe_value" in text and "probe_result" in text:
                    return Abilities(tools, True, system, text_arguments, alone)
        return Abilities(tools, False, system)

    def reasoning_open(
        self,
        start: str,
        end: str,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> bool | None:
        """Whether a prompt of `messages` ends inside of reasoning, which stands between `start` and `end`: True right
        after its start, False right after its end, None where it says nothing of it."""
        last = messages[-1] if messages else {}
        if continue_final_message:
            said = str(last.get("content") or "")
            return said.rfind(start) > said.rfind(end) if start in said else False
        variables = json.dumps(template_kwargs or {}, sort_keys=True)
        ending = self._ending(last.get("role") == "tool", add_generation_prompt, variables).rstrip()
        return True if ending.endswith(start) else False if ending.endswith(end) else None

    def _find_ending(self, after_tool: bool, add_generation_prompt: bool, variables: str) -> str:
        """How a prompt ends; that depends on the template's variables and on who spoke last."""
        able, messages = self.abilities, [PROBE_USER]
        if after_tool and able.calls:
            messages += as_written([PROBE_CALL, PROBE_RESULT], text_arguments=able.text_arguments, alone=able.alone)
        return self._probe(messages, add_generation_prompt=add_generation_prompt, **json.loads(variables))

    def _probe(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        given = {"documents": None, "tools": None, "add_generation_prompt": True, **variables}
        try:
            return self._compiled.render({**given, "messages": messages, **self._tokens})
        except Exception:  # it refuses: it is not able to say this
            return ""


PROBE_USER: dict[str, Any] = {"role": "user", "content": "probe"}
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe",
        "parameters": {
            "type": "object",
            "properties": {"probe_argument": {"type": "string", "description": "probe"}},
            "required": ["probe_argument"],
        },
    },
}
PROBE_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "probe0000",
            "type": "function",
            "function": {"name": "probe_tool", "arguments": '{"probe_argument": "probe_value"}'},
        }
    ],
}
PROBE_RESULT: dict[str, Any] = {
    "role": "tool",
    "tool_call_id": "probe0000",
    "name": "probe_tool",
    "content": "probe_result",
}


# ── a reply that goes on ─────────────────────────────────────────────────────────────────────


def _left_open(message: dict[str, Any]) -> dict[str, Any]:
    """`message` with its end marked: whatever the template puts after it is cut off once it is rendered."""
    if "tool_calls" in message:
        raise RequestError(
            "the last message is a call of a tool, and no reply can go on from that; append what the tool returned",
            param="messages",
        )
    if message["role"] != "assistant":
        raise RequestError(
            f"continue_final_message needs a last message of the assistant's, and it is of the {message['role']}'s; "
            "append the beginning of the reply",
            param="continue_final_message",
        )
    return {**message, "content": message["content"] + OPEN_END + " "}


def _up_to_mark(text: str, begun: str) -> str:
    """`text` up to where the message `begun` was left open; a template that trims messages trims this one, too."""
    before, mark, after = text.rpartition(OPEN_END)
    if not mark or begun.strip() not in text:
        raise RequestError(
            "the chat template leaves out the last message, or a part of it, so it cannot be continued; drop "
            "continue_final_message",
            param="continue_final_message",
        )
    return before if after.startswith(" ") else before.rstrip()


# ── the language ─────────────────────────────────────────────────────────────────────────────


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is just its content, in a scope of its
    own: what is set in it is not known after it."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


def read_template(option: str | None) -> str | None:
    """The template that --chat-template names: a file's content, or the option itself where it holds Jinja.

    Raises ConfigError when there is no such file, or the template is malformed."""
    if option is None:
        return None
    source = option
    if "{{" not in option and "{%" not in option:
        try:
            source = Path(option).read_text()
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(
                f"--chat-template {option!r:.200} cannot be read ({error}); give a text file with a Jinja template, "
                "or a template itself, with {{ }} or {% %} in it"
            ) from None
    compile_template(source)
    return source


def requested(tokens: Mapping[str, str], syntax: CallSyntax) -> Callable[[str], ChatTemplate]:
    """Compiles a template that a request brings; that raises RequestError when it is malformed."""

    def compiled(source: str) -> ChatTemplate:
        try:
            return ChatTemplate(source, tokens, syntax)
        except ConfigError as error:
            raise RequestError(f"{error}; correct it, or leave chat_template out", param="chat_template") from None
        except Exception as error:  # jinja2 and Python refuse some in ways of their own: nesting, long numbers
            raise RequestError(
                f"the chat template does not compile ({type(error).__name__}: {error}); simplify it",
                param="chat_template",
            ) from error

    return compiled


def compile_template(source: str) -> jinja2.Template:
    """A chat template in jinja2's sandbox. Raises ConfigError when it is malformed."""
    try:
        return environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template is malformed at line {error.lineno}: {error.message}") from error


def environment() -> ImmutableSandboxedEnvironment:
    """jinja2's sandbox with the names that Hugging Face gives templates."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # in this order, as transformers has it; jinja2's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    return made
