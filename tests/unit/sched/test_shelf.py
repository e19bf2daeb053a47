"""Grammars on their way, without compiler or device: compiled once, waited for, refused, forgotten."""

import pytest

from engine.errors import RequestError
from engine.messages.assets import Compile, Compiled, DropGrammar, GrammarLoaded, LoadGrammar
from engine.messages.request import Admit, Grammar, Sampling
from engine.sched.shelf import Shelf

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


def admit(rid: str, source: str = "a", after: str = "", strict: bool = True) -> Admit:
    return Admit(rid, b"", GREEDY, (), 1, grammar=Grammar("regex", source, after, strict))


def done(number: int, source: str = "a") -> Compiled:
    return Compiled(number, 0.1, "engine", Grammar("regex", source), b"packed")


def refused(number: int, *, lasting: bool) -> Compiled:
    return Compiled(number, 0.1, status=400, code="invalid_grammar", cause="no", lasting=lasting)


def on_device(shelf: Shelf, source: str) -> int:
    """The number of a grammar that has come all the way."""
    asked = shelf.wait(admit("x", source))
    assert asked is not None
    shelf.compiled(done(asked.number, source))
    shelf.loaded(GrammarLoaded(asked.number))
    return asked.number


def test_a_grammar_is_compiled_once_for_all_that_wait() -> None:
    shelf = Shelf(8, 257)
    assert shelf.number(admit("1")) == 0
    assert shelf.wait(admit("1")) == Compile(1, Grammar("regex", "a"), 257)
    assert shelf.wait(admit("2", after="</think>")) is None  # where it begins is another matter
    assert shelf.wait(admit("3", strict=False)) == Compile(2, Grammar("regex", "a", strict=False), 257)
    assert shelf.waiting == 3
    load, waited, refusal = shelf.compiled(done(1))
    assert load == LoadGrammar(1, "engine", Grammar("regex", "a"), b"packed")
    assert (waited, refusal) == ([], None)
    assert shelf.number(admit("4")) == 0 and shelf.wait(admit("4")) is None  # compiled, but not on the device
    freed, refusal = shelf.loaded(GrammarLoaded(1))
    assert ([each.rid for each in freed], refusal) == (["1", "2", "4"], None)
    assert shelf.number(admit("5")) == 1 and shelf.waiting == 1


def test_a_refusal_that_would_be_the_same_again_is_kept() -> None:
    shelf = Shelf(8, 257)
    shelf.wait(admit("1"))
    shelf.wait(admit("2"))
    load, waited, refusal = shelf.compiled(refused(1, lasting=True))
    assert load is None and [each.rid for each in waited] == ["1", "2"]
    assert refusal is not None and (refusal.status, refusal.code, refusal.param) == (400, "invalid_grammar", "grammar")
    traces = []
    for again in range(3):
        with pytest.raises(RequestError, match="no") as caught:
            shelf.number(admit(str(again)))
        traces.append(len(caught.traceback))
    assert len(set(traces)) == 1  # what is told again and again keeps nothing of those whom it was told


def test_a_timeout_is_not_kept() -> None:
    shelf = Shelf(8, 257)
    shelf.wait(admit("1"))
    _, waited, _ = shelf.compiled(refused(1, lasting=False))
    assert [each.rid for each in waited] == ["1"]
    assert shelf.number(admit("2")) == 0
    assert shelf.wait(admit("2")) == Compile(2, Grammar("regex", "a"), 257)


def test_who_leaves_is_not_waited_for_and_the_grammar_is_made_all_the_same() -> None:
    shelf = Shelf(8, 257)
    shelf.wait(admit("1"))
    shelf.wait(admit("2"))
    assert shelf.abort("1") and not shelf.abort("1") and not shelf.abort("3")
    shelf.compiled(done(1))
    freed, _ = shelf.loaded(GrammarLoaded(1))
    assert [each.rid for each in freed] == ["2"]


def test_what_a_device_cannot_load_is_told_and_tried_again() -> None:
    shelf = Shelf(8, 257)
    shelf.wait(admit("1"))
    shelf.compiled(done(1))
    waited, refusal = shelf.loaded(GrammarLoaded(1, "broken"))
    assert [each.rid for each in waited] == ["1"] and refusal is not None and refusal.status == 500
    assert shelf.wait(admit("2")) is not None
    assert shelf.loaded(GrammarLoaded(1)) == ([], None)  # late word of what is forgotten


def test_a_lost_device_takes_what_it_was_loading_with_it_and_gets_the_rest_again() -> None:
    shelf = Shelf(8, 257)
    ready = on_device(shelf, "ready")
    shelf.wait(admit("compiling", "c"))
    asked = shelf.wait(admit("loading", "l"))
    assert asked is not None
    shelf.compiled(done(asked.number, "l"))
    waited, refusal = shelf.lost()
    assert [each.rid for each in waited] == ["loading"] and refusal.status == 503
    assert [load.number for load in shelf.again()] == [ready]
    assert shelf.number(admit("x", "ready")) == ready
    assert shelf.waiting == 1  # what is being compiled comes to the new one


def test_the_oldest_that_nobody_uses_are_forgotten() -> None:
    shelf = Shelf(2, 257)
    numbers = [on_device(shelf, source) for source in "abcd"]
    shelf.number(admit("x", "a"))  # asked for again
    asked = shelf.wait(admit("waits", "e"))
    assert asked is not None
    assert shelf.evict(used={numbers[1]}) == [DropGrammar(numbers[2])]
    assert shelf.number(admit("x", "c")) == 0 and shelf.number(admit("x", "b")) == numbers[1]
    assert shelf.evict(used=set()) == [DropGrammar(numbers[3])]
    shelf.compiled(refused(asked.number, lasting=True))
    assert shelf.evict(used=set()) == [DropGrammar(numbers[0])]  # a refusal is kept, and forgotten, as others are
    with pytest.raises(RequestError):
        shelf.number(admit("x", "e"))
