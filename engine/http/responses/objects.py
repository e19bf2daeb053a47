"""What /v1/responses answers: a response object, as OpenAI has it, and what of it only says what was asked."""

from typing import Any, Literal

from engine.http.responses.items import OutputItem
from engine.http.wire import Reply

Status = Literal["queued", "in_progress", "completed", "incomplete", "cancelled", "failed"]


class ResponseError(Reply, frozen=True):
    code: Literal["invalid_prompt", "server_error"]
    message: str
    param: str | None


class IncompleteDetails(Reply, frozen=True):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class InputTokensDetails(Reply, frozen=True):
    cached_tokens: int


class OutputTokensDetails(Reply, frozen=True):
    reasoning_tokens: int = 0


class ResponseUsage(Reply, frozen=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    total_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()


class Reasoning(Reply, frozen=True):
    """What was asked of reasoning; there are no summaries."""

    effort: str | None = None
    summary: None = None


class FunctionTool(Reply, frozen=True):
    """A tool that the request offered."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool
    type: Literal["function"] = "function"


class ChosenTool(Reply, frozen=True):
    """The tool that is to be called."""

    name: str
    type: Literal["function"] = "function"


class PlainText(Reply, frozen=True, tag_field="type", tag="text"):
    """Any text."""


class ObjectText(Reply, frozen=True, tag_field="type", tag="json_object"):
    """A JSON object."""


class SchemaText(Reply, frozen=True, tag_field="type", tag="json_schema"):
    """JSON of a JSON schema."""

    name: str | None
    schema: dict[str, Any] | bool
    strict: bool | None
    description: str | None = None


class TextOptions(Reply, frozen=True):
    format: PlainText | ObjectText | SchemaText = PlainText()


class Asked(Reply, kw_only=True, frozen=True):
    """The fields of a response that only say what was asked, or could have been."""

    model: str
    instructions: str | None
    previous_response_id: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    background: bool
    store: bool
    metadata: dict[str, str]
    parallel_tool_calls: bool = True
    reasoning: Reasoning = Reasoning()
    service_tier: Literal["default"] = "default"
    text: TextOptions = TextOptions()
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = "auto"
    tools: tuple[FunctionTool, ...] = ()
    top_logprobs: int = 0
    truncation: Literal["disabled"] = "disabled"


class ResponseObject(Asked, kw_only=True, frozen=True):
    """A response as it is at some time; `usage` comes with its end."""

    id: str
    created_at: int
    completed_at: int | None
    status: Status
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    output: list[OutputItem]
    usage: ResponseUsage | None
    object: Literal["response"] = "response"
