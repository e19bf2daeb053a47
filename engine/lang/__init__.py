"""Programs that call a model many times: `@function`, gen, select, roles, forks. See docs/language.md.

The names below are the whole language; they are imported when first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.lang.anthropic import Anthropic
    from engine.lang.choices import (
        greedy_token_selection,
        token_length_normalized,
        unconditional_likelihood_normalized,
    )
    from engine.lang.default import RuntimeEndpoint, set_default_backend
    from engine.lang.expressions import (
        assistant,
        assistant_begin,
        assistant_end,
        decide,
        gen,
        gen_int,
        gen_string,
        image,
        select,
        separate_reasoning,
        system,
        system_begin,
        system_end,
        user,
        user_begin,
        user_end,
        video,
    )
    from engine.lang.forks import State
    from engine.lang.program import function
    from engine.lang.server import Server

# What SGLang has, and what is written in its place.
_INSTEAD = {
    "Engine": "engine.Engine(model=...)",
    "OpenAI": 'Server("https://api.openai.com", api_key=..., model=...)',
    "Runtime": "engine.Engine(model=...)",
}
_HOMES = {
    "anthropic": ("Anthropic",),
    "choices": ("greedy_token_selection", "token_length_normalized", "unconditional_likelihood_normalized"),
    "default": ("RuntimeEndpoint", "set_default_backend"),
    "expressions": (
        *("assistant", "assistant_begin", "assistant_end", "decide", "gen", "gen_int", "gen_string", "image", "select"),
        *("separate_reasoning", "system", "system_begin", "system_end", "user", "user_begin", "user_end", "video"),
    ),
    "forks": ("State",),
    "program": ("function",),
    "server": ("Server",),
}

__all__ = [
    "Anthropic",
    "RuntimeEndpoint",
    "Server",
    "State",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "decide",
    "function",
    "gen",
    "gen_int",
    "gen_string",
    "greedy_token_selection",
    "image",
    "select",
    "separate_reasoning",
    "set_default_backend",
    "system",
    "system_begin",
    "system_end",
    "token_length_normalized",
    "unconditional_likelihood_normalized",
    "user",
    "user_begin",
    "user_end",
    "video",
]


def __getattr__(name: str) -> Any:
    import importlib

    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"engine.lang.{home}"), name)
    instead = f"; write {_INSTEAD[name]}" if name in _INSTEAD else ""
    raise AttributeError(f"module 'engine.lang' has no attribute {name!r}{instead}")


def __dir__() -> list[str]:
    return list(__all__)
