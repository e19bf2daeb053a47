"""Manifest of the built-in orders of the waiting queue."""

from collections.abc import Callable

from engine.plugin import hookimpl

API = 1


@hookimpl
def register_policies(register: Callable[..., None]) -> None:
    register(
        "fcfs",
        "engine_plugins.policies.order:FirstComeFirstServed",
        description="first come, first served",
    )
    register(
        "lpm",
        "engine_plugins.policies.order:LongestPrefixMatch",
        description="the longest cached prefix first: least prefill work, no promise of fairness",
    )
