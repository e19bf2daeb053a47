"""/v1/responses/input_tokens: how many tokens /v1/responses would read, without running the model."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from aiohttp import web

from engine.conversation.parts import said
from engine.conversation.reading import reading_of
from engine.http.fields import Rule
from engine.http.keys import owner_of
from engine.http.native.tokenize import tokenized
from engine.http.openapi import Route
from engine.http.responses.bodies import InputItemBody, ReasoningBody, ResponsesBody, TextBody, messages_of
from engine.http.responses.responses import asked_of, options_of, wanted_of
from engine.http.responses.store import STORE
from engine.http.responses.tools import ResponseTool, ResponseToolChoice
from engine.http.service import SERVICE
from engine.http.tools import FEW_MESSAGES, FEW_TOOLS
from engine.http.wire import Body, Reply, json_response
from engine.messages.text import Tokenize


class InputTokensBody(Body):
    """The fields of a response's body that its prompt is made of."""

    input: str | Annotated[list[InputItemBody], FEW_MESSAGES]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    text: TextBody | None = None
    tools: Annotated[list[ResponseTool], FEW_TOOLS] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningBody | None = None
    conversation: Any = None
    truncation: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {name: ResponsesBody.rules[name] for name in ("conversation", "truncation")}


class InputTokensReply(Reply, frozen=True):
    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


async def input_tokens(request: web.Request, body: InputTokensBody) -> web.Response:
    """Count the tokens that /v1/responses would read of the same input."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    served = {name: getattr(body, name) for name in body.__struct_fields__ if name not in body.rules}
    asked = ResponsesBody(**served)
    (sampling, _), wanted = asked_of(request, asked), wanted_of(asked)
    earlier = []
    if body.previous_response_id is not None:
        earlier = request.app[STORE].conversation(body.previous_response_id, owner_of(request))
    spoken = [said("system", body.instructions)] if body.instructions else []
    messages = [*spoken, *earlier, *messages_of(body.input)]
    how = options_of(request, asked, wanted)
    reading = reading_of(service.front.text, sampling, messages, how, wanted)
    options = {"tools": reading.tools or [], "opening": reading.opening, **how}
    found = await tokenized(service, Tokenize(None, messages, options))
    return json_response(InputTokensReply(len(found.ids) // 4))


ROUTES = (
    Route(
        "POST",
        "/v1/responses/input_tokens",
        input_tokens,
        takes=InputTokensBody,
        gives=InputTokensReply,
        kept="previous_response_id",
    ),
)
