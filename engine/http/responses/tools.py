"""The tools of a response: functions, alone or in namespaces.

A function in a namespace is told to the model as `namespace.name`, and told apart again in its calls. Tools that the
server would run, or that are called in another way than a function is, are left out: the model does not learn of them.
Refused are those without which a reply would lack what the client has: its files, its servers, its programs.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from engine.conversation.calls import Tool
from engine.conversation.reading import Wanted
from engine.errors import RequestError
from engine.http.fields import LABEL, Rule, hint
from engine.http.tools import CALLED_DIRECTLY, FEW_TOOLS, ToolName, among, checked, tool_of
from engine.http.wire import Body


class ResponseFunction(Body, tag_field="type", tag="function", kw_only=True):
    name: ToolName
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None
    allowed_callers: Any = None
    cache_control: Any = None
    defer_loading: Any = None
    output_schema: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "allowed_callers": CALLED_DIRECTLY,
        "cache_control": LABEL,
        "defer_loading": hint(False),  # the model is told of it at once
        "output_schema": LABEL,
    }


class LeftOut(Body, tag_field="type", forbid_unknown_fields=False):
    """A tool of which the model is not told."""

    whole: ClassVar[Rule | None] = hint()


class CustomTool(LeftOut, tag="custom"):
    pass


class LocalShell(LeftOut, tag="local_shell"):
    pass


class Shell(LeftOut, tag="shell"):
    pass


class ApplyPatch(LeftOut, tag="apply_patch"):
    pass


class ImageGeneration(LeftOut, tag="image_generation"):
    pass


class ToolSearch(LeftOut, tag="tool_search"):
    pass


class WebSearch(LeftOut, tag="web_search"):
    pass


class WebSearch2025(LeftOut, tag="web_search_2025_08_26"):
    pass


class WebSearchPreview(LeftOut, tag="web_search_preview"):
    pass


class WebSearchPreview2025(LeftOut, tag="web_search_preview_2025_03_11"):
    pass


class NamespaceBody(Body, tag_field="type", tag="namespace", kw_only=True):
    name: ToolName
    tools: Annotated[list[ResponseFunction | CustomTool], FEW_TOOLS]
    description: str | None = None


ResponseTool = (
    ResponseFunction | NamespaceBody | CustomTool | LocalShell | Shell | ApplyPatch | ImageGeneration | ToolSearch
    | WebSearch | WebSearch2025 | WebSearchPreview | WebSearchPreview2025
)  # fmt: skip


class NamedResponseTool(Body, tag_field="type", tag="function"):
    """A tool of a namespace is named as `namespace.name`."""

    name: str


class AllowedTool(Body):
    name: str
    type: Literal["function"] = "function"
    namespace: str | None = None


class AllowedResponseTools(Body, tag_field="type", tag="allowed_tools"):
    """As if no other tools had been sent."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], FEW_TOOLS]


ResponseToolChoice = Literal["none", "auto", "required"] | NamedResponseTool | AllowedResponseTools


def full_name(name: str, namespace: str | None) -> str:
    """What the model knows the function `name` as."""
    return f"{namespace}.{name}" if namespace else name


def wanted_tools(given: list[ResponseTool] | None, choice: ResponseToolChoice | None, parallel: bool | None) -> Wanted:
    """What the client says of tools. Raises RequestError where it contradicts itself."""
    tools = checked([tool for index, body in enumerate(given or ()) for tool in _tools(body, f"tools[{index}]")])
    several = parallel is not False
    match choice:
        case NamedResponseTool(name):
            return Wanted(tools, "required", name, several)
        case AllowedResponseTools(mode, allowed):
            names = [full_name(one.name, one.namespace) for one in allowed]
            few = among(tools, names, "tool_choice.tools")
            return Wanted(few, mode, None, several, held=len(few) < len(tools))
    return Wanted(tools, choice or "auto", None, several)


def _tools(body: ResponseTool, path: str) -> Iterator[Tool]:
    """The functions of one entry of `tools`, which the client calls `path`."""
    match body:
        case ResponseFunction():
            yield _tool(body, f"{path}.parameters")
        case NamespaceBody():
            if "." in body.name:
                message = f"{path}.name is {body.name!r}, and a namespace has no point in its name; take another one"
                raise RequestError(message, param=f"{path}.name")
            for index, inner in enumerate(body.tools):
                if isinstance(inner, ResponseFunction):
                    tool = _tool(inner, f"{path}.tools[{index}].parameters")
                    name = full_name(tool.name, body.name)
                    yield msgspec.structs.replace(tool, name=name, namespace=body.name)


def _tool(body: ResponseFunction, path: str) -> Tool:
    return tool_of(body.name, body.parameters, body.description, body.strict, path)
