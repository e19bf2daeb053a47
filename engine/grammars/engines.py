"""The grammar engines of one model, for the compiler and the worker. The first engine that takes a grammar compiles
it."""

import logging
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from engine.errors import PluginError, RequestError
from engine.params.grammar import Grammar
from engine.plugin.hookspecs import GrammarEntry
from engine.plugin.registry import Plugins, resolve
from engine.plugin.specs import CompiledGrammar, GrammarEngine, Vocabulary

log = logging.getLogger("engine.grammars")


class Unmade(Exception):
    """A grammar needs an engine that has not been made yet."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Engines:
    """The engines of `entries`, in the order in which they are asked; each is made when it is first needed."""

    def __init__(
        self, entries: Sequence[GrammarEntry], vocabulary: Vocabulary, *, threads: int, whitespace: bool
    ) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self._vocabulary = vocabulary
        self._threads = threads
        self._whitespace = whitespace
        self._made: dict[str, GrammarEngine] = {}

    def named(self, name: str) -> GrammarEngine:
        """Raises PluginError when its package does not work."""
        if name not in self._made:
            make = resolve(self._entries[name].target)
            self._made[name] = make(self._vocabulary, threads=self._threads, whitespace=self._whitespace)
        return self._made[name]

    def warm_up(self) -> None:
        """Make the one that is asked first."""
        if self._entries:
            self.named(next(iter(self._entries)))

    def compile(self, grammar: Grammar) -> tuple[str, CompiledGrammar]:
        """The name of the engine that takes `grammar`, and the compiled grammar. Only an unsupported_grammar goes to
        the next engine; if none takes it, raises the RequestError of the first. Raises Unmade for an engine that is not
        made yet, because making one may take longer than compiling."""
        refusals: list[RequestError] = []
        for name, entry in self._entries.items():
            if grammar.kind not in entry.kinds:
                continue
            if name not in self._made:
                raise Unmade(name)
            try:
                return name, self._made[name].compile(grammar)
            except RequestError as error:
                log.debug("%s refuses a %s: %s", name, grammar.kind, error)
                refusals.append(error)
                if error.code != "unsupported_grammar":
                    break
        if refusals:
            raise refusals[0]
        asked = ", ".join(self._entries)
        raise RequestError(
            f"no grammar engine here takes a grammar of the kind {grammar.kind} (there is {asked}); pip install "
            "llguidance xgrammar",
            code="unsupported_grammar",
        )


def grammar_engines(plugins: Plugins) -> list[GrammarEntry]:
    """The grammar engines to be asked, in that order, of those that are installed: those named in --plugins, else
    all. Raises PluginError for a named one that is not installed."""
    ordered = sorted(plugins.entries("grammars").values(), key=lambda entry: -entry.preference)
    named = [entry for entry in ordered if ("grammars", entry.name) in plugins.named]
    for entry in named:
        if not _installed(entry):
            raise PluginError(
                f"--plugins names the grammar engine {entry.name!r}, and its package is not installed; "
                f"pip install {entry.package}"
            )
    return named or [entry for entry in ordered if _installed(entry)]


def _installed(entry: GrammarEntry) -> bool:
    try:
        version(entry.package)
    except PackageNotFoundError:
        return False
    return True
