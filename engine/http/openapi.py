"""One route, declared once: aiohttp serves it and the OpenAPI document describes it from the same `Route`.

The document cannot say what the server does not do: the struct that decodes a body is the struct that describes
it, a field that is known but not served yet is described by the only values it takes, and a reply is described
where it is a struct. Left out: schemas of the replies that are written piece by piece for speed.
"""

import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import Struct

from engine import __version__
from engine.http.wire import Body, BodyDecoder, bodies_in, json_response
from engine.sampling import INT32_MAX, MAX_LOGPROBS, MAX_PENALTY, MAX_REPETITION

REFERENCE = "#/components/schemas/{name}"
# The bounds of sampling parameters that are numbers. `check_sampling` holds requests to them, with better words than
# a decoder has; a test holds the two together.
RANGES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "temperature": {"minimum": 0, "maximum": 2},
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "min_p": {"minimum": 0, "maximum": 1},
        "top_k": {"minimum": -1, "maximum": INT32_MAX},
        "seed": {"minimum": -(2**63), "maximum": 2**63 - 1},
        "max_tokens": {"minimum": 1, "maximum": INT32_MAX},
        "min_tokens": {"minimum": 0, "maximum": INT32_MAX},
        "presence_penalty": {"minimum": -MAX_PENALTY, "maximum": MAX_PENALTY},
        "frequency_penalty": {"minimum": -MAX_PENALTY, "maximum": MAX_PENALTY},
        "repetition_penalty": {"exclusiveMinimum": 0, "maximum": MAX_REPETITION},
        "logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
        "prompt_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    }
)
CLIENT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "max_completion_tokens": "max_tokens",
        "max_new_tokens": "max_tokens",
        "max_output_tokens": "max_tokens",
        "min_new_tokens": "min_tokens",
        "sampling_seed": "seed",
        "top_logprobs": "logprobs",
    }
)


class Reply(Struct):
    """Base of a JSON answer that is described."""


class ErrorFields(Reply):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorReply(Reply):
    error: ErrorFields


class Route(Struct, frozen=True):
    """One method of one path. `takes` is the handler's second argument: a body, or the query of a GET.

    It answers with `gives`, or with `unready` at status 503; `error` is the shape of its errors. `open` routes ask
    for no API key. `content` is the type of what is not JSON.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    handler: Callable[..., Awaitable[web.StreamResponse]]
    takes: type[Body] | None = None
    gives: type[Struct] | None = None
    unready: type[Struct] | None = None
    streams: bool = False
    open: bool = False
    content: str = "application/json"
    error: type[Struct] = ErrorReply

    @property
    def public_path(self) -> str:
        """The path as OpenAPI writes it: without the patterns of its parameters."""
        return re.sub(r"\{(\w+):[^}]*\}", r"{\1}", self.path)

    def served(self) -> web.RouteDef:
        """The route for aiohttp; its handler gets what the request carries as `takes`."""
        return web.route(self.method, self.path, self._decoding())

    def _decoding(self) -> Handler:
        if self.takes is None:
            return self.handler
        decoder = BodyDecoder(self.takes)

        async def with_query(request: web.Request) -> web.StreamResponse:
            return await self.handler(request, decoder.query(request.query))

        async def with_body(request: web.Request) -> web.StreamResponse:
            return await self.handler(request, decoder.decode(await request.read()))

        return with_query if self.method == "GET" else with_body


# ── the document ─────────────────────────────────────────────────────────────────────────────


def describe(routes: Sequence[Route], *, models: Sequence[str], keyed: bool) -> dict[str, Any]:
    """OpenAPI 3.1 of `routes`; `models` are the names served, `keyed` says that the server asks for an API key."""
    kinds = [kind for route in routes for kind in (route.takes, route.gives, route.unready, route.error) if kind]
    _, schemas = msgspec.json.schema_components(dict.fromkeys(kinds), ref_template=REFERENCE)
    for kind in _with_parts(route.takes for route in routes if route.takes):
        _bound(schemas[kind.__name__])
        _describe_unserved(kind, schemas[kind.__name__])
        if "model" in kind.__struct_fields__:
            schemas[kind.__name__]["properties"]["model"] = {"enum": [*models, None], "default": None}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.public_path, {})[route.method.lower()] = _operation(route, schemas, keyed=keyed)
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "engine", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas} | ({"securitySchemes": schemes} if keyed else {}),
    }


def _with_parts(kinds: Iterable[type[Body]]) -> set[type[Body]]:
    """`kinds` and every body inside them."""
    found: set[type[Body]] = set()
    waiting = list(kinds)
    while waiting:
        kind = waiting.pop()
        if kind not in found:
            found.add(kind)
            waiting += bodies_in(kind)
    return found


def _bound(schema: dict[str, Any]) -> None:
    """Add the bounds of the sampling parameters in the schema of a body."""
    for name, described in schema["properties"].items():
        for either in described.get("anyOf", [described]):
            if either.get("type") in ("integer", "number"):
                either |= {**RANGES.get(CLIENT_NAMES.get(name, name), {}), **either}


def _describe_unserved(kind: type[Body], schema: dict[str, Any]) -> None:
    for name, neutral in kind.unserved.items():
        schema["properties"][name] = {"description": "not served yet", "enum": [*neutral, None], "default": None}


def _operation(route: Route, schemas: dict[str, Any], *, keyed: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.public_path}").rstrip("_"),
        "summary": (inspect.getdoc(route.handler) or "").partition("\n\n")[0].replace("\n", " "),
        "responses": {"200": _answer(route)},
    }
    if route.unready is not None:
        operation["responses"]["503"] = {"description": "not now", "content": _json(route.unready)}
    operation["responses"]["default"] = {"description": "an error for people", "content": _json(route.error)}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)\}", route.public_path)
    ]
    if route.takes is not None and route.method == "GET":
        fields = schemas[route.takes.__name__]["properties"]
        parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in fields.items()]
    elif route.takes is not None:
        required = bool(schemas[route.takes.__name__].get("required"))
        operation["requestBody"] = {"required": required, "content": _json(route.takes)}
    if parameters:
        operation["parameters"] = parameters
    if keyed and not route.open:
        operation["security"] = [{"bearer": []}, {"key": []}]
    return operation


def _answer(route: Route) -> dict[str, Any]:
    content: dict[str, Any] = {route.content: {}} if route.gives is None else _json(route.gives)
    if route.streams:
        content["text/event-stream"] = {}
    return {"description": "the answer", "content": content}


def _json(kind: type[Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REFERENCE.format(name=kind.__name__)}}}


DOCUMENT = web.AppKey("document", bytes)


async def openapi_document(request: web.Request) -> web.Response:
    """Describe every route: the OpenAPI document."""
    return json_response(request.app[DOCUMENT])
