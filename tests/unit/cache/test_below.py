"""What lies below the device, in integers: which page gives way, how pages are named, what no cache could exceed."""

import random
import sys
from array import array
from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.cache.ceiling import Ceiling
from engine.cache.device import DevicePages
from engine.cache.doubles import Doubles
from engine.cache.host import HostPages
from engine.cache.keeping import LATE_SECONDS, Keeping
from engine.cache.names import PageNames
from engine.cache.place import Place


def there(host, *names):
    """Pages of one text that have come."""
    places = host.add([name.encode() for name in names])
    for place in places:
        place.there = True
        host.unpin([place])
    return [place.name.decode() for place in places]


def held(host, names):
    return "".join(name for name in names if host.get(name.encode()) is not None)


def test_the_end_of_the_text_that_was_used_least_recently_gives_way_first():
    host = HostPages(6)
    there(host, *"abc")
    there(host, *"xyz")
    there(host, *"p")
    assert held(host, "abcxyzp") == "abxyzp"
    host.touch([b"b", b"a"])
    there(host, *"qr")
    assert held(host, "abxyzpqr") == "abxpqr"
    host.check_integrity()


def test_pages_that_give_way_together_leave_neighbours_to_those_that_come():
    host = HostPages(6)
    there(host, *"abcd")
    there(host, *"xy")
    assert [place.slot for place in host.add([b"p", b"q", b"r"])] == [1, 2, 3]
    host.check_integrity()


def test_a_scan_pushes_out_nothing_that_was_asked_for_twice():
    host = HostPages(8)
    there(host, *"abcdef")
    host.touch([b"f", b"e", b"d", b"c", b"b", b"a"])
    for number in range(200):
        there(host, *(f"{number}.{page}" for page in range(3)))
    assert held(host, "abcdef") == "abcdef"
    host.check_integrity()


def test_what_was_asked_for_twice_gives_way_to_what_was_asked_for_twice_later():
    host = HostPages(8)
    there(host, *"abcdef")
    host.touch([b"f", b"e", b"d", b"c", b"b", b"a"])
    there(host, *"uv")
    host.touch([b"v", b"u"])  # more than three quarters: the ends of the first text are as good as new
    there(host, *"xy")
    assert held(host, "abcdefuvxy") == "abcduvxy"


def test_what_a_store_gives_back_takes_the_place_of_what_was_asked_for_longer_ago():
    host = HostPages(8)
    there(host, *"abcdef")
    host.touch([b"f", b"e", b"d", b"c", b"b", b"a"])
    places = host.add([b"u", b"v", b"w", b"x", b"y"], hit=True)
    assert [place.name for place in places] == [b"u", b"v", b"w", b"x", b"y"]
    assert held(host, "abcdefuvwxy") == "abcuvwxy"
    host.check_integrity()


# ── what the device has, too ─────────────────────────────────────────────────────────────────


def doubles(host, *names):
    """As `there`, of pages that the device has."""
    host.held([name.encode() for name in reversed(names)])
    return there(host, *names)


def gave_way(host, name):
    """Whether a page of the device was here, too, and had to give way as a double."""
    return name not in host.names and not host.unseen([name])


def test_doubles_give_way_first_and_of_these_the_ones_that_were_used_last():
    host = HostPages(8)
    there(host, *"ab")
    doubles(host, *"pq")
    doubles(host, *"rs")
    there(host, *"cd")
    there(host, "e")
    assert held(host, "abpqrscde") == "abpqscde"  # the first of a text stay on the device for longest
    host.touch([b"q", b"p"])
    there(host, *"fg")
    assert held(host, "abpqscdefg") == "abscdefg"
    assert [name for name in "pqrs" if gave_way(host, name.encode())] == [*"pqr"]
    there(host, *"hi")
    assert held(host, "abscdefghi") == "acdefghi"  # no double is left, and b is worth nothing without a
    host.check_integrity()


def test_a_double_that_a_store_is_to_be_given_outlives_other_doubles_but_no_other_page():
    host, keeping = HostPages(6), Keeping(6)
    doubles(host, *"pqrs")
    there(host, *"ab")
    for name in (b"p", b"q", b"r"):
        keeping.want(host.get(name))
    there(host, *"cd")
    assert held(host, "abcdpqrs") == "abcdqr"  # s, which nobody wants, and the first that is wanted
    assert host.add([b"x"], spare=True) == []
    (places,) = keeping.due()
    for place in places:
        place.pins += 1
    assert host.add([b"x"], spare=True) == []  # they are being read
    keeping.kept(places, [True] * 2)
    host.unpin(places)
    assert [place.name for place in host.add([b"x"], spare=True)] == [b"x"]
    assert held(host, "qr") == "r"
    host.check_integrity()


def steps_of(work):
    """How many lines of the cache's code `work` runs; each turn of a generator is one."""
    steps, before = 0, sys.gettrace()

    def trace(frame, event, _):
        nonlocal steps
        if "/engine/cache/" not in frame.f_code.co_filename:
            return None
        steps += event == "line"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return steps


def test_a_look_for_what_gives_way_steps_over_pages_that_wait_for_a_slow_disk_once():
    def looks(size):
        """The steps of as many looks that find nothing, and of as many that find one page each."""
        host, keeping = HostPages(size), Keeping(size)
        for number in range(size):
            doubles(host, str(number))
            keeping.want(host.get(str(number).encode()))
        vain = steps_of(lambda: [host.add([b"x"], spare=True) for _ in range(size)])
        found = steps_of(lambda: [there(host, f"new{number}") for number in range(size)])
        assert host.names == {f"new{number}".encode() for number in range(size)}
        host.check_integrity()
        return vain / size, found / size

    for few, many in zip(looks(50), looks(500), strict=True):
        assert many < 1.1 * few


class AnyDouble(RuleBasedStateMachine):
    """Doubles beside the plain list of them that was gone through at each look."""

    def __init__(self):
        super().__init__()
        self.doubles, self.list, self.number = Doubles(), [], 0

    def draw(self, data):
        return data.draw(st.sampled_from(self.list))

    @rule(pins=st.integers(0, 1))
    def add(self, pins):
        self.number += 1
        self.list.append(Place(b"%d" % self.number, self.number, pins=pins, double=True))
        self.doubles.add(self.list[-1])

    @precondition(lambda self: self.list)
    @rule(data=st.data())
    def use(self, data):
        place = self.draw(data)
        self.list.remove(place)
        self.list.append(place)
        self.doubles.use([place])

    @precondition(lambda self: self.list)
    @rule(data=st.data())
    def want(self, data):
        place = self.draw(data)
        place.awaited = place.awaited or not place.pins

    @precondition(lambda self: self.list)
    @rule(data=st.data())
    def pin(self, data):
        place = self.draw(data)
        place.pins, place.awaited = place.pins + 1, False

    @precondition(lambda self: any(place.pins for place in self.list))
    @rule(data=st.data())
    def unpin(self, data):
        place = data.draw(st.sampled_from([place for place in self.list if place.pins]))
        place.pins -= 1
        if not place.pins:
            self.doubles.unpinned(place)

    @rule(most=st.integers(0, 3), spare=st.booleans())
    def give_way(self, most, spare):
        right = [place for place in reversed(self.list) if not (place.pins or place.awaited)]
        right += [place for place in reversed(self.list) if place.awaited and not (place.pins or spare)]
        right = right[:most]
        assert list(islice(self.doubles.victims(spare=spare), most)) == right
        for place in right:
            self.list.remove(place)
            self.doubles.remove(place)

    @invariant()
    def all_would_be_found(self):
        self.doubles.check_integrity()
        assert len(self.doubles) == len(self.list)


TestAnyDouble = AnyDouble.TestCase
TestAnyDouble.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def test_what_the_device_has_no_more_is_as_good_as_others_that_were_used_just_now():
    host = HostPages(8)
    doubles(host, *"pqrs")
    host.touch([b"q", b"p"])
    there(host, *"abcd")
    host.left([b"s", b"r", b"q", b"p"])
    there(host, *(str(number) for number in range(6)))
    assert held(host, "pqrsabcd") == "pq"  # which were asked for again
    host.check_integrity()


def test_what_is_known_of_a_double_is_not_lost_with_it():
    host = HostPages(2)
    doubles(host, *"pq")
    host.get(b"p").stored, host.get(b"p").offers, host.get(b"q").offers = True, 1, 5
    there(host, *"ab")
    assert gave_way(host, b"p") and gave_way(host, b"q")
    host.left([b"a", b"b"])
    places = host.add([b"p", b"q"])
    assert [(place.name, place.stored, place.offers) for place in places] == [(b"p", True, 1), (b"q", False, 5)]
    assert not gave_way(host, b"p")
    host.check_integrity()


def test_with_room_to_spare_nothing_leaves_that_only_the_host_has():
    host = HostPages(4)
    there(host, *"ab")
    doubles(host, *"pq")
    assert host.spare()
    assert [place.name for place in host.add([b"c", b"d", b"e"], spare=True)] == [b"c", b"d"]
    assert held(host, "abcdpq") == "abcd" and not host.spare()
    host.check_integrity()


def test_pages_that_are_here_or_gave_way_as_doubles_have_been_seen():
    host = HostPages(2)
    doubles(host, *"pq")
    there(host, "a")  # p gives way
    host.held([b"y"])
    assert gave_way(host, b"p") and host.unseen([b"x", b"a", b"p", b"q", b"y"]) == [0, 4]
    host.left([b"p"])
    assert host.unseen([b"p", b"q"]) == [0]


def above(host, policy, *names):
    """Pages 0, 1, … of the device, which the host has not."""
    device = DevicePages(host, policy)
    device.remember([name.encode() for name in names], 0, range(len(names)))
    return device


def test_the_first_pages_of_a_text_come_down_first_but_ahead_of_need_the_last():
    host = HostPages(4)
    there(host, "x", "y")
    device = above(host, "write-back", *"abcd")
    places, refused = device.leave(range(4), spare=True)
    assert (set(places), refused, device.cold) == ({2, 3}, 2, {2, 3})  # as the others stay on the device for longer
    host.unpin(places.values())
    places, refused = device.leave(range(2))
    assert (set(places), refused, device.cold) == ({0, 1}, 0, {0, 1, 2, 3}) and held(host, "abcdxy") == "abcd"
    device.check_integrity(range(4))
    device.used([b"a", b"b", b"c", b"d"], range(3))
    assert device.cold == {3}
    device.check_integrity(range(4))


def test_of_pages_that_were_never_asked_for_again_second_hit_takes_none_down():
    host = HostPages(9)
    device = above(host, "second-hit", *"abcd")
    device.again([b"a", b"b", b"c", b"d"], range(2))
    places, refused = device.leave(range(4))
    assert [place.name for place in places.values()] == [b"a", b"b"] and not refused
    assert all(place.hit for place in places.values()) and device.cold == {0, 1, 2, 3}


def test_pinned_places_stay_and_a_forgotten_one_is_free_with_its_last_pin():
    host = HostPages(2)
    (one, two) = host.add([b"a", b"b"])
    assert host.add([b"c"]) == []
    host.forget(one)
    assert host.get(b"a") is None and host.pool.free_pages == 0
    host.check_integrity()
    host.unpin([one])
    assert host.pool.free_pages == 1
    two.there = True
    host.unpin([two])
    assert [place.name for place in host.add([b"c", b"d", b"e"])] == [b"c", b"d"]
    host.clear()
    host.check_integrity()


def test_a_run_ends_at_the_first_page_that_is_not_there():
    host = HostPages(9)
    there(host, *"ab")
    (coming,) = host.add([b"c"])
    names = [b"a", b"b", b"c", b"d"]
    assert (host.run(names, 0, 4), host.run(names, 1, 4), host.run(names, 2, 4), host.run(names, 4, 4)) == (2, 1, 0, 0)
    coming.there = True
    assert host.run(names, 0, 4) == 3 and host.run(names, 0, 2) == 2


@given(
    texts=st.lists(st.lists(st.integers(0, 1), max_size=12), min_size=1, max_size=6),
    salts=st.lists(st.sampled_from([b"", b"a"]), min_size=6, max_size=6),
    page_size=st.integers(1, 3),
)
@settings(deadline=None, max_examples=50)
def test_pages_have_one_name_exactly_where_all_up_to_their_end_is_equal(texts, salts, page_size):
    known = {}
    for text, salt in zip(texts, salts, strict=False):
        ids = array("i", text)
        names = PageNames(salt, page_size, lambda first, end, ids=ids: ids[first:end].tobytes())
        pages = len(text) // page_size
        names.upto(pages // 2)  # a text is named bit by bit
        for page, name in enumerate(names.upto(pages)[:pages], 1):
            assert known.setdefault(name, (salt, text[: page * page_size])) == (salt, text[: page * page_size])
    assert len(set(map(repr, known.values()))) == len(known)


def test_the_ceiling_is_the_share_of_pages_that_came_before():
    draw, ceiling = random.Random(1), Ceiling()
    assert ceiling.ratio == 0.0
    pages = [draw.randbytes(32) for _ in range(20_000)]
    ceiling.ask(pages)
    assert abs(ceiling.distinct - 20_000) < 600 and ceiling.ratio < 0.03
    for _ in range(3):
        ceiling.ask(pages)
    assert abs(ceiling.ratio - 0.75) < 0.01
    few = Ceiling()
    few.ask(pages[:10] * 2)
    assert abs(few.distinct - 10) < 0.5 and abs(few.ratio - 0.5) < 0.03


# ── what a store is offered ──────────────────────────────────────────────────────────────────


def pages_there(count, first=0):
    places = [Place(bytes([first + number]) * 4, number) for number in range(count)]
    for place in places:
        place.there = True
    return places


def offered(keeping):
    return ["".join(str(place.name[0]) for place in places) for places in keeping.due()]


def test_what_a_store_refuses_is_offered_again_after_a_pause_which_doubles():
    keeping, places, times = Keeping(100), pages_there(3), []
    for place in places:
        keeping.want(place)
    for now in range(2_000):
        keeping.now = now
        assert keeping.waits == bool(keeping._pending or keeping._refused) or keeping.paused
        if moves := keeping.due():
            assert moves == [places] and keeping.due() == []
            times.append(now)
            keeping.kept(places, [False] * 3)
    assert times == [0, 15, 45, 105, 225, 465, 765, 1065]  # MOST_OFFERS of them
    keeping.want(places[0])
    assert keeping.due() == []


def test_while_a_store_is_read_from_it_is_given_little():
    keeping, places = Keeping(810), pages_there(200)
    for place in places[:100]:
        keeping.want(place)
    assert keeping.due(reading=True) == [] and keeping.waits and keeping.lag == 100
    keeping.now = LATE_SECONDS  # the last ones were so long ago
    (one, two) = keeping.due(reading=True)
    assert one + two == places[:64] and keeping.lag == 100
    keeping.kept(one, [True] * 32)
    assert keeping.due(reading=True) == [] and keeping.lag == 68
    assert keeping.due() == [places[64:96]] and keeping.lag == 68
    for place in places[100:]:
        keeping.want(place)
    keeping.kept(two, [True] * 32)
    assert keeping.due(reading=True) == [places[96:128]]  # an eighth of the host waits


def test_a_store_that_takes_nothing_is_offered_nothing_new_and_one_that_takes_some_is():
    keeping, (one, two, three, four) = Keeping(100), pages_there(4)
    keeping.want(one)
    keeping.want(two)
    assert offered(keeping) == ["01"]
    keeping.kept([one, two], [False, True])
    keeping.want(three)
    assert offered(keeping) == ["2"]
    keeping.kept([three], [False])
    keeping.want(four)
    keeping.now = 14.0
    assert offered(keeping) == [] and not keeping.waits
    keeping.now = 15.0
    assert keeping.waits and offered(keeping) == ["302"]
    keeping.kept([four, one, three], [True, True, True])
    keeping.want(four)
    assert offered(keeping) == [] and not keeping.waits
    assert [place.stored for place in (one, two, three, four)] == [True] * 4


def test_what_waits_is_bounded_and_what_stays_in_the_host_is_never_left_out():
    """A store takes nothing for long, and a scan passes through a host of 3 pages, of which one is a conversation's."""
    keeping, (first, *scan) = Keeping(3), pages_there(99)
    keeping.want(first)
    for place in scan:
        keeping.want(place)
        assert len(keeping._pending) <= 6
        place.known = place in scan[-2:]
    assert offered(keeping) == ["09798"]


def test_what_left_the_host_meanwhile_is_offered_no_more():
    keeping, places = Keeping(9), pages_there(9)
    keeping.want(places[0])
    assert offered(keeping) == ["0"]
    keeping.kept(places[:1], [False])
    for place in places[5:]:
        keeping.want(place)
    places[5].known = False
    keeping.now = 20.0
    assert offered(keeping) == ["6780"]
    keeping.kept([places[number] for number in (6, 7, 8, 0)], [False] * 4)
    places[7].known = False
    (again,) = pages_there(1, 7)  # came down anew
    keeping.want(again)
    keeping.now = 60.0
    assert offered(keeping) == ["7680"] and again.stored
    keeping.clear()
    keeping.now = 99.0
    assert offered(keeping) == []
