"""Manifest of the built-in routing policies."""

from collections.abc import Callable

from engine.plugin import hookimpl

API = 1


@hookimpl
def register_routing(register: Callable[..., None]) -> None:
    register("round_robin", "engine_plugins.routing.simple:RoundRobin", description="each worker in its turn")
