"""The scheduler on a simulated device: every request gets the tokens it would get alone, whatever else happens."""

from array import array
from collections import deque
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulated_device import VOCABULARY, SimulatedDevice, least_steps, naive, sampling, scores

from engine.cache.keys import keys_with, media_keys
from engine.cache.pins import Holder
from engine.errors import RequestError
from engine.messages.assets import Bound
from engine.messages.grammars import GRAMMAR
from engine.messages.reply import Tokens
from engine.messages.request import Admit
from engine.messages.sessions import ProgramUse, SessionUse
from engine.messages.step import TOKEN as TOKEN_ROW
from engine.sched import Scheduler
from engine.sched.chunks import ChunkRule
from engine.testing.steps import rows_of
from engine_plugins.policies.order import FirstComeFirstServed, LongestPrefixMatch

POLICIES = {"fcfs": FirstComeFirstServed, "lpm": LongestPrefixMatch}


def request(
    rid, ids, max_new=4, *, stop_ids=(), priority=0, seed=0, salt="", logprobs=-1, prompt_logprobs=-1, keys=(), after=0,
    program="", session="", seconds=9.0,
):  # fmt: skip
    keys = array("i", keys).tobytes()
    asked = sampling(seed, salt, logprobs, prompt_logprobs, keys)
    packed = array("i", ids).tobytes()
    return Admit(
        rid,
        packed,
        asked,
        tuple(stop_ids),
        max_new,
        priority,
        salt,
        keys=keys,
        scored_after=after,
        program=ProgramUse(b"", program) if program else None,
        session=SessionUse(b"", session, seconds) if session else None,
    )


class Bench:
    """A scheduler, its device, up to `depth` steps in flight between them, and what each request was told."""

    def __init__(
        self, pages=64, page_size=4, slots=8, max_step_tokens=64, policy="fcfs", prefix_cache=True, depth=2,
        burst=1, max_model_len=1000, max_waiting=1000, lanes=1, attention=0.0, fronts=1,
        tiers=None, states=0,
    ):  # fmt: skip
        self.scheduler = Scheduler(
            pages, page_size, slots, max_model_len=max_model_len, max_step_tokens=max_step_tokens,
            policy=POLICIES[policy](), prefix_cache=prefix_cache, max_waiting=max_waiting,
            drafts=burst - 1, fronts=fronts,
            chunks=ChunkRule(max_step_tokens, lanes, attention, least=2) if lanes > 1 else None,
            tiers=tiers, state_pages=states,
        )  # fmt: skip
        if states:  # for tiny texts
            kept = self.scheduler.places.states
            kept.least, kept.cut, kept.interval = 2, 2, 6
        self.device = SimulatedDevice(pages, page_size, slots, max_step_tokens, burst, states)
        self.depth = depth
        self.now = 0.0
        self.flying = deque()
        self.admitted: dict[str, Admit] = {}
        self.tokens: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self.ends: dict[str, str] = {}

    @property
    def live(self):
        return [rid for rid in self.admitted if rid not in self.ends]

    def admit(self, *admits):
        for admit in admits:
            self.scheduler.admit(admit)
            self.admitted[admit.rid] = admit
            self.tokens[admit.rid] = []

    def plan(self):
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            self.flying.append(self.device.run(plan))
        return plan

    def commit(self):
        return self.told(self.scheduler.commit(self.flying.popleft(), self.now))

    def told(self, message: Tokens | None):
        if message is None:
            return None
        counts, tokens = array("i", message.counts), deque(array("i", message.tokens))
        assert len(counts) == len(message.rids) == len(set(message.rids)) and sum(counts) == len(tokens)
        cached = dict(message.cached)
        self.check_scores(message)
        for row, (rid, count) in enumerate(zip(message.rids, counts, strict=True)):
            assert rid not in self.ends, f"{rid} is told more after its end"
            assert (row in cached) == (count > 0 and not self.tokens[rid]), "cached goes with the first token, once"
            self.cached |= {rid: cached[row]} if row in cached else {}
            self.tokens[rid] += [tokens.popleft() for _ in range(count)]
            assert self.tokens[rid] == naive(self.admitted[rid])[0][: len(self.tokens[rid])]
        for finish in message.finishes:
            rid = message.rids[finish.row]
            self.ends[rid] = finish.reason
            if finish.reason != "abort":
                assert (self.tokens[rid], finish.reason) == naive(self.admitted[rid])
                assert finish.matched == (self.tokens[rid][-1] if finish.reason == "stop" else None)
        return message

    def check_scores(self, message):
        """What a row asked for is there, once, of exactly the tokens it is told."""
        of_reply, of_prompt = (
            {part.row: part for part in parts} for parts in (message.logprobs, message.prompt_logprobs)
        )
        tokens = deque(array("i", message.tokens))
        for row, (rid, count) in enumerate(zip(message.rids, array("i", message.counts), strict=True)):
            asked, ids = self.admitted[rid].sampling, array("i", self.admitted[rid].ids).tolist()
            new = [tokens.popleft() for _ in range(count)]
            told = len(ids) + len(self.tokens[rid])
            expected = scores(row, told, new, asked.logprobs) if asked.logprobs >= 0 and new else None
            assert of_reply.pop(row, None) == expected
            first = self.admitted[rid].scored_after + 1
            wanted = asked.prompt_logprobs >= 0 and len(ids) > first and new and not self.tokens[rid]
            expected = scores(row, first, ids[first:], asked.prompt_logprobs) if wanted else None
            assert of_prompt.pop(row, None) == expected
        assert not of_reply and not of_prompt

    def step(self):
        """One turn of the loop that keeps `depth` steps in flight; False when there is nothing to do."""
        while len(self.flying) < self.depth and self.plan():
            pass
        if self.flying:
            self.commit()
        return bool(self.flying)

    def drain_steps(self):
        """Run until every request has ended."""
        while self.live or self.flying:
            self.step()

    def drain(self, steps=20_000):
        """Run until every request has ended, and check that nothing is left behind."""
        while self.live:
            assert self.flying or self.plan(), "requests wait, but nothing runs"
            self.step()
            steps -= 1
            assert steps, "no progress"
        while self.flying:
            self.commit()
        assert self.plan() is None
        self.scheduler.check_integrity()
        counts = self.scheduler.counts()
        assert counts["running"] == counts["waiting"] == 0
        assert counts["pages_free"] + counts["pages_cached"] == counts["pages"]
        assert self.scheduler.flush() == (counts["pages_cached"], 0)


# ── anything may happen in any order ─────────────────────────────────────────────────────────

TOKEN = st.integers(0, VOCABULARY - 1)
STEM = (0, 1, 2, 3, 0, 1, 1, 2, 3, 3, 2, 1)  # prompts share parts of it


def shown(ids, pictures):
    """The keys of `ids`, in which the first of `pictures` stands at 1 and the next at 5, three tokens long each."""
    runs = [(start, media_keys(bytes([picture]), 3)) for start, picture in zip((1, 5), pictures, strict=False)]
    return keys_with(array("i", ids), [(start, run) for start, run in runs if start + 3 <= len(ids)])


class AnythingHappens(RuleBasedStateMachine):
    @initialize(
        pages=st.integers(2, 16),
        page_size=st.integers(1, 4),
        slots=st.integers(1, 5),
        max_step_tokens=st.sampled_from([1, 3, 7, 30]),
        policy=st.sampled_from(sorted(POLICIES)),
        prefix_cache=st.sampled_from([True, True, True, False]),
        depth=st.integers(1, 4),
        burst=st.sampled_from([1, 1, 2, 4]),
        lanes=st.sampled_from([1, 1, 1, 2, 3, 4]),
        attention=st.sampled_from([0.0, 0.5]),
    )
    def start(self, burst, lanes, **options):
        burst = burst if lanes == 1 else 1
        self.bench = Bench(**options, burst=burst, lanes=lanes, max_model_len=24)
        self.capacity = options["pages"] * options["page_size"]
        self.next = 0

    @rule(
        stem=st.integers(0, len(STEM)),
        tail=st.lists(TOKEN, max_size=4),
        max_new=st.integers(1, 10),
        stop_ids=st.sampled_from([(), (), (0,), (1, 3)]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        seed=st.integers(0, 3),
        salt=st.sampled_from(["", "", "a", "b"]),
        logprobs=st.sampled_from([-1, -1, 0, 2]),
        prompt_logprobs=st.sampled_from([-1, -1, -1, 0, 1]),
        after=st.sampled_from([0, 0, 3, 5, 9]),
        pictures=st.sampled_from([(), (), (0,), (1,), (1, 2)]),
        program=st.sampled_from(["", "", "p", "q", "r"]),
        session=st.sampled_from(["", "", "s", "t", "u"]),
        seconds=st.sampled_from([3.0, 100.0]),
    )
    def admit(self, stem, tail, max_new, pictures, **options):
        ids = [*STEM[:stem], *tail]
        self.next += 1
        admit = request(f"r{self.next}", ids, max_new, keys=shown(ids, pictures) if pictures else (), **options)
        fits = len(ids) >= 1 and len(ids) + max_new <= 24 and len(ids) + max_new - 1 <= self.capacity
        if fits:
            self.bench.admit(admit)
        else:
            with pytest.raises(RequestError):
                self.bench.admit(admit)

    @rule()
    def plan(self):
        if len(self.bench.flying) < self.bench.depth:
            self.bench.plan()

    @precondition(lambda self: self.bench.flying)
    @rule()
    def commit(self):
        self.bench.commit()

    @rule(steps=st.integers(1, 6))
    def run(self, steps):
        for _ in range(steps):
            self.bench.step()

    @precondition(lambda self: self.bench.live)
    @rule(data=st.data())
    def abort(self, data):
        rid = data.draw(st.sampled_from(self.bench.live))
        self.bench.told(self.bench.scheduler.abort(rid))
        assert self.bench.ends[rid] == "abort"

    @precondition(lambda self: self.bench.live)
    @rule(data=st.data(), keep=st.integers(0, 3))
    def stop(self, data, keep):
        rid = data.draw(st.sampled_from(self.bench.live))
        assert self.bench.scheduler.stop(rid, keep)
        self.bench.ends[rid] = "stopped"

    @rule(program=st.sampled_from(["p", "q", "r", "unknown"]))
    def end_program(self, program):
        self.bench.scheduler.end_program(Holder("program", b"", b"", program))

    @rule(id=st.sampled_from(["s", "t", "u"]), salt=st.sampled_from([b"", b"a"]))
    def end_session(self, id, salt):
        sessions, now = self.bench.scheduler.live.sessions, self.bench.now
        lives = id in {each.id for each in sessions.of(b"", salt, now)}
        assert sessions.end(b"", salt, id, now) == lives

    @rule(seconds=st.sampled_from([1, 5, 70]))
    def time_passes(self, seconds):
        self.bench.now += seconds
        sessions = self.bench.scheduler.live.sessions
        sessions.count(self.bench.now)
        counts = self.bench.scheduler.counts()
        assert sessions.pages <= counts["pages"] - counts["pages_free"]

    @rule()
    def flush(self):
        self.bench.scheduler.flush()
        assert self.bench.scheduler.counts()["pages_cached"] == 0

    @rule()
    def lose_the_device(self):
        for rid in self.bench.scheduler.reset():
            self.bench.ends[rid] = "lost"
        assert self.bench.scheduler.counts()["running"] == 0
        self.bench.flying.clear()
        self.bench.device.clear()

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "bench"):
            self.bench.scheduler.check_integrity()
            counts = self.bench.scheduler.counts()
            assert counts["running"] + counts["waiting"] == len(self.bench.live)

    def teardown(self):
        if hasattr(self, "bench"):
            self.bench.drain()


TestAnything = AnythingHappens.TestCase
TestAnything.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)


# ── what is promised, one by one ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("max_step_tokens", [8, 50, 1000])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_prefix_shared_in_the_queue_is_computed_once(policy, max_step_tokens, depth):
    bench = Bench(pages=200, max_step_tokens=max_step_tokens, policy=policy, depth=depth)
    prefix = [index % 4 for index in range(101)]  # 25 whole pages of 4
    for index in range(6):
        bench.admit(request(f"r{index}", [*prefix, index % 4, index % 3, 3], max_new=1, seed=index))
    bench.drain()
    assert bench.device.computed == 104 + 5 * 4
    assert sorted(bench.cached.values()) == [0, 100, 100, 100, 100, 100]
    assert bench.scheduler.counts()["cached_tokens_total"] == 500


def test_salts_keep_prefixes_apart():
    bench = Bench()
    for rid, salt in enumerate(["", "a", "b", "a"]):
        bench.admit(request(f"r{rid}", [1] * 9, max_new=1, salt=salt))
    bench.drain()  # the device checks that no row reads a page of another salt
    assert bench.cached == {"r0": 0, "r1": 0, "r2": 0, "r3": 8}


PIECE = st.one_of(TOKEN, st.sampled_from(["one picture", "another"]))


@given(prompts=st.lists(st.lists(PIECE, min_size=1, max_size=8), min_size=2, max_size=5), page_size=st.integers(1, 4))
@settings(deadline=None)
def test_prefixes_are_shared_exactly_where_keys_agree(prompts, page_size):
    bench = Bench(pages=200, page_size=page_size, max_step_tokens=5)
    computed = []  # the keys of all that is in the cache
    for index, pieces in enumerate(prompts):
        runs = [[piece] if isinstance(piece, int) else media_keys(piece.encode(), 3).tolist() for piece in pieces]
        keys = [key for run in runs for key in run]
        ids = [max(key, 0) for key in keys]  # all pictures have the same placeholder, a token of texts too
        rid = f"r{index}"
        bench.admit(request(rid, ids, max_new=3, keys=keys if keys != ids else ()))
        while bench.live:
            bench.step()
        most = (len(keys) - 1) // page_size * page_size
        alike = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(keys, old, strict=False)))
                 for old in computed]  # fmt: skip
        whole = [min(most, length // page_size * page_size) for length in alike]
        assert bench.cached[rid] == max(whole, default=0)
        computed.append(keys + bench.tokens[rid][:-1])
    bench.drain()


def test_a_retracted_picture_finds_its_own_pages_again():
    bench = Bench(pages=12, page_size=2, slots=3, depth=3, max_step_tokens=5)
    for seed in range(6):
        keys = shown([0] * 6, (seed % 2,))
        bench.admit(request(f"r{seed}", [0] * 6, max_new=16, seed=seed, keys=keys))
    bench.drain()
    assert bench.scheduler.counts()["retractions_total"] > 2


@pytest.mark.parametrize("max_step_tokens", [5, 100])
def test_a_prompt_to_be_scored_is_computed_whole(max_step_tokens):
    bench = Bench(max_step_tokens=max_step_tokens)
    bench.admit(request("cached", [0, 1, 2, 3] * 5, max_new=1))
    while bench.live:
        bench.step()
    bench.admit(request("scored", [0, 1, 2, 3] * 5, max_new=1, prompt_logprobs=2, logprobs=1))
    bench.drain()  # Bench.told checks the scores
    assert (bench.cached["scored"], bench.device.computed) == (0, 40)
    bench.admit(request("one token", [3], max_new=1, prompt_logprobs=2))
    bench.drain()


@pytest.mark.parametrize(("after", "cached"), [(3, 0), (4, 4), (13, 12), (17, 16), (18, 16), (19, 16)])
def test_what_comes_before_the_scored_tokens_is_taken_from_the_cache(after, cached):
    bench = Bench()
    bench.admit(request("cached", [0, 1, 2, 3] * 5, max_new=1))
    while bench.live:
        bench.step()
    bench.admit(request("scored", [0, 1, 2, 3] * 5, max_new=1, prompt_logprobs=2, after=after))
    bench.drain()  # Bench.told checks the scores
    assert (bench.cached["scored"], bench.device.computed) == (cached, 40 - cached)


def test_prompts_that_are_scored_share_what_comes_before():
    bench = Bench()
    bench.admit(*[request(f"r{last}", [0, 1, 2, 3] * 5 + [last], 1, prompt_logprobs=0, after=19) for last in range(4)])
    bench.drain()
    assert (bench.cached, bench.device.computed) == ({"r0": 0, "r1": 16, "r2": 16, "r3": 16}, 21 + 3 * 5)


@pytest.mark.parametrize("after", [0, 3])
def test_scores_survive_retraction_once_each(after):
    bench = Bench(pages=12, page_size=2, slots=3, depth=3, max_step_tokens=5)
    ids = [0, 1, 2, 3, 1, 1]
    for seed in range(5):
        bench.admit(request(f"r{seed}", ids, max_new=16, seed=seed, logprobs=1, prompt_logprobs=1, after=after))
    bench.drain()
    assert bench.scheduler.counts()["retractions_total"] > 2


def test_without_the_prefix_cache_nothing_is_shared_or_kept():
    bench = Bench(prefix_cache=False)
    for index in range(3):
        bench.admit(request(f"r{index}", [1] * 9, max_new=1))
    bench.plan()
    assert bench.device.computed == 27
    bench.commit()
    assert bench.scheduler.counts()["pages_free"] == 64


def test_a_reply_is_reused_as_part_of_the_next_prompt():
    bench = Bench()
    bench.admit(request("first", [1, 2, 3], max_new=10))
    while bench.live:
        bench.step()
    bench.admit(request("second", [1, 2, 3, *bench.tokens["first"], 0], max_new=1))
    bench.drain()
    assert bench.cached == {"first": 0, "second": 12}  # 13 tokens, the last never computed


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_every_request_ends_right_when_one_alone_fills_the_pages(policy, depth, prefix_cache):
    bench = Bench(pages=10, page_size=2, slots=4, policy=policy, depth=depth, prefix_cache=prefix_cache)
    for index in range(12):
        bench.admit(request(f"r{index}", [index % 4], max_new=20, seed=index, priority=index % 2))
    bench.drain()
    assert set(bench.ends.values()) == {"length"}
    counts = bench.scheduler.counts()
    assert counts["retractions_total"] > 0
    assert counts["prompt_tokens_total"] == 12 and counts["generated_tokens_total"] == 12 * 20


def test_pages_run_out_for_the_lowest_priority_and_the_least_computed():
    bench = Bench(pages=8, page_size=2, slots=4, depth=1)
    bench.admit(
        request("oldest", [0], max_new=16, priority=1),
        request("long", [1, 2, 3], max_new=12, priority=0),
        request("short", [2], max_new=12, priority=0),
        request("urgent", [3, 2], max_new=12, priority=1),
    )
    left = []
    while bench.live:
        before = {r.rid for r in bench.scheduler.running_requests()}
        bench.step()
        gone = before - {r.rid for r in bench.scheduler.running_requests()} - bench.ends.keys()
        left += sorted(gone)
    assert left[:3] == ["short", "long", "urgent"]
    assert "oldest" not in left


def test_a_retracted_request_keeps_its_place_and_reports_cached_once():
    bench = Bench(pages=6, page_size=2, slots=2, depth=2)
    bench.admit(request("a", [0, 1], max_new=10, seed=0), request("b", [3, 3], max_new=10, seed=1))
    while not bench.scheduler.counts()["retractions_total"]:
        bench.step()
    bench.admit(request("c", [2], max_new=1, seed=2))
    bench.drain()  # Bench.told asserts that cached comes once
    assert bench.device.order == [0, 1, 1, 2]
    assert bench.cached["b"] == 0


def test_the_prefill_lasts_from_the_first_place_in_a_step_to_the_first_token():
    bench = Bench(pages=100, page_size=2, slots=2, depth=2)
    scheduler, device = bench.scheduler, bench.device
    scheduler.admit(request("long", list(range(3)) * 20, max_new=2))
    steps = -(-60 // scheduler.max_step_tokens)  # its chunks
    told = [scheduler.commit(device.run(scheduler.plan(now=10.0 + step)), now=10.5 + step) for step in range(steps + 1)]
    assert [message and message.prefills for message in told] == [None] * (steps - 1) + [((0, steps - 0.5),), ()]
    scheduler.admit(request("short", [1], max_new=1))
    assert scheduler.commit(device.run(scheduler.plan(now=99.0)), now=99.25).prefills == ((0, 0.25),)


def test_results_of_an_earlier_stay_on_the_device_are_dropped():
    bench = Bench(pages=6, page_size=2, slots=2, depth=3)
    bench.admit(request("a", [0, 1], max_new=11, seed=0), request("b", [3, 3], max_new=9, seed=1))
    while not bench.scheduler.counts()["retractions_total"]:
        if len(bench.flying) == 3:
            bench.commit()
        bench.plan()
    assert len(bench.flying) == 3  # two of them sampled for b
    bench.commit()
    bench.told(bench.scheduler.abort("a"))
    bench.plan()
    assert bench.device.order == [0, 1, 1]
    bench.drain()  # Bench.told compares the tokens


def test_a_newcomer_leaves_a_page_for_each_running_row():
    bench = Bench(pages=8, page_size=2, depth=1)
    bench.admit(request("runs", [0, 1], max_new=5))
    bench.step()
    bench.admit(request("big", [1] * 12, max_new=2))  # 6 pages: as many as are free
    bench.step()
    assert bench.scheduler.running == 1
    bench.drain()
    assert bench.scheduler.counts()["retractions_total"] == 0


def test_several_tokens_from_one_row_save_steps():
    bench = Bench(burst=4, depth=1)
    bench.admit(request("x", [1, 2], max_new=60))
    bench.drain()
    assert bench.scheduler.counts()["steps"] < 40


@given(
    depth=st.integers(1, 4),
    burst=st.integers(1, 4),
    ids=st.lists(TOKEN, min_size=1, max_size=9),
    max_new=st.integers(1, 40),
    stop_ids=st.sampled_from([(), (0,), (1, 3)]),
    seed=st.integers(0, 99),
)
def test_a_row_that_gets_several_tokens_wastes_no_step(depth, burst, ids, max_new, stop_ids, seed):
    """With any number of steps in flight, a lone request ends with the step that it would end with if each were planned
    in the knowledge of the one before."""
    bench = Bench(depth=depth, burst=burst)
    admit = request("x", ids, max_new, stop_ids=stop_ids, seed=seed)
    bench.admit(admit)
    steps = 0
    while bench.live:
        while len(bench.flying) < depth and bench.plan():
            pass
        bench.commit()
        steps += 1
    assert steps == least_steps(admit, burst)
    bench.drain()


@pytest.mark.parametrize(("pages", "page_size"), [(5, 1), (2, 3), (8, 3), (8, 2)])
def test_the_last_token_of_a_row_with_drafts_is_in_no_cached_page(pages, page_size):
    """It is never computed, whatever is in flight when it is known: not where its pages are all that there are, nor
    where a page would be whole with it, which the next turn would read."""
    bench = Bench(pages=pages, page_size=page_size, slots=1, max_step_tokens=3, burst=4)
    bench.admit(request("x", [0], max_new=5))
    bench.drain_steps()
    bench.scheduler.check_integrity()
    assert bench.scheduler.counts()["pages_cached"] == 5 // page_size
    if pages == 8:
        bench.admit(request("next", [0, *bench.tokens["x"], 1], max_new=1))
        bench.drain()  # the device checks what it reads
        assert bench.cached["next"] == 5 // page_size * page_size


def test_a_grammar_gets_one_token_a_step():
    """Its masks are for the token after those that are known."""
    bench = Bench(burst=4, depth=3)
    bench.scheduler.admit(request("x", [1, 2], max_new=9), (Bound(GRAMMAR, 7),))
    rows = []
    while plan := bench.scheduler.plan():
        rows += rows_of(plan)
    assert rows == [(0, 0, 2, TOKEN_ROW), *((0, start, 1, TOKEN_ROW) for start in range(2, 10))]


def test_drafts_leave_budget_for_a_row_of_each_request():
    bench = Bench(burst=4, slots=6, max_step_tokens=6, depth=2)
    for seed in range(6):
        bench.admit(request(f"r{seed}", [seed % 4], max_new=20, seed=seed))
    bench.drain()  # the device checks the budget


def test_higher_priority_first_then_the_order_of_arrival():
    bench = Bench(slots=1)
    for seed, priority in enumerate([0, 2, 1, 2, 0]):
        bench.admit(request(f"r{seed}", [1], max_new=1, seed=seed, priority=priority))
    bench.drain()
    assert bench.device.order == [1, 3, 2, 0, 4]


@pytest.mark.parametrize(("policy", "order"), [("fcfs", [9, 0, 1, 2, 3]), ("lpm", [9, 3, 2, 0, 1])])
def test_longest_cached_prefix_first_within_a_priority(policy, order):
    bench = Bench(slots=1, policy=policy)
    bench.admit(request("cached", [0, 1, 2, 3] * 3, max_new=1, seed=9))
    bench.plan()
    bench.admit(
        request("none", [3] * 13, max_new=1, seed=0, priority=0),
        request("also none", [2] * 13, max_new=1, seed=1, priority=0),
        request("one page", [0, 1, 2, 3, 0, 0, 0, 0, 0], max_new=1, seed=2, priority=0),
        request("two pages", [0, 1, 2, 3, 0, 1, 2, 3, 0], max_new=1, seed=3, priority=0),
    )
    if policy == "fcfs":
        bench.drain()
        assert bench.device.order == order
    else:
        bench.admit(request("urgent", [1], max_new=1, seed=4, priority=1))
        bench.drain()
        assert bench.device.order == [9, 4, *order[1:]]


def test_lpm_does_not_look_up_the_prefixes_of_a_long_queue():
    bench = Bench(slots=1, policy="lpm", pages=500)
    bench.admit(request("cached", [0, 1, 2, 3] * 3, max_new=1, seed=999))
    bench.plan()
    for seed in range(150):
        bench.admit(request(f"r{seed}", [0, 1, 2, 3, 0] if seed == 149 else [seed % 3 + 1] * 5, max_new=1, seed=seed))
    bench.drain()
    # By arrival while more than 128 wait; then those whose prefix is cached, which by now all are.
    assert bench.device.order[:23] == [999, *range(22)]
    assert sorted(bench.device.order[1:]) == list(range(150))


def test_the_token_planned_before_a_stop_id_was_seen_is_dropped():
    tokens, _ = naive(request("x", [1, 2], max_new=30))
    stop = next(token for token in tokens[1:] if token != tokens[0])
    admit = request("x", [1, 2], max_new=30, stop_ids=[stop])
    bench = Bench(depth=2)
    bench.admit(admit)
    messages = []
    while bench.live:
        bench.plan()
        if len(bench.flying) == 2:
            messages.append(bench.commit())
    assert bench.tokens["x"] == tokens[: tokens.index(stop) + 1]
    assert messages[-1].finishes[0].matched == stop
    assert len(bench.flying) == 1 and bench.commit() is None
    bench.drain()


def test_no_row_is_planned_past_max_new():
    bench = Bench(depth=3)
    bench.admit(request("x", [1, 2], max_new=2))
    assert bench.plan() and bench.plan()
    assert bench.plan() is None
    bench.commit()
    assert bench.plan() is None
    bench.commit()
    assert bench.ends == {"x": "length"} and bench.device.computed == 3


def test_a_long_prompt_does_not_hold_up_decoding():
    bench = Bench(pages=200, max_step_tokens=16, depth=1)
    bench.admit(request("chat", [1], max_new=12))
    bench.step()
    bench.admit(request("book", [2] * 150, max_new=1))
    for made in range(2, 12):
        bench.step()
        assert len(bench.tokens["chat"]) == made
    assert bench.device.computed == 1 + 10 * 16


@pytest.mark.parametrize(
    ("ids", "max_new", "param", "says"),
    [
        ([], 1, "prompt", ["0 tokens"]),
        ([1] * 30, 1, "prompt", ["30", "29"]),
        ([1] * 20, 11, "max_tokens", ["20", "11", "30", "10"]),
        ([1] * 20, 6, "max_tokens", ["20", "6", "7 KV pages", "25"]),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(ids, max_new, param, says):
    bench = Bench(pages=6, page_size=4, max_model_len=30)
    with pytest.raises(RequestError) as refusal:
        bench.admit(request("x", ids, max_new))
    assert (refusal.value.status, refusal.value.param) == (400, param)
    assert all(number in refusal.value.message for number in says)
    bench.admit(request("x", [1] * 20, 5))  # the most that fits
    bench.drain()


def test_a_live_rid_and_a_full_queue_are_refused():
    bench = Bench(max_waiting=1, slots=1)  # who finds a free slot does not wait
    bench.admit(request("a", [1]))
    with pytest.raises(RequestError, match="'a'") as refusal:
        bench.scheduler.admit(request("a", [2]))
    assert refusal.value.status == 409
    bench.admit(request("ab", [1]))
    with pytest.raises(RequestError) as refusal:
        bench.scheduler.admit(request("c", [2]))
    assert (refusal.value.status, refusal.value.code) == (503, "queue_full")
    bench.drain()
    bench.scheduler.admit(request("a", [1]))  # it lives no more


def test_request_ids_match_exactly():
    bench = Bench()
    bench.admit(request("a", [1]), request("ab", [1]))
    assert bench.scheduler.abort("abc") is None and bench.scheduler.abort("") is None
    assert not bench.scheduler.stop("b", 1)
    bench.told(bench.scheduler.abort("a"))
    bench.drain()
    assert bench.ends == {"a": "abort", "ab": "length"}


def test_a_stop_string_leaves_only_what_was_kept_in_the_cache():
    bench = Bench(depth=1)
    bench.admit(request("x", [1, 2, 3], max_new=40))
    while len(bench.tokens["x"]) < 30:
        bench.step()
    assert bench.scheduler.stop("x", keep=6)  # 9 tokens: 2 whole pages of 4
    assert bench.scheduler.counts()["pages_cached"] == 2
    assert bench.scheduler.flush() == (2, 0)


def test_a_lost_device_fails_what_ran_and_keeps_what_waits():
    bench = Bench(slots=1)
    bench.admit(request("runs", [1, 2, 3, 0, 1], max_new=8), request("waits", [1, 2, 3, 0, 1]))
    bench.step()
    assert bench.scheduler.reset() == ["runs"]
    bench.ends["runs"] = "lost"
    bench.flying.clear()
    bench.device.store.clear()
    bench.drain()
    assert bench.ends["waits"] == "length" and bench.cached["waits"] == 0
