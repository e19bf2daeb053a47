"""/v1/models: the names that the model is served under, in OpenAI's shape, or in Anthropic's for its clients."""

from datetime import UTC, datetime
from typing import Literal

from aiohttp import web

from engine.http.openapi import Route
from engine.http.service import SERVICE
from engine.http.shaping import ANTHROPIC_VERSION
from engine.http.wire import Reply, json_response


class ModelReply(Reply, frozen=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None  # null until the device is ready


class ModelList(Reply, frozen=True):
    object: Literal["list"]
    data: list[ModelReply]


class AnthropicModel(Reply, frozen=True):
    """The same in Anthropic's shape, for requests with its header."""

    id: str
    display_name: str
    created_at: str
    max_input_tokens: int | None
    max_tokens: int | None
    lifecycle: Literal["active"] = "active"
    type: Literal["model"] = "model"


class AnthropicModelList(Reply, frozen=True):
    data: list[AnthropicModel]
    first_id: str
    last_id: str
    has_more: bool = False


async def models(request: web.Request) -> web.Response:
    """List the names that the model is served under."""
    names = request.app[SERVICE].models
    if ANTHROPIC_VERSION in request.headers:
        listed = [_anthropic_model(request, name) for name in names]
        return json_response(AnthropicModelList(listed, names[0], names[-1]))
    return json_response(ModelList("list", [_model(request, name) for name in names]))


async def model(request: web.Request) -> web.Response:
    """Describe the model under one of its names."""
    name = request.match_info["model"]
    request.app[SERVICE].check_model(name)
    wording = _anthropic_model if ANTHROPIC_VERSION in request.headers else _model
    return json_response(wording(request, name))


def _model(request: web.Request, name: str) -> ModelReply:
    front = request.app[SERVICE].front
    length = None if front.info is None else front.info.max_model_len
    return ModelReply(name, "model", front.created, "engine", length)


def _anthropic_model(request: web.Request, name: str) -> AnthropicModel:
    model = _model(request, name)
    created = datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return AnthropicModel(name, name, created, model.max_model_len, model.max_model_len)


ROUTES = (
    Route("GET", "/v1/models", models, gives=ModelList, others=(AnthropicModelList,)),
    Route("GET", "/v1/models/", models, gives=ModelList, others=(AnthropicModelList,)),
    Route("GET", "/v1/models/{model:.+}", model, gives=ModelReply, others=(AnthropicModel,)),
)
