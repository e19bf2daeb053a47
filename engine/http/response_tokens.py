"""/v1/responses/input_tokens: how many tokens /v1/responses would read, without running the model."""

from typing import Any, ClassVar, Literal

from aiohttp import web

from engine.http.reading import reading_of
from engine.http.responses import (
    InputItemBody,
    NamedResponseTool,
    ResponsesBody,
    ResponseTool,
    TextBody,
    messages_of,
    sampling_of,
    wanted_of,
)
from engine.http.service import SERVICE, in_client_words
from engine.http.stored import STORE
from engine.http.tokens import tokenized
from engine.http.wire import Body, Reply, json_response
from engine.messages import Tokenize


class InputTokensBody(Body):
    """The fields of a response's body that its prompt is made of."""

    input: str | list[InputItemBody]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    text: TextBody | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = None
    conversation: Any = None
    reasoning: Any = None
    truncation: Any = None

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {
        name: ResponsesBody.unserved[name] for name in ("conversation", "reasoning", "truncation")
    }


class InputTokensReply(Reply, frozen=True):
    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


async def input_tokens(request: web.Request, body: InputTokensBody) -> web.Response:
    """Count the tokens that /v1/responses would read of the same input."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    served = {name: getattr(body, name) for name in body.__struct_fields__ if name not in body.unserved}
    asked = ResponsesBody(**served)
    sampling, wanted = sampling_of(asked), wanted_of(asked)
    earlier = []
    if body.previous_response_id is not None:
        earlier = request.app[STORE].conversation(body.previous_response_id)
    spoken = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages = [*spoken, *earlier, *messages_of(body.input)]
    with in_client_words({"messages": "input"}):
        reading = reading_of(service.front.text, sampling, messages, {}, wanted, names={"grammar": "text.format"})
        options = {"tools": reading.tools or [], "opening": reading.opening}
        found = await tokenized(service, Tokenize(None, messages, options), "input")
    return json_response(InputTokensReply(len(found.ids) // 4))
