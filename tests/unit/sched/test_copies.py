"""Copies of attention: whatever happens, each request gets the tokens it would get alone, in the copy that suits it."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from simulated_copies import SimulatedCopies
from test_batcher import POLICIES, AnythingHappens, Bench

from engine.sched.copies import Copies


class CopiesBench(Bench):
    """As a Bench, of `copies`, which have `slots` together and `pages` each."""

    def __init__(
        self, copies=2, pages=64, page_size=4, slots=8, max_step_tokens=64, policy="fcfs", prefix_cache=True, depth=2,
        max_model_len=1000, max_waiting=1000, fronts=1, held_steps=0,
    ):  # fmt: skip
        super().__init__(depth=depth)
        self.scheduler = Copies(
            copies, pages, page_size, slots, max_model_len, max_step_tokens, POLICIES[policy](), prefix_cache,
            max_waiting, fronts=fronts, held_steps=held_steps,
        )  # fmt: skip
        self.device = SimulatedCopies(copies, pages, page_size, slots, max_step_tokens)

    def commit(self):
        for told in self.scheduler.commit_each(self.flying.popleft()):
            self.told(told)


class AnythingHappensToCopies(AnythingHappens):
    @initialize(
        copies=st.integers(2, 4),
        pages=st.integers(2, 16),
        page_size=st.integers(1, 4),
        slots=st.integers(4, 9),
        max_step_tokens=st.sampled_from([1, 3, 7, 30]),
        policy=st.sampled_from(sorted(POLICIES)),
        prefix_cache=st.sampled_from([True, True, True, False]),
        depth=st.integers(1, 4),
        held_steps=st.sampled_from([0, 3]),
    )
    def start(self, **options):
        self.bench = CopiesBench(**options, max_model_len=24)
        self.capacity = options["pages"] * options["page_size"]
        self.next = 0


AnythingHappensToCopies.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestAnythingToCopies = AnythingHappensToCopies.TestCase
