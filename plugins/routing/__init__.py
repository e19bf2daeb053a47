"""Manifest of the built-in routing policies."""

from collections.abc import Callable

from engine.plugin import hookimpl

API = 1


@hookimpl
def register_routing(register: Callable[..., None]) -> None:
    register(
        "cache_aware",
        "engine_plugins.routing.aware:CacheAware",
        description="where most of the prompt is cached, among workers that are about as loaded as the least loaded",
    )
    register("round_robin", "engine_plugins.routing.simple:RoundRobin", description="each worker in its turn")
    register("random", "engine_plugins.routing.simple:Random", description="any worker")
    register("power_of_two", "engine_plugins.routing.simple:PowerOfTwo", description="the less loaded of two drawn")
    register("least_load", "engine_plugins.routing.simple:LeastLoad", description="the least loaded worker")
