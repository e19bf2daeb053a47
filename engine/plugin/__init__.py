"""The only package that plugins import. This face of it needs no torch; `layers` and `testing` do."""

from engine.errors import ConfigError, PluginError, RequestError
from engine.params.grammar import Grammar
from engine.plugin.hookspecs import hookimpl
from engine.plugin.specs import (
    Checkpoint,
    Command,
    CompiledGrammar,
    GrammarEngine,
    KVGroup,
    KVSpec,
    LazyTensor,
    Matcher,
    Policy,
    StateGroup,
    TextSpec,
    Vocabulary,
    Waiting,
)
from engine.plugin.terms import LONGEST, MANY, MOST, Terms, language_terms

__all__ = [
    "LONGEST",
    "MANY",
    "MOST",
    "Checkpoint",
    "Command",
    "CompiledGrammar",
    "ConfigError",
    "Grammar",
    "GrammarEngine",
    "KVGroup",
    "KVSpec",
    "LazyTensor",
    "Matcher",
    "PluginError",
    "Policy",
    "RequestError",
    "StateGroup",
    "Terms",
    "TextSpec",
    "Vocabulary",
    "Waiting",
    "hookimpl",
    "language_terms",
]
