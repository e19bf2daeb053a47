"""A device in plain Python that applies StepPlans as a worker would, and checks what each row reads.

Keys and values stand for the prefix they were computed from: position p of a row writes a hash of its tokens up to
p, and a row may attend only to pages that hold exactly the hashes of its own prefix. A page shared wrongly, freed
too early or never written shows at once. Sampling is a function of the prefix and the request's seed. What a
request's salt is the device learns from `bad_words`: it goes into the hashes, so that salts may share no page. So do a
prompt's keys, where they are not its ids: a device sees what an image shows, and not its placeholders.

With `states` of so many pages it is a recurrent model: a row begins where the state of its slot stands, which is that
of its own tokens. What is kept of a state lies in pages, and is a state only as long as all of them hold it.

A row of drafts begins where its slot stands, as on a real device: which of its drafts are right is a function of the
prefix too. What the wrong ones leave in the cache are hashes that nobody may read.
"""

from array import array
from typing import Any

from engine.messages.request import Admit
from engine.messages.step import DRAFTS, NOTHING, Logprobs, SlotAdmit, StepDone, StepPlan
from engine.params.sampling import Sampling
from engine.testing.steps import rows_of

VOCABULARY = 4
WRONG = -1  # the hash that a wrong draft leaves


def extended(prefix: int, token: int) -> int:
    return hash((prefix, token))


def sampled(prefix: int, seed: int) -> int:
    return hash((prefix, seed)) // 7 % VOCABULARY


def burst_after(prefix: int, burst: int) -> int:
    """How many tokens a row gets that stands there, if it may have so many."""
    return 1 + prefix % burst


def least_steps(admit: Admit, burst: int) -> int:
    """Steps from the first to the one that ends a request of one chunk, none of them wasted."""
    tokens, _ = naive(admit)
    ids = array("i", admit.ids).tolist() + tokens
    prefix, prefixes = started(admit.sampling), []
    for token in ids:
        prefix = extended(prefix, token)
        prefixes.append(prefix)
    length, steps = len(ids) - len(tokens) + 1, 1  # the prompt's step yields one token
    while length < len(ids):
        length += burst_after(prefixes[length - 1], burst)
        steps += 1
    return steps


def seen(sampling: Sampling, ids: list[int]) -> list[int]:
    """What the device reads at each position: the keys of the prompt, and of what follows the ids."""
    keys = array("i", sampling.bad_words[1])
    return [*keys[: len(ids)], *ids[len(keys) :]]


def naive(admit: Admit) -> tuple[list[int], str]:
    """What a request yields when it has a device to itself: its tokens, and why it ends."""
    prefix, tokens = started(admit.sampling), []
    for token in seen(admit.sampling, array("i", admit.ids).tolist()):
        prefix = extended(prefix, token)
    while len(tokens) < admit.max_new:
        tokens.append(sampled(prefix, admit.sampling.seed))
        prefix = extended(prefix, tokens[-1])
        if tokens[-1] in admit.stop_ids:
            return tokens, "stop"
    return tokens, "length"


def started(sampling: Sampling) -> int:
    """The hash of no tokens."""
    return hash(sampling.bad_words[0])


def scores(row: int, start: int, tokens: list[int], wide: int) -> Logprobs:
    """What the device says of `tokens` at `start` and on; `wide` numbers in the place of the likeliest."""
    places = range(start, start + len(tokens))
    numbers = array("i", [place * 10 + index for place in places for index in range(wide)]).tobytes()
    return Logprobs(row, array("f", places).tobytes(), array("i", tokens).tobytes(), numbers, numbers)


def sampling(seed: int, salt: str = "", logprobs: int = -1, prompt_logprobs: int = -1, keys: bytes = b"") -> Sampling:
    return Sampling(
        temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed, bad_words=(salt.encode(), keys),
        logprobs=logprobs, prompt_logprobs=prompt_logprobs,
    )  # fmt: skip


class SimulatedDevice:
    """`burst` tokens at most from a row of drafts; `computed` counts positions."""

    def __init__(
        self, pages: int, page_size: int, slots: int, max_step_tokens: int, burst: int = 1, states: int = 0
    ) -> None:
        self.pages, self.page_size, self.slots = pages, page_size, slots
        self.max_step_tokens, self.burst, self.states = max_step_tokens, burst, states
        self.state: dict[int, tuple[int, int]] = {}  # slot: positions that it is of, and the hash of their prefix
        self.tokens: dict[int, list[int]] = {}  # slot: tokens
        self.admits: dict[int, SlotAdmit] = {}
        self.table: dict[tuple[int, int], int] = {}  # slot, index: page
        self.store: dict[tuple[int, int], Any] = {}  # page, offset: hash of the prefix written there, or of a state
        self.computed = 0
        self.restored = 0  # requests that began with a state
        self.order: list[int] = []  # seeds in the order of admission to slots

    def run(self, plan: StepPlan) -> StepDone:
        self._apply_updates(plan)
        planned = list(rows_of(plan))
        assert planned and len({slot for slot, *_ in planned}) == len(planned), "a slot has two rows in a step"
        assert sum(length for _, _, length, _ in planned) <= self.max_step_tokens
        rows = [(slot, self._start(slot, start, *rest), *rest) for slot, start, *rest in planned]
        known = {slot: len(self.tokens[slot]) for slot, *_ in rows}
        new = {row[0]: self._yielded(*row) for row in rows}
        prefixes = {slot: self._prefixes(slot) for slot, *_ in rows}
        for slot, start, length, _ in rows if self.states else ():
            begun = started(self.admits[slot].sampling)
            position, prefix = self.state.get(slot, (0, begun))
            wanted = start, prefixes[slot][start - 1] if start else begun
            assert (position, prefix) == wanted, f"slot {slot} begins at {start} with the state of {position}"
            self.state[slot] = start + length, prefixes[slot][start + length - 1]
        written: dict[tuple[int, int], int] = {}
        for slot, start, length, _ in rows:
            assert length > 0
            for position in range(start, start + length):
                right = position < len(self.tokens[slot]) - (position >= known[slot])
                place, value = self._place(slot, position), prefixes[slot][position] if right else WRONG
                assert written.setdefault(place, value) == value, f"two rows of a step write {place}"
        self.store |= written
        self.computed += sum(length for _, _, length, _ in rows)
        counts, tokens = array("i"), array("i")
        logprobs: list[Logprobs] = []
        prompt_logprobs: list[Logprobs] = []
        for row, (slot, start, length, yields) in enumerate(rows):
            admit = self.admits[slot]
            first, last = max(start, admit.scored), min(start + length, admit.prompt_len - 1)
            if admit.sampling.prompt_logprobs >= 0 and first < last:
                scored = self.tokens[slot][first + 1 : last + 1]
                prompt_logprobs.append(scores(row, first + 1, scored, admit.sampling.prompt_logprobs))
            for position in range(min(start + length, len(self.tokens[slot]) - (yields != NOTHING))):
                self._read(slot, self._place(slot, position), prefixes[slot][position])
            if yields != NOTHING:
                if admit.sampling.logprobs >= 0 and new[slot]:
                    logprobs.append(scores(len(counts), known[slot], new[slot], admit.sampling.logprobs))
                counts.append(len(new[slot]))
                tokens += array("i", new[slot])
        return StepDone(plan.step, counts.tobytes(), tokens.tobytes(), 0.0, tuple(logprobs), tuple(prompt_logprobs))

    def clear(self) -> None:
        """All that was in the cache is lost."""
        self.store.clear()
        self.table.clear()
        self.state.clear()

    def _read(self, slot: int, place: tuple[int, int], wanted: int) -> None:
        assert self.store.get(place) == wanted, f"slot {slot} reads another's page at {place}"

    def _start(self, slot: int, start: int, length: int, yields: int) -> int:
        """Where a row really begins, as StepPlan says."""
        if yields == NOTHING:
            return start
        known = len(self.tokens[slot])
        real = min(known - 1, self.admits[slot].limit - 1 - length) if yields == DRAFTS else known - length
        assert start <= known - (1 if yields == DRAFTS else length), f"slot {slot} has fewer tokens than was sure"
        assert yields == DRAFTS or real == start, f"slot {slot} yields one token each, so its start is known"
        return real

    def _yielded(self, slot: int, start: int, length: int, yields: int) -> list[int]:
        """Draws the tokens that a row yields, and appends them to its slot."""
        if yields == NOTHING:
            assert start + length <= len(self.tokens[slot]), f"slot {slot} computes tokens that are not there yet"
            return []
        prefix, seed = self._prefixes(slot)[-1], self.admits[slot].sampling.seed
        most = start + length + 1 - len(self.tokens[slot])  # one after each computed position from the last token on
        count = min(most, burst_after(prefix, self.burst)) if yields == DRAFTS else 1
        assert count > 0 or len(self.tokens[slot]) == self.admits[slot].limit, f"slot {slot} wastes a row"
        new: list[int] = []
        for _ in range(count):
            new.append(sampled(prefix, seed))
            prefix = extended(prefix, new[-1])
        self.tokens[slot] += new
        return new

    def _apply_updates(self, plan: StepPlan) -> None:
        for kept in plan.keeps:
            pages = array("i", kept.pages)
            assert len(set(pages)) == self.states and all(0 <= page < self.pages for page in pages)
            for index, page in enumerate(pages):
                for offset in range(self.page_size):
                    self.store[page, offset] = self.state[kept.slot], index, offset
        for admit in plan.admits:
            self.state.pop(admit.slot, None)
            if pages := array("i", admit.state):
                assert len(pages) == self.states
                state, _, _ = self.store[pages[0], 0]
                for index, page in enumerate(pages):
                    for offset in range(self.page_size):
                        assert self.store[page, offset] == (state, index, offset), "a state is not whole"
                self.state[admit.slot] = state
                self.restored += 1
            assert 0 <= admit.slot < self.slots
            self.tokens[admit.slot] = list(array("i", admit.ids))
            self.admits[admit.slot] = admit
            self.order.append(admit.sampling.seed)
        numbers = array("i", plan.pages)
        updates = [tuple(numbers[at : at + 3]) for at in range(0, len(numbers), 3)]
        assert len({(slot, index) for slot, index, _ in updates}) == len(updates), "a page is set twice in a step"
        for slot, index, page in updates:
            assert 0 <= page < self.pages
            self.table[slot, index] = page

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        return self.table[slot, position // self.page_size], position % self.page_size

    def _prefixes(self, slot: int) -> list[int]:
        """The hash of the tokens up to each position."""
        prefix, prefixes = started(self.admits[slot].sampling), []
        for token in seen(self.admits[slot].sampling, self.tokens[slot]):
            prefix = extended(prefix, token)
            prefixes.append(prefix)
        return prefixes
