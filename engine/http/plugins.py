"""Routes that plugins register: made of their entries, and joined to the engine's own."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from engine.errors import PluginError
from engine.http.openapi import Route
from engine.http.wire import Body
from engine.plugin.hookspecs import RouteEntry
from engine.plugin.registry import Plugins, resolve

METHODS = get_args(Route.__annotations__["method"])
NAME = re.compile(rf"({'|'.join(METHODS)}) (/\S*)")


def with_plugins(own: Sequence[Route], plugins: Plugins) -> tuple[Route, ...]:
    """`own` routes, and those of `plugins`, whose handlers and bodies are imported here.

    Raises PluginError for an entry that makes no route, and for one that takes the path, or the name of a body, from
    another: both are named."""
    routes = list(own)
    whose = {_served(route): _origin(route.handler) for route in own}
    names = {kind.__name__: kind for route in own for kind in _structs(route)}
    entries: Iterable[RouteEntry] = plugins.entries("routes").values()
    for entry in entries:
        said = f"the route {entry.name!r} of {plugins.sources['routes', entry.name]}"
        route = _route(entry, said)
        if (other := whose.setdefault(_served(route), said)) != said:
            raise PluginError(f"{said} is served by {other} already; leave one out of --plugins, or rename its path")
        for kind in _structs(route):
            if names.setdefault(kind.__name__, kind) is not kind:
                origin = _origin(names[kind.__name__])
                raise PluginError(f"{said}: {_origin(kind)} has the name of {origin}; rename it for /openapi.json")
        routes.append(route)
    return tuple(routes)


def _route(entry: RouteEntry, said: str) -> Route:
    named = NAME.fullmatch(entry.name)
    if named is None:
        raise PluginError(f"{said}: its name must be a method of {', '.join(METHODS)} and a path, as in 'GET /hello'")
    takes = _imported(entry.takes, said) if entry.takes else None
    if takes is not None and not (isinstance(takes, type) and issubclass(takes, Body)):
        raise PluginError(f"{said}: {entry.takes} is no subclass of engine.plugin.http.Body")
    handler = _imported(entry.target, said)
    if not callable(handler):
        raise PluginError(f"{said}: {entry.target} is no function but a {type(handler).__name__}; name its handler")
    return Route(
        method=named[1],  # type: ignore[arg-type]
        path=named[2],
        handler=handler,
        takes=takes,
        gives=_imported(entry.gives, said) if entry.gives else None,
        open=entry.open,
        content=entry.content,
    )


def _imported(target: str, said: str) -> Any:
    """What `target` names; an error names the route and its plugin, as in `said`."""
    try:
        return resolve(target)
    except PluginError as error:
        raise PluginError(f"{said}: {error}; correct it, or leave the plugin out of --plugins") from error.__cause__


def _served(route: Route) -> tuple[str, str]:
    """What a route answers, whatever its parameters are called."""
    return route.method, re.sub(r"\{[^}]*\}", "{}", route.path)


def _structs(route: Route) -> list[type]:
    """The types by whose names the document refers to the route's bodies."""
    return [kind for kind in (route.takes, route.gives) if isinstance(kind, type)]


def _origin(value: Any) -> str:
    return f"{value.__module__}:{value.__qualname__}"
