"""What every API with tools says of them in its bodies, and the checks of it.

What else APIs that take conversations share is here too: how many messages and tools a request may have, and the
`detail` of pictures.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta

from engine.conversation.calls import Tool
from engine.conversation.parts import Message, said, with_calls
from engine.errors import RequestError
from engine.http.fields import Only, hint
from engine.params.grammar import check_nesting

TOOL_NAME = r"^[A-Za-z0-9_.\-]{1,128}$"
ToolName = Annotated[str, Meta(pattern=TOOL_NAME)]
# More than any honest client has. What all of them may hold together is in parts.py.
FEW_MESSAGES = Meta(max_length=10_000)
FEW_TOOLS = Meta(max_length=1024)
# That programs of the server's may call a tool as well, which there are none of.
CALLED_DIRECTLY = hint(
    ["direct"], only=Only('a list with "direct"', lambda value: isinstance(value, list) and "direct" in value)
)
Item = TypeVar("Item")
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def input_messages(input: str | Sequence[Item], message_of: Callable[[Item, str], Message]) -> list[Message]:
    """`input`, a text or items that `message_of` reads each, as messages: calls and reasoning are part of what the
    assistant said."""
    if isinstance(input, str):
        return [said("user", input)]
    if not input:
        raise RequestError("input is empty; send at least one message", param="input")
    return with_calls(message_of(item, f"input[{index}]") for index, item in enumerate(input))


def tool_of(
    name: str, parameters: dict[str, Any] | None, description: str | None, strict: bool | None, path: str
) -> Tool:
    """One tool, whose schema of parameters the client calls `path`. Raises RequestError unless that is of an object."""
    kind = "object" if parameters is None else parameters.get("type", "object")
    if kind != "object":
        raise RequestError(
            f"{path}.type is {kind!r:.80}; arguments come by name, so the schema must be of an object", param=path
        )
    check_nesting(parameters, path)
    return Tool(name, None if parameters is None else {"type": "object", **parameters}, description, bool(strict))


def checked(tools: list[Tool]) -> list[Tool]:
    """Raises RequestError where two of `tools` have one name."""
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in names:
            message = f"two tools are called {tool.name!r}; give each a name of its own"
            raise RequestError(message, param=f"tools[{index}]")
        names.add(tool.name)
    return tools


def among(tools: list[Tool], names: Sequence[str], path: str) -> list[Tool]:
    """Those of `tools` that the client lists in `path`, as if it had sent no others."""
    known = {tool.name: tool for tool in tools}
    for index, name in enumerate(names):
        if name not in known:
            raise RequestError(
                f"{path}[{index}] names {name!r:.200}, which is no tool of the request; its tools: "
                f"{', '.join(known) or 'none at all'}",
                param=path,
            )
    if not names:
        raise RequestError(f"{path} is empty; allow at least one tool, or send tool_choice none", param=path)
    return [tool for tool in tools if tool.name in names]
