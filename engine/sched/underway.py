"""Prompts that a copy of attention computes over several steps: who shares the prefix of one may wait for it.

    copy 0   shared prefix ▓▓▓▓▓▓▓▓▓░░░░ its own ░░     no budget for others until the prompt's last chunk
    copy 1   has budget: a request with that prefix could begin here, and would compute all of it again

To wait costs no time as far as the prefix goes: elsewhere it would take as long, or longer. What the prompt has behind
the prefix does cost time, and so do those that wait before it. So a request waits where its own rest and all that are
cheaper than to begin in another copy (copies.py). Once a later request has begun there before it, because that is more
urgent, it waits no longer: others may come for ever. Within one copy nobody has this choice.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from engine.sched.columns import StepColumns
from engine.sched.request import Request

if TYPE_CHECKING:
    from engine.sched.batcher import Scheduler

TOKEN = 4  # bytes of a key


class Full(Struct):
    """A copy whose prompts have taken all budget of its step: those that go on in the next one. `room` slots are for
    requests that may wait for it, and these will compute `before` tokens."""

    prompts: list[Request]
    room: int
    before: int = 0


class Underway:
    """Copies that have no budget, and who waits for them."""

    def __init__(self, copies: "Sequence[Scheduler]", steps: Sequence[StepColumns]) -> None:
        self._places = tuple(zip(copies, steps, strict=True))
        self._full: dict[int, Full] = {}

    def rests(self, request: Request) -> dict[int, tuple[int, int]]:
        """By copy in which `request` can wait: its own tokens that are computed there, and those of others that come
        before its first one, but for the prefix that it waits for. An embedding of media counts as a token."""
        found = {}
        for index, (copy, step) in enumerate(self._places):
            if step.budget or not step.prompts or not copy.prefix_cache:
                continue
            if index not in self._full:
                prompts = [each for each in copy.running_requests() if is_cut(each)]
                self._full[index] = Full(prompts, copy.free_slots)
            full = self._full[index]
            if full.room and not any(overtook(prompt, request) for prompt in full.prompts):
                shared = [shared_tokens(request, prompt, copy.page_size) for prompt in full.prompts]
                behind = [
                    len(prompt.ids) - max(held, prompt.computed)
                    for prompt, held in zip(full.prompts, shared, strict=True)
                ]
                held = max(copy.cached(request), *shared, 0)
                own = len(request.ids) - held + copy.encoder.missing(request, held)
                found[index] = own, sum(behind) + full.before
        return found

    def waits(self, index: int, tokens: int) -> None:
        """A request waits for that copy, with so many tokens of its own."""
        self._full[index].room -= 1
        self._full[index].before += tokens


def overtook(prompt: Request, request: Request) -> bool:
    """Whether a running `prompt` has come later than `request`, and has begun since that waits for a prefix."""
    return prompt.arrival > request.arrival and prompt.since > request.waited


def is_cut(request: Request) -> bool:
    """Whether a running request has computed a part of its prompt alone."""
    return request.row < 0 and request.computed < len(request.ids)


def shared_tokens(request: Request, prompt: Request, page_size: int) -> int:
    """How many tokens `request` can take from the cache once `prompt` is computed."""
    if request.salt != prompt.salt:
        return 0
    own, other, stride = request.reusable(page_size), prompt.key(0, len(prompt.ids)), TOKEN * page_size
    low, high = 0, min(len(own), len(other)) // stride
    while low < high:  # each half is compared once, so all that is compared is no longer than the keys
        middle = (low + high + 1) // 2
        if own[low * stride : middle * stride] == other[low * stride : middle * stride]:
            low = middle
        else:
            high = middle - 1
    return low * page_size
