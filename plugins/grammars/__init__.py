"""Manifest of the built-in grammar engines."""

from engine.plugin import hookimpl
from engine.plugin.hookspecs import Register

API = 1


@hookimpl
def register_grammars(register: Register) -> None:
    register(
        "llguidance",
        "engine_plugins.grammars.llguidance.engine:LLGuidance",
        kinds=("json_object", "json_schema", "regex", "ebnf", "lark", "choice", "structural_tag"),
        package="llguidance",
        preference=20,
        description="llguidance: derivatives of expressions and an Earley parser; compiles in a millisecond",
    )
    register(
        "xgrammar",
        "engine_plugins.grammars.xgrammar.engine:XGrammar",
        kinds=("json_object", "json_schema", "regex", "ebnf", "choice", "structural_tag"),
        package="xgrammar",
        preference=10,
        description="XGrammar: pushdown automata, most of each mask made when compiling",
    )
