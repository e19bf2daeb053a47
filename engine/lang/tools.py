"""Tools of a program: Python functions that the model may call while it answers.

A function's parameters become a JSON schema by their annotations, and its docstring describes it. The arguments that
the model writes are checked against these: the model is told where they are wrong, and may call again. What the
function itself raises ends the state, as any mistake of the program's. Left out: who asks the model (calls.py).
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_type_hints

import anyio.to_thread
import msgspec
from msgspec import Struct

from engine.errors import ConfigError


class ToolCall(Struct, frozen=True):
    """A call that the model has made; `arguments` is JSON."""

    name: str
    arguments: str
    id: str | None = None

    def written(self) -> dict[str, Any]:
        """As OpenAI's messages have it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class Tool:
    """One function. `described` is it in OpenAI's words."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Raises ConfigError for a function without a name, or with parameters that are not had by name."""
        self.name = getattr(function, "__name__", "")
        if not self.name.isidentifier():
            raise ConfigError(f"{function!r:.80} has no name that a model could call; give a function")
        self._function = function
        self._arguments = _struct_of(self.name, function)
        _, components = msgspec.json.schema_components([self._arguments], ref_template="#/$defs/{name}")
        parameters = components.pop(self._arguments.__name__)
        parameters |= {"$defs": components} if components else {}
        about = {"description": text} if (text := inspect.getdoc(function)) else {}
        parameters.pop("title", None)
        self.described: dict[str, Any] = {
            "type": "function",
            "function": {"name": self.name, **about, "parameters": parameters},
        }

    async def call(self, arguments: str) -> str:
        """What the function returns, as text: a string as it is, all else as JSON. A coroutine function is awaited,
        another runs in a thread. Of wrong arguments the text says what is wrong."""
        try:
            given = msgspec.json.decode(arguments or "{}", type=self._arguments)
        except msgspec.DecodeError as error:
            return f"Error: the arguments are wrong: {error}"
        named = {name: getattr(given, name) for name in given.__struct_fields__}
        if inspect.iscoroutinefunction(self._function):
            found = await self._function(**named)
        else:
            found = await anyio.to_thread.run_sync(partial(self._function, **named), abandon_on_cancel=True)
        return found if isinstance(found, str) else msgspec.json.encode(found).decode()


def _struct_of(name: str, function: Callable[..., Any]) -> type[Struct]:
    hints = get_type_hints(function, include_extras=True)
    fields: list[Any] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"the tool {name} takes {parameter}; models give arguments by name, so spell them out")
        kind = hints.get(parameter.name, str)
        optional = parameter.default is not parameter.empty
        fields.append((parameter.name, kind, parameter.default) if optional else (parameter.name, kind))
    return msgspec.defstruct(name, fields, forbid_unknown_fields=True, kw_only=True)


def tools_of(functions: Sequence[Callable[..., Any] | Tool]) -> dict[str, Tool]:
    """Tools by name. Raises ConfigError where two have one name."""
    found: dict[str, Tool] = {}
    for function in functions:
        tool = function if isinstance(function, Tool) else Tool(function)
        if tool.name in found:
            raise ConfigError(f"two tools are called {tool.name}; give each a name of its own")
        found[tool.name] = tool
    return found
