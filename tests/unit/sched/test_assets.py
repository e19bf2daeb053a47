"""The waiting room, without maker or device: made once, waited for, refused, loaded, forgotten."""

from collections import Counter, OrderedDict
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.errors import RequestError
from engine.messages.assets import Bound, Drop, Load, Loaded, Made, Make, Need
from engine.messages.grammars import GRAMMAR, grammar_need
from engine.messages.media import MEDIA
from engine.messages.request import Admit
from engine.messages.tiers import PAGES
from engine.params.grammar import Grammar
from engine.params.sampling import Sampling
from engine.sched.assets import BESIDE, Asset, Due, Key, WaitingRoom

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


def needing(rid: str, *needs: Need, priority: int = 0) -> Admit:
    return Admit(rid, b"", GREEDY, (), 1, priority, needs=needs)


def admit(rid: str, source: str = "a", after: str = "", strict: bool = True) -> Admit:
    return needing(rid, grammar_need(Grammar("regex", source, after, strict)))


def content(source: str = "a", strict: bool = True) -> bytes:
    return grammar_need(Grammar("regex", source, strict=strict)).content


def done(number: int, kind: str = GRAMMAR) -> Made:
    return Made(kind, number, 0.1, b"packed")


def refused(number: int, *, lasting: bool) -> Made:
    return Made(GRAMMAR, number, 0.1, status=400, code="invalid_grammar", cause="no", lasting=lasting)


def opened(most: int = 8) -> WaitingRoom:
    """A room with a device behind it."""
    room = WaitingRoom({GRAMMAR: most})
    assert room.started() == Due()
    return room


def rids(due: Due) -> list[str]:
    return [ready.rid for ready, _ in due.ready]


def on_device(room: WaitingRoom, source: str) -> int:
    """The number of a grammar that has come all the way."""
    (make,) = room.admit(admit("x", source)).makes
    room.made(done(make.number))
    assert rids(room.loaded(Loaded(GRAMMAR, make.number))) == ["x"]
    return make.number


def number_of(room: WaitingRoom, source: str) -> int:
    """The number that a request comes with at once; 0 if it would have to wait."""
    due = room.admit(admit("look", source))
    room.abort("look")
    return due.ready[0][1][0].number if due.ready else 0


def test_a_request_that_needs_nothing_goes_through() -> None:
    assert opened().admit(needing("1")) == Due(ready=[(needing("1"), ())])


def test_a_grammar_is_made_once_for_all_that_wait() -> None:
    room = opened()
    assert room.admit(admit("1")) == Due(makes=[Make(GRAMMAR, 1, content())])
    assert room.admit(admit("2", after="</think>")) == Due()  # where it begins is another matter
    assert room.admit(admit("3", strict=False)) == Due(makes=[Make(GRAMMAR, 2, content(strict=False))])
    assert room.waiting == 3
    assert room.made(done(1)) == Due(device=[Load(GRAMMAR, 1, b"packed")])
    assert room.admit(admit("4")) == Due()  # made, but not on the device
    due = room.loaded(Loaded(GRAMMAR, 1))
    assert (rids(due), due.refused) == (["1", "2", "4"], [])
    assert [bound for _, bound in due.ready][:2] == [(Bound(GRAMMAR, 1),), (Bound(GRAMMAR, 1, b"</think>"),)]
    assert number_of(room, "a") == 1 and room.waiting == 1


def test_a_refusal_that_would_be_the_same_again_is_kept() -> None:
    room = opened()
    room.admit(admit("1"))
    room.admit(admit("2"))
    due = room.made(refused(1, lasting=True))
    assert due.device == [] and [rid for rid, _ in due.refused] == ["1", "2"]
    refusal = due.refused[0][1]
    assert (refusal.status, refusal.code, refusal.param) == (400, "invalid_grammar", "grammar")
    for again in range(3):
        assert room.admit(admit(str(again))) == Due(refused=[(str(again), refusal)])
        assert refusal.message == "no" and refusal.__traceback__ is None  # it keeps nothing of those whom it was told


def test_a_timeout_is_not_kept() -> None:
    room = opened()
    room.admit(admit("1"))
    assert [rid for rid, _ in room.made(refused(1, lasting=False)).refused] == ["1"]
    assert room.admit(admit("2")) == Due(makes=[Make(GRAMMAR, 2, content())])


def test_who_leaves_is_not_waited_for_and_the_grammar_is_made_all_the_same() -> None:
    room = opened()
    room.admit(admit("1"))
    room.admit(admit("2"))
    assert room.abort("1") and not room.abort("1") and not room.abort("3")
    room.made(done(1))
    assert rids(room.loaded(Loaded(GRAMMAR, 1))) == ["2"]


def test_what_a_device_cannot_load_is_told_and_tried_again() -> None:
    room = opened()
    room.admit(admit("1"))
    room.made(done(1))
    due = room.loaded(Loaded(GRAMMAR, 1, "broken"))
    ((rid, refusal),) = due.refused
    assert (rid, refusal.status, refusal.code, refusal.param) == ("1", 500, "grammar_failed", "grammar")
    assert due.device == [Drop(GRAMMAR, 1)]
    assert room.admit(admit("2")).makes
    assert room.loaded(Loaded(GRAMMAR, 1)) == Due()  # late word of what is forgotten


def test_a_lost_device_takes_what_it_was_loading_with_it_and_the_next_gets_the_rest() -> None:
    room = opened()
    ready = on_device(room, "ready")
    room.admit(admit("making", "m"))
    (make,) = room.admit(admit("loading", "l")).makes
    room.made(done(make.number))
    ((rid, refusal),) = room.lost().refused
    assert (rid, refusal.status, refusal.code) == ("loading", 503, "worker_lost")
    assert [load.number for load in room.started().device] == [ready]
    assert room.reloading(lambda: {ready}) and not room.reloading(set)
    assert room.admit(admit("y", "ready")) == Due()  # it is not made again
    assert rids(room.loaded(Loaded(GRAMMAR, ready))) == ["y"] and not room.reloading(lambda: {ready})
    assert number_of(room, "ready") == ready
    assert room.waiting == 1  # what is being made comes to the new one


def test_what_was_loaded_before_survives_a_second_loss() -> None:
    room = opened()
    ready = on_device(room, "ready")
    for _ in range(2):
        assert room.lost() == Due()
        assert room.admit(admit("y", "ready")) == Due()
        assert [load.number for load in room.started().device] == [ready]
        room.abort("y")
    assert room.evict(set()) == []


def test_the_oldest_that_nobody_uses_are_forgotten() -> None:
    room = opened(2)
    numbers = [on_device(room, source) for source in "abcd"]
    number_of(room, "a")  # asked for again
    (make,) = room.admit(admit("waits", "e")).makes
    assert room.evict(used={numbers[1]}) == [Drop(GRAMMAR, numbers[2])]
    assert number_of(room, "b") == numbers[1]
    assert room.evict(used=set()) == [Drop(GRAMMAR, numbers[3])]
    room.made(refused(make.number, lasting=True))
    assert room.evict(used=set()) == [Drop(GRAMMAR, numbers[0])]  # a refusal is kept, and forgotten, as others are
    assert room.admit(admit("x", "e")).refused
    assert number_of(room, "c") == 0


def test_what_a_need_brings_along_is_loaded_and_kept_within_its_bytes() -> None:
    """2,000 pictures, each shown by a request of its own: what is kept of them stays the same."""
    most = sum(range(2, 11)) + 9 * BESIDE  # any nine in a row are within, and no ten
    room = WaitingRoom({}, {MEDIA: most})
    room.started()
    device: dict[int, bytes] = {}

    def shown(index: int) -> None:
        need = Need(MEDIA, index.to_bytes(4, "little"), payload=bytes(index % 10 + 1))
        due = room.admit(needing(f"r{index}", need))
        assert not due.makes
        for message in due.device:
            assert isinstance(message, Load)
            device[message.number] = message.payload
            room.loaded(Loaded(MEDIA, message.number))
        for drop in room.evict(set()):
            del device[drop.number]

    for index in range(2000):
        shown(index)
        assert list(device) == list(range(max(1, index - 7), index + 2))
        assert len(room._assets) == len(device)
    known = set(device)
    shown(1999)
    assert set(device) == known
    room.check_integrity()


def test_few_are_looked_at_however_many_are_known() -> None:
    """Each new picture, and each moment without a step, asks what is too much."""
    looked_at: list[int] = []

    class Watched(OrderedDict[Key, Asset]):
        def values(self) -> Any:
            for asset in super().values():
                looked_at.append(asset.number)
                yield asset

    room = WaitingRoom({}, {MEDIA: 1000 * (len(b"pixels") + BESIDE)})
    room._assets = Watched()
    room.started()
    for index in range(1002):
        due = room.admit(needing(f"r{index}", Need(MEDIA, index.to_bytes(4, "little"), payload=b"pixels")))
        assert rids(room.loaded(Loaded(MEDIA, index + 1))) == [f"r{index}"] and len(due.device) == 1
        dropped = [drop.number for drop in room.evict({1})]
        assert dropped == ([] if index < 1001 else [2])
    assert looked_at == [1, 1, 2, 3], "the 1001st is not too much, as one is used; for the 1002nd another one goes"


def test_a_request_runs_when_all_that_it_needs_is_there() -> None:
    room = opened()
    grammar, picture = grammar_need(Grammar("regex", "a", "</think>")), Need("picture", b"p", b"at 7")
    assert [make.kind for make in room.admit(needing("both", picture, grammar, picture)).makes] == ["picture", GRAMMAR]
    for number, kind in ((1, "picture"), (2, GRAMMAR)):
        room.made(done(number, kind))
    assert room.loaded(Loaded(GRAMMAR, 2)) == Due()
    assert room.evict(set()) == []  # nothing that is waited for
    ((_, bound),) = room.loaded(Loaded("picture", 1)).ready
    assert bound == (Bound("picture", 1, b"at 7"), Bound(GRAMMAR, 2, b"</think>"), Bound("picture", 1, b"at 7"))


def test_one_refusal_ends_a_request_and_leaves_nothing_of_it() -> None:
    room = opened()
    bad, picture = grammar_need(Grammar("regex", "(")), Need("picture", b"p")
    room.admit(needing("1", picture, bad))
    room.made(refused(2, lasting=True))
    assert room.waiting == 0
    room.made(done(1, "picture"))
    assert room.loaded(Loaded("picture", 1)) == Due()
    due = room.admit(needing("2", Need("picture", b"q"), bad))
    assert not due.makes and due.refused and room.waiting == 0


def test_those_that_become_ready_together_keep_their_order() -> None:
    room = opened()
    shared, own = grammar_need(Grammar("regex", "a")), grammar_need(Grammar("regex", "b"))
    for rid, priority, needs in (("1", 0, (shared, own)), ("2", 0, (shared,)), ("3", 5, (shared,)), ("4", 0, (own,))):
        room.admit(needing(rid, *needs, priority=priority))
    for number in (1, 2):
        room.made(done(number))
    assert rids(room.loaded(Loaded(GRAMMAR, 1))) == ["3", "2"]
    assert rids(room.loaded(Loaded(GRAMMAR, 2))) == ["1", "4"]


def test_an_id_that_waits_is_not_taken_twice() -> None:
    room = opened()
    room.admit(admit("1"))
    ((rid, refusal),) = room.admit(needing("1")).refused
    assert (rid, refusal.status, refusal.code) == ("1", 409, "duplicate_rid") and room.waiting == 1


KINDS = (GRAMMAR, "picture")
NEEDS = st.builds(Need, st.sampled_from(KINDS), st.sampled_from([b"a", b"b", b"c"]), st.sampled_from([b"", b"use"]))


class Rooms(RuleBasedStateMachine):
    """A room between makers, a device and running requests, in any order of events."""

    def __init__(self) -> None:
        super().__init__()
        self.room = WaitingRoom({GRAMMAR: 1, "picture": 0})
        self.up = False
        self.makes: dict[int, Make] = {}  # not answered
        self.loads: dict[int, Load] = {}  # not answered
        self.there: set[int] = set()  # on the device, loaded or being loaded
        self.admitted: dict[str, Admit] = {}
        self.ended: Counter[str] = Counter()  # how often it was let go, refused or aborted
        self.running: dict[str, set[int]] = {}
        self.proved: set[int] = set()  # once loaded
        self.numbers: dict[int, tuple[str, bytes]] = {}

    def pass_on(self, due: Due) -> None:
        for make in due.makes:
            assert make.number not in self.numbers
            assert (make.kind, make.content) not in [(each.kind, each.content) for each in self.makes.values()]
            self.numbers[make.number] = make.kind, make.content
            self.makes[make.number] = make
        for message in due.device:
            self.to_device(message)
        ranks = [(-ready.priority, int(ready.rid)) for ready, _ in due.ready]
        assert ranks == sorted(ranks)
        for ready, bound in due.ready:
            assert [(each.kind, each.use) for each in bound] == [(need.kind, need.use) for need in ready.needs]
            for need, each in zip(ready.needs, bound, strict=True):
                assert self.numbers[each.number] == (need.kind, need.content)
                assert self.up and each.number in self.there - self.loads.keys()
            self.ended[ready.rid] += 1
            self.running[ready.rid] = {each.number for each in bound}
        for rid, error in due.refused:
            assert isinstance(error, RequestError) and error.status and error.message
            self.ended[rid] += 1
        self.room.check_integrity()

    def to_device(self, message: Load | Drop) -> None:
        assert self.up, "a device that is not there is sent something"
        if isinstance(message, Load):
            assert message.number not in self.there, "loaded twice"
            assert message.payload == b"%d" % message.number
            self.there.add(message.number)
            self.loads[message.number] = message
        else:
            assert message.number not in self.used, "dropped in use"
            self.there.remove(message.number)

    @property
    def used(self) -> set[int]:
        return set().union(*self.running.values())

    @initialize()
    def start(self) -> None:
        self.restart()

    @rule(needs=st.lists(NEEDS, max_size=3), priority=st.integers(0, 1))
    def admit(self, needs: list[Need], priority: int) -> None:
        rid = str(len(self.admitted))
        self.admitted[rid] = needing(rid, *needs, priority=priority)
        self.pass_on(self.room.admit(self.admitted[rid]))

    @precondition(lambda self: self.makes)
    @rule(data=st.data(), answer=st.sampled_from(["good", "good", "lasting", "passing"]))
    def answer(self, data: st.DataObject, answer: str) -> None:
        make = self.makes.pop(data.draw(st.sampled_from(sorted(self.makes))))
        refusal: dict[str, Any] = {"status": 400, "code": "c", "cause": "no", "lasting": answer == "lasting"}
        payload = b"%d" % make.number
        good = answer == "good"
        self.pass_on(self.room.made(Made(make.kind, make.number, 0.0, payload, **({} if good else refusal))))
        self.evict()

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), good=st.sampled_from([True, True, False]))
    def load(self, data: st.DataObject, good: bool) -> None:
        load = self.loads.pop(data.draw(st.sampled_from(sorted(self.loads))))
        due = self.room.loaded(Loaded(load.kind, load.number, "" if good else "broken"))
        first = load.number not in self.proved
        assert (Drop(load.kind, load.number) in due.device) == (first and not good)
        self.pass_on(due)
        if good:
            self.proved.add(load.number)
        else:
            self.there.discard(load.number)
        self.evict()

    @rule()
    def evict(self) -> None:
        for drop in self.room.evict(self.used):
            self.to_device(drop)
        self.room.check_integrity()
        idle = Counter(asset.kind for asset in self.room._assets.values() if asset.idle)
        in_use = Counter(self.numbers[number][0] for number in self.used)
        assert idle[GRAMMAR] <= 1 + in_use[GRAMMAR] and idle["picture"] <= in_use["picture"]

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        rid = data.draw(st.sampled_from(sorted(self.admitted)))
        waits = not self.ended[rid]
        assert self.room.abort(rid) == waits
        self.ended[rid] += waits
        self.running.pop(rid, None)
        self.room.check_integrity()

    @precondition(lambda self: self.up)
    @rule(keep=st.booleans())
    def lose(self, keep: bool) -> None:
        """Requests that wait for a slot stay; others end with the device."""
        self.up = False
        self.loads.clear()
        self.there.clear()
        if not keep:
            self.running.clear()
        self.pass_on(self.room.lost())

    @precondition(lambda self: not self.up)
    @rule()
    def restart(self) -> None:
        self.up = True
        self.pass_on(self.room.started())
        loading = self.loads.keys() & self.used
        assert self.room.reloading(lambda: self.used) == bool(loading)

    def teardown(self) -> None:
        if not self.up:
            self.restart()
        while self.makes or self.loads:
            for make in list(self.makes.values()):
                del self.makes[make.number]
                self.pass_on(self.room.made(Made(make.kind, make.number, 0.0, b"%d" % make.number)))
            for load in list(self.loads.values()):
                del self.loads[load.number]
                self.pass_on(self.room.loaded(Loaded(load.kind, load.number)))
        assert self.room.waiting == 0
        assert self.ended == Counter(self.admitted.keys()), "each runs once or is refused once"
        self.running.clear()
        self.evict()
        left = list(self.room._assets.values())
        assert len(left) <= 1 and {asset.number for asset in left if asset.state == "ready"} == self.there


TestRooms = Rooms.TestCase
TestRooms.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_what_many_requests_bring_along_is_kept_once() -> None:
    room = opened()
    bringing = [needing(rid, Need("media", b"hash", b"use", b"pixels")) for rid in ("a", "b", "c")]
    (load,) = room.admit(bringing[0]).device
    assert load == Load("media", 1, b"pixels")
    assert room.admit(bringing[1]) == room.admit(bringing[2]) == Due()
    ready = room.loaded(Loaded("media", 1)).ready
    assert [admit.needs for admit, _ in ready] == [(Need("media", b"hash", b"use"),)] * 3
    assert [bound for _, bound in ready] == [(Bound("media", 1, b"use"),)] * 3


def paged(rid: str, *needs: Need) -> Admit:
    return needing(rid, *needs, Need(PAGES, rid.encode()))


def test_pages_are_waited_for_until_they_are_settled_and_are_nothing_on_the_device() -> None:
    room = opened()
    (make,) = room.admit(paged("a")).makes
    assert (make.kind, make.content) == (PAGES, b"a")
    due = room.settle(make.number)
    assert due == Due(ready=[(paged("a"), ())])
    assert room.settle(make.number) == Due()
    room.check_integrity()
    both = paged("b", grammar_need(Grammar("regex", "a")))
    grammar, pages = room.admit(both).makes
    assert room.settle(pages.number) == Due() and room.waiting == 1
    room.check_integrity()
    room.made(done(grammar.number))
    assert room.loaded(Loaded(GRAMMAR, grammar.number)).ready == [(both, (Bound(GRAMMAR, grammar.number),))]
    assert room.evict({grammar.number}) == []
    room.check_integrity()


def test_who_waits_for_pages_goes_on_without_a_device_and_may_leave() -> None:
    room = opened()
    (first,) = room.admit(paged("a")).makes
    (second,) = room.admit(paged("b")).makes
    assert room.abort("b")
    assert rids(room.lost()) == ["a"]
    assert room.settle(first.number) == room.settle(second.number) == Due()
    room.check_integrity()
