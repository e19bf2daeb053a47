"""Grammars and the requests that wait for them: compiled once whoever asks, kept while there is room. Pure.

    wait ──Compile──> compiler ──compiled──LoadGrammar──> device ──loaded──> the requests may run
             │            └─ refused: all that wait are told; who asks again is told at once, if it would be the same
             └─ a grammar that is known already is not compiled again

What waits here holds no slot and no page. Grammars are told apart by their content. The oldest that no live request has
is forgotten when there are too many.
"""

import itertools
from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec

from engine.errors import RequestError
from engine.messages.assets import Compile, Compiled, DropGrammar, GrammarLoaded, LoadGrammar
from engine.messages.request import Admit, Grammar


@dataclass(slots=True)
class Entry:
    """One grammar. `load` is set once it is compiled, `ready` once the device has it."""

    number: int
    waiting: list[Admit] = field(default_factory=list)
    load: LoadGrammar | None = None
    ready: bool = False
    refusal: RequestError | None = None


class Shelf:
    """At most `most` grammars that nobody uses, for a model of `vocab_size` tokens."""

    def __init__(self, most: int, vocab_size: int) -> None:
        self._most = most
        self._vocab_size = vocab_size
        self._numbers = itertools.count(1)
        self._entries: OrderedDict[Grammar, Entry] = OrderedDict()  # the one asked for last is the last
        self._by_number: dict[int, Grammar] = {}

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(len(entry.waiting) for entry in self._entries.values())

    def number(self, admit: Admit) -> int:
        """The number of the grammar of `admit`, if the device has it, and 0 if `admit` must `wait` for it.

        Raises RequestError for one that was refused."""
        entry = self._entries.get(_content(admit))
        if entry is None:
            return 0
        self._entries.move_to_end(_content(admit))
        if entry.refusal is not None:
            raise entry.refusal.with_traceback(None)  # or it would grow with each that is told
        return entry.number if entry.ready else 0

    def wait(self, admit: Admit) -> Compile | None:
        """Keep `admit` until its grammar is ready; what is to be compiled, if that is not under way."""
        grammar = _content(admit)
        known = self._entries.get(grammar)
        if known is not None:
            known.waiting.append(admit)
            return None
        entry = self._entries[grammar] = Entry(next(self._numbers), [admit])
        self._by_number[entry.number] = grammar
        return Compile(entry.number, grammar, self._vocab_size)

    def compiled(self, message: Compiled) -> tuple[LoadGrammar | None, list[Admit], RequestError | None]:
        """What the device is to load; or who waited in vain, and what to tell them."""
        entry = self._entries[self._by_number[message.number]]
        if message.grammar is not None:
            entry.load = LoadGrammar(message.number, message.engine, message.grammar, message.packed)
            return entry.load, [], None
        refusal = RequestError(message.cause, param=message.param, code=message.code, status=message.status)
        return None, self._refuse(entry, refusal, message.lasting), refusal

    def loaded(self, message: GrammarLoaded) -> tuple[list[Admit], RequestError | None]:
        """Who waited for this, and what to tell them if it was in vain."""
        grammar = self._by_number.get(message.number)
        if grammar is None:  # forgotten while the device was started again
            return [], None
        entry = self._entries[grammar]
        if message.cause:
            refusal = RequestError(message.cause, param="grammar", code="grammar_failed", status=500)
            return self._refuse(entry, refusal, lasting=False), refusal
        entry.ready = True
        freed, entry.waiting = entry.waiting, []
        return freed, None

    def _refuse(self, entry: Entry, refusal: RequestError, lasting: bool) -> list[Admit]:
        waited, entry.waiting = entry.waiting, []
        entry.refusal = refusal
        if not lasting:
            self._forget(self._by_number[entry.number])
        return waited

    def abort(self, rid: str) -> bool:
        """Whether `rid` waited here. Its grammar is made ready all the same."""
        for entry in self._entries.values():
            for admit in entry.waiting:
                if admit.rid == rid:
                    entry.waiting.remove(admit)
                    return True
        return False

    def lost(self) -> tuple[list[Admit], RequestError]:
        """The device is gone, with what it was loading: who waited for that, which may be what it died of, and what to
        tell them."""
        refusal = RequestError(
            "the device worker stopped while this request's grammar was loaded, and is being restarted; send the "
            "request again",
            code="worker_lost",
            status=503,
        )
        loading = [entry for entry in self._entries.values() if entry.load is not None and not entry.ready]
        return [admit for entry in loading for admit in self._refuse(entry, refusal, lasting=False)], refusal

    def again(self) -> list[LoadGrammar]:
        """All that a device that has just been started must load."""
        return [entry.load for entry in self._entries.values() if entry.load is not None]

    def evict(self, used: set[int]) -> list[DropGrammar]:
        """Forget what is too much, but nothing that is `used`, waited for or under way."""
        idle = [
            grammar
            for grammar, entry in self._entries.items()
            if entry.number not in used and not entry.waiting and (entry.ready or entry.refusal is not None)
        ]
        dropped = []
        for grammar in idle[: max(0, len(idle) - self._most)]:
            if self._entries[grammar].ready:
                dropped.append(DropGrammar(self._entries[grammar].number))
            self._forget(grammar)
        return dropped

    def _forget(self, grammar: Grammar) -> None:
        del self._by_number[self._entries.pop(grammar).number]


def _content(admit: Admit) -> Grammar:
    """What is compiled: where it begins is another matter."""
    assert admit.grammar is not None
    return msgspec.structs.replace(admit.grammar, after="")
