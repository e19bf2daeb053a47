"""A chat template: what it makes of a conversation, and what it is able to say.

Templates are programs of the checkpoint's. Whether one tells the model of tools, or writes past calls, nothing
declares: it is found out by rendering a small conversation once. What a template lacks is said in its messages
(tools.py). A content is one text to a template, or a list of parts where it goes through those. Pure logic. Left out:
documents; the tokens that a medium stands for.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn

import jinja2
from jinja2 import meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec import Struct
from msgspec.structs import replace

from engine.conversation.content_format import goes_through_parts
from engine.conversation.parts import Call, Message, Result, Text, has_tools, media_of, said
from engine.conversation.tools import as_written, in_other_words, with_names
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
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The conversation as the template writes it, up to where the assistant speaks.

        `tools` are those that may be called, as OpenAI writes them. `continue_final_message` ends the text inside the
        last message, for the reply to go on from there. `template_kwargs` are variables of the template's own.
        Raises RequestError when the template refuses the messages, or has no place for their media."""
        if not messages:
            raise RequestError("{messages} is empty; send at least one message", param="messages", facts={})
        begun = ""
        if continue_final_message:
            begun = _last_text(messages[-1]) if self._listed(messages[-1]) else messages[-1].text
            messages = [*messages[:-1], _left_open(messages[-1])]
        able = None
        if tools or has_tools(messages):
            able = self.abilities
            messages, tools = self._told(messages, tools)
        if self.content == "text" and (media := media_of(messages)):
            place = media[0].place
            raise RequestError(
                "the chat template has no place for {place}; send text alone", param=place, facts={"place": place}
            )
        plain = self._as_written(messages, able)
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
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """`messages` and `tools` as far as this template can say them; what it cannot is said in messages."""
        able = self.abilities
        untold = None if able.tools else tools
        told = in_other_words(with_names(messages), untold, self._syntax, calls=not able.calls, system=able.system)
        return told, tools if able.tools else None

    def _as_written(self, messages: Sequence[Message], able: "Abilities | None" = None) -> list[dict[str, Any]]:
        """`messages` as this template takes them, their calls as it is `able` to write them."""
        text, alone = (False, False) if able is None else (able.text_arguments, able.alone)
        listed = None if self.content == "text" else self._listed
        return list(as_written(messages, text_arguments=text, alone=alone, listed=listed))

    def _listed(self, message: Message) -> bool:
        """Whether it is given the content of `message` as a list of parts."""
        return self.content == "parts" or (self.content == "either" and bool(media_of([message])))

    # ── what it is able to say ───────────────────────────────────────────────────────────────

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that it reads and does not set."""
        return frozenset(meta.find_undeclared_variables(environment().parse(self._source)))

    @cached_property
    def content(self) -> Literal["text", "parts", "either"]:
        """What it takes as a message's content. One that goes through parts may write a text as it is as well: it is
        given parts only where there is more than text."""
        if not goes_through_parts(environment().parse(self._source)):
            return "text"
        return "either" if "probe" in self._render([{"role": "user", "content": "probe"}]) else "parts"

    @cached_property
    def abilities(self) -> Abilities:
        """Found out once, by rendering."""
        tools = "probe_tool" in self._probe([PROBE_USER], tools=[PROBE_TOOL])
        system = "probe_system" in self._probe([said("system", "probe_system"), PROBE_USER])
        for alone in (False, True):
            for text_arguments in (False, True):
                able = Abilities(tools, True, system, text_arguments, alone)
                text = self._probe([PROBE_USER, PROBE_CALL, PROBE_RESULT], able, tools=[PROBE_TOOL] if tools else None)
                if "probe_value" in text and "probe_result" in text:
                    return able
        return Abilities(tools, False, system)

    def reasoning_open(
        self,
        start: str,
        end: str,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> bool | None:
        """Whether a prompt of `messages` ends inside of reasoning, which stands between `start` and `end`: True right
        after its start, False right after its end, None where it says nothing of it."""
        last = messages[-1] if messages else said("user", "")
        if continue_final_message:
            begun = last.text
            return begun.rfind(start) > begun.rfind(end) if start in begun else False
        variables = json.dumps(template_kwargs or {}, sort_keys=True)
        ending = self._ending(last.role == "tool", add_generation_prompt, variables).rstrip()
        return True if ending.endswith(start) else False if ending.endswith(end) else None

    def _find_ending(self, after_tool: bool, add_generation_prompt: bool, variables: str) -> str:
        """How a prompt ends; that depends on the template's variables and on who spoke last."""
        able, messages = self.abilities, [PROBE_USER]
        if after_tool and able.calls:
            messages = [*messages, PROBE_CALL, PROBE_RESULT]
        return self._probe(messages, able, add_generation_prompt=add_generation_prompt, **json.loads(variables))

    def _probe(self, messages: Sequence[Message], able: Abilities | None = None, **variables: Any) -> str:
        return self._render(self._as_written(messages, able), **variables)

    def _render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """What it makes of `messages`; nothing where it refuses them."""
        given = {"documents": None, "tools": None, "add_generation_prompt": True, **variables}
        try:
            return self._compiled.render({**given, "messages": messages, **self._tokens})
        except Exception:  # it refuses: it is not able to say this
            return ""


PROBE_USER = said("user", "probe")
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
PROBE_CALL = Message("assistant", (Call("probe_tool", '{"probe_argument": "probe_value"}', "probe0000"),))
PROBE_RESULT = Message("tool", (Result("probe0000", (Text("probe_result"),)),), name="probe_tool")


# ── a reply that goes on ─────────────────────────────────────────────────────────────────────


def _last_text(message: Message) -> str:
    """The text that a reply goes on from, where each part is written by itself."""
    last = message.parts[-1] if message.parts else None
    return last.text if isinstance(last, Text) else ""


def _left_open(message: Message) -> Message:
    """`message` with its end marked: whatever the template puts after it is cut off once it is rendered."""
    if message.calls:
        raise RequestError(
            "the last message is a call of a tool, and no reply can go on from that; append what the tool returned",
            param="messages",
        )
    if message.role != "assistant":
        raise RequestError(
            f"continue_final_message needs a last message of the assistant's, and it is of the {message.role}'s; "
            "append the beginning of the reply",
            param="continue_final_message",
        )
    kept = message.parts[:-1] if message.parts and isinstance(message.parts[-1], Text) else message.parts
    return replace(message, parts=(*kept, Text(_last_text(message) + OPEN_END + " ")))


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
