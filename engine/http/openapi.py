"""One route, declared once: aiohttp serves it and the OpenAPI document describes it from the same `Route`.

The document cannot say what the server does not do: the struct that decodes a body is the struct that describes
it, a field that is not served is described by its rule, a refused one by the only values that it takes, and the
structs that are encoded as a reply, or as the events of a stream, are those that describe it.
"""

import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

import anyio.lowlevel
import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import UNSET, Struct

from engine import __version__
from engine.http.fields import IGNORED
from engine.http.intake import read_body, release_body, without_expecting
from engine.http.parts import UNCOUNTED, check_parts
from engine.http.passing import passed_on
from engine.http.wire import Body, BodyDecoder, Reply, StructType, ignored_fields, json_response, structs_in
from engine.params.sampling import APIS, FIELDS, RANGES

REFERENCE = "#/components/schemas/{name}"
# Every name that an API has for a sampling field that is a number, and its bounds: `check_sampling` holds requests to
# them, with better words than a decoder has.
BOUNDS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {name: RANGES[field.name] for api in APIS for field in FIELDS if field.name in RANGES for name in field.names(api)}
)


class ErrorFields(Reply, frozen=True):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorReply(Reply, frozen=True):
    error: ErrorFields


class Route(Struct, frozen=True):
    """One method of one path. `takes` is the handler's second argument: a body, or the query of a GET or a DELETE.

    It answers with `gives` (or, for clients of other APIs, with one of `others`), or with `unready` at status 503, or
    streams `events`, the last of which is "[DONE]" if `done`; `error` is the shape of its errors. `open` routes ask for
    no API key. `content` is the type of what is not JSON. `kept` is the parameter of the path, or the field of the
    body, that is the id of something that one front has: others pass the request on to that (`passing`).
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    handler: Callable[..., Awaitable[web.StreamResponse]]
    takes: type[Body] | None = None
    gives: Any = None
    others: tuple[type[Struct], ...] = ()
    unready: type[Struct] | None = None
    events: tuple[type[Struct], ...] = ()
    done: bool = True
    open: bool = False
    content: str = "application/json"
    error: type[Struct] = ErrorReply
    kept: str = ""

    @property
    def public_path(self) -> str:
        """The path as OpenAPI writes it: without the patterns of its parameters."""
        return re.sub(r"\{(\w+):[^}]*\}", r"{\1}", self.path)

    @property
    def queried(self) -> bool:
        """Whether `takes` is read from the query."""
        return self.method in ("GET", "DELETE")

    def served(self, *, strict: bool = False) -> web.RouteDef:
        """The route for aiohttp; its handler gets what the request carries as `takes`. If `strict`, hints are
        refused."""
        handler = self._decoding(strict)
        if f"{{{self.kept}}}" in self.path:
            handler = self._passing(handler)
        return web.route(self.method, self.path, handler, expect_handler=without_expecting)

    def _passing(self, handler: Handler) -> Handler:
        async def where_it_is(request: web.Request) -> web.StreamResponse:
            answer = await passed_on(request, request.match_info[self.kept])
            return await handler(request) if answer is None else answer

        return where_it_is

    def _decoding(self, strict: bool) -> Handler:
        if self.takes is None:
            return self.handler
        decoder = BodyDecoder(self.takes)

        async def with_query(request: web.Request) -> web.StreamResponse:
            return await self.handler(request, decoder.query(request.query))

        async def with_body(request: web.Request) -> web.StreamResponse:
            data = await read_body(request)
            await check_parts(data)
            body = decoder.decode(data)
            request.app[IGNORED].note(request, ignored_fields(body, strict=strict))
            if len(data) > UNCOUNTED:  # decoding it took its time: others first
                await anyio.lowlevel.checkpoint()
            named = getattr(body, self.kept) if self.kept else None
            if named is not None and (answer := await passed_on(request, named, data)) is not None:
                return answer
            del data
            release_body(request)
            return await self.handler(request, body)

        return with_query if self.queried else with_body


# ── the document ─────────────────────────────────────────────────────────────────────────────


Written = Mapping[Any, dict[str, Any]]  # types to how the document refers to them


def describe(routes: Sequence[Route], *, models: Sequence[str], keyed: bool) -> dict[str, Any]:
    """OpenAPI 3.1 of `routes`; `models` are the names served, `keyed` says that the server asks for an API key."""
    told = [
        kind for route in routes for kind in (route.gives, *route.others, route.unready, route.error, *route.events)
    ]
    kinds = [kind for kind in dict.fromkeys([*(route.takes for route in routes), *told]) if kind is not None]
    references, schemas = msgspec.json.schema_components(kinds, ref_template=REFERENCE)
    written = dict(zip(kinds, references, strict=True))
    for kind in _with_parts((route.takes for route in routes), Body):
        _bound(schemas[kind.__name__])
        _describe_rules(kind, schemas[kind.__name__])
        if "model" in kind.__struct_fields__:
            schemas[kind.__name__]["properties"]["model"] = {"enum": [*models, None], "default": None}
    for reply in _with_parts(told, Reply):
        _require_what_is_sent(reply, schemas[reply.__name__])
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.public_path, {})[route.method.lower()] = _operation(route, schemas, written, keyed=keyed)
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


def _with_parts(hints: Iterable[Any], base: type[StructType]) -> set[type[StructType]]:
    """The structs of the kind `base` in `hints`, and every such struct inside them."""
    found: set[type[StructType]] = set()
    waiting = list(hints)
    while waiting:
        fresh = set(structs_in(waiting.pop(), base)) - found
        found |= fresh
        waiting += [hint for kind in fresh for hint in get_type_hints(kind).values()]
    return found


def _require_what_is_sent(kind: type[Reply], schema: dict[str, Any]) -> None:
    """A default is for us who write a reply: whoever reads it always gets the field."""
    if not kind.__struct_config__.omit_defaults:
        optional = {field.name for field in msgspec.structs.fields(kind) if field.default is UNSET}
        schema["required"] = [name for name in schema["properties"] if name not in optional]
        for described in schema["properties"].values():
            described.pop("default", None)


def _bound(schema: dict[str, Any]) -> None:
    """Add the bounds of the sampling parameters in the schema of a body."""
    for name, described in schema["properties"].items():
        for either in described.get("anyOf", [described]):
            if either.get("type") in ("integer", "number"):
                either |= {**BOUNDS.get(name, {}), **either}


def _describe_rules(kind: type[Body], schema: dict[str, Any]) -> None:
    for name, rule in kind.rules.items():
        described = schema["properties"][name]
        if rule.kind == "refused":
            described = {"description": "not served yet", "enum": [*rule.neutral, None], "default": None}
        else:
            described["description"] = "ignored" if rule.only is None else f"ignored: {rule.only.says}"
        schema["properties"][name] = described


def _operation(route: Route, schemas: dict[str, Any], written: Written, *, keyed: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.public_path}".replace("}", "")),
        "summary": (inspect.getdoc(route.handler) or "").partition("\n\n")[0].replace("\n", " "),
        "responses": {"200": _answer(route, written)},
    }
    if route.unready is not None:
        operation["responses"]["503"] = {"description": "not now", "content": _json(written[route.unready])}
    operation["responses"]["default"] = {"description": "an error for people", "content": _json(written[route.error])}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)\}", route.public_path)
    ]
    if route.takes is not None and route.queried:
        fields = schemas[route.takes.__name__]["properties"]
        parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in fields.items()]
    elif route.takes is not None:
        required = bool(schemas[route.takes.__name__].get("required"))
        operation["requestBody"] = {"required": required, "content": _json(written[route.takes])}
    if parameters:
        operation["parameters"] = parameters
    if keyed and not route.open:
        operation["security"] = [{"bearer": []}, {"key": []}]
    return operation


def _answer(route: Route, written: Written) -> dict[str, Any]:
    content: dict[str, Any] = {route.content: {}}
    if route.others:
        content = _json({"anyOf": [written[kind] for kind in (route.gives, *route.others)]})
    elif route.gives is not None:
        content = _json(written[route.gives])
    if route.events:
        content["text/event-stream"] = {"schema": _event_schema(route, written)}
    return {"description": "the answer", "content": content}


def _event_schema(route: Route, written: Written) -> dict[str, Any]:
    """The schema of one server-sent event: an object of its fields, as OpenAPI 3.2 has them. Its data are JSON."""
    kinds = [written[kind] for kind in route.events]
    data: dict[str, Any] = {"contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    if route.done:
        data = {"anyOf": [{"const": "[DONE]"}, data]}
    return {"type": "object", "properties": {"data": {"type": "string", **data}}, "required": ["data"]}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


DOCUMENT = web.AppKey("document", bytes)


async def openapi_document(request: web.Request) -> web.Response:
    """Describe every route: the OpenAPI document."""
    return json_response(request.app[DOCUMENT])
