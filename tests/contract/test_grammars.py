"""Every grammar engine against one contract: what it lets through is what is right, token by token."""

import importlib.util

import pytest

from engine.messages import GrammarKind
from engine.plugin.manager import Plugins, resolve
from engine.plugin.specs import GrammarEntry
from engine.plugin.testing import (
    GRAMMAR_CASES,
    INVALID,
    GrammarCase,
    check_grammar,
    check_invalid,
    check_together,
    check_whitespace,
)

ENTRIES = [
    pytest.param(
        entry, id=entry.name, marks=pytest.mark.skipif(importlib.util.find_spec(entry.package) is None, reason="")
    )
    for entry in Plugins.load().grammars.values()
]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("case", GRAMMAR_CASES, ids=str)
def test_what_is_let_through_is_what_is_right(entry: GrammarEntry, case: GrammarCase) -> None:
    if case.kind not in entry.kinds:
        pytest.skip(f"{entry.name} does not take a {case.kind}")
    if not check_grammar(resolve(entry.target), case):
        pytest.skip(f"{entry.name} refuses a keyword of it")


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("threads", [1, 3])
def test_matchers_are_asked_together_as_alone(entry: GrammarEntry, threads: int) -> None:
    check_together(resolve(entry.target), threads)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("kind", "source"), INVALID)
def test_what_is_invalid_is_refused(entry: GrammarEntry, kind: GrammarKind, source: str) -> None:
    if kind not in entry.kinds:
        pytest.skip(f"{entry.name} does not take a {kind}")
    check_invalid(resolve(entry.target), kind, source)


@pytest.mark.parametrize("entry", ENTRIES)
def test_whitespace_is_bounded(entry: GrammarEntry) -> None:
    check_whitespace(resolve(entry.target))
