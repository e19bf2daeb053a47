"""A device in plain Python that applies StepPlans as a worker would, and checks what each row reads.

Keys and values stand for the prefix they were computed from: position p of a row writes a hash of its tokens up to
p, and a row may attend only to pages that hold exactly the hashes of its own prefix. A page shared wrongly, freed
too early or never written shows at once. Sampling is a function of the prefix and the request's seed. What a
request's salt is the device learns from `bad_words`: it goes into the hashes, so that salts may share no page. So do a
prompt's keys, where they are not its ids: a device sees what an image shows, and not its placeholders.
"""

from array import array

from engine.messages.request import Admit, Sampling
from engine.messages.step import Logprobs, SlotAdmit, StepDone, StepPlan

VOCABULARY = 4


def extended(prefix: int, token: int) -> int:
    return hash((prefix, token))


def sampled(prefix: int, seed: int) -> int:
    return hash((prefix, seed)) // 7 % VOCABULARY


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
    """`burst` tokens at most from a sampled row, as a speculating device gives; `computed` counts positions."""

    def __init__(self, pages: int, page_size: int, slots: int, max_step_tokens: int, burst: int = 1) -> None:
        self.pages, self.page_size, self.slots = pages, page_size, slots
        self.max_step_tokens, self.burst = max_step_tokens, burst
        self.tokens: dict[int, list[int]] = {}  # slot: tokens
        self.admits: dict[int, SlotAdmit] = {}
        self.table: dict[tuple[int, int], int] = {}  # slot, index: page
        self.store: dict[tuple[int, int], int] = {}  # page, offset: hash of the prefix written there
        self.computed = 0
        self.order: list[int] = []  # seeds in the order of admission to slots

    def run(self, plan: StepPlan) -> StepDone:
        rows = self._columns(plan.rows, 4)
        self._apply_updates(plan)
        assert rows and len({slot for slot, *_ in rows}) == len(rows), "a slot has two rows in a step"
        assert sum(length for _, _, length, _ in rows) <= self.max_step_tokens
        prefixes = {slot: self._prefixes(slot, start + length) for slot, start, length, _ in rows}
        written: dict[tuple[int, int], int] = {}
        for slot, start, length, _ in rows:
            assert length > 0
            for position in range(start, start + length):
                place, value = self._place(slot, position), prefixes[slot][position]
                assert written.setdefault(place, value) == value, f"two rows of a step write {place}"
        self.store |= written
        self.computed += sum(length for _, _, length, _ in rows)
        counts, tokens = array("i"), array("i")
        logprobs: list[Logprobs] = []
        prompt_logprobs: list[Logprobs] = []
        for row, (slot, start, length, sample) in enumerate(rows):
            end = start + length
            admit = self.admits[slot]
            first, last = max(start, admit.scored), min(end, admit.prompt_len - 1)
            if admit.sampling.prompt_logprobs >= 0 and first < last:
                scored = self.tokens[slot][first + 1 : last + 1]
                prompt_logprobs.append(scores(row, first + 1, scored, admit.sampling.prompt_logprobs))
            for position in range(end):
                place = self._place(slot, position)
                assert self.store.get(place) == prefixes[slot][position], f"slot {slot} reads another's page at {place}"
            if sample:
                new = self._sample(prefixes[slot][end - 1], admit.sampling.seed)
                if admit.sampling.logprobs >= 0:
                    logprobs.append(scores(len(counts), end, new, admit.sampling.logprobs))
                self.tokens[slot][end : end + len(new)] = new
                counts.append(len(new))
                tokens += array("i", new)
        return StepDone(plan.step, counts.tobytes(), tokens.tobytes(), 0.0, tuple(logprobs), tuple(prompt_logprobs))

    def _apply_updates(self, plan: StepPlan) -> None:
        for admit in plan.admits:
            assert 0 <= admit.slot < self.slots
            self.tokens[admit.slot] = list(array("i", admit.ids))
            self.admits[admit.slot] = admit
            self.order.append(admit.sampling.seed)
        updates = self._columns(plan.pages, 3)
        assert len({(slot, index) for slot, index, _ in updates}) == len(updates), "a page is set twice in a step"
        for slot, index, page in updates:
            assert 0 <= page < self.pages
            self.table[slot, index] = page

    @staticmethod
    def _columns(data: bytes, width: int) -> list[tuple[int, ...]]:
        numbers = array("i", data)
        return [tuple(numbers[at : at + width]) for at in range(0, len(numbers), width)]

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        return self.table[slot, position // self.page_size], position % self.page_size

    def _prefixes(self, slot: int, end: int) -> list[int]:
        assert end <= len(self.tokens[slot]), f"slot {slot} computes tokens that are not there yet"
        prefix, prefixes = started(self.admits[slot].sampling), []
        for token in seen(self.admits[slot].sampling, self.tokens[slot][:end]):
            prefix = extended(prefix, token)
            prefixes.append(prefix)
        return prefixes

    def _sample(self, prefix: int, seed: int) -> list[int]:
        new: list[int] = []
        for _ in range(1 + prefix % self.burst):
            new.append(sampled(prefix, seed))
            prefix = extended(prefix, new[-1])
        return new
