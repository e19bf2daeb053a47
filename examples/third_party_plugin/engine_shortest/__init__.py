"""Manifest: what this package adds to the engine. Imported in every process, so nothing heavy happens here."""

from engine.plugin import hookimpl
from engine.plugin.hookspecs import Register

API = 1


@hookimpl
def register_policies(register: Register) -> None:
    register(
        "shortest",
        "engine_shortest.policy:ShortestFirst",
        description="the request with the fewest prompt tokens to compute first",
    )
