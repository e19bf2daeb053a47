"""The embeddings of media on the device: which are there, and how many a step makes. Pure.

    step 1   make A, B                    held  A B
    step 2   use B, make C, forget A      held  B C        the least recently used one goes where room is needed

A medium here is a picture or a slice of a clip: what is encoded as a whole. A chunk of a prompt needs the embeddings of
the media that it shows. Those that are not held are made in the same step, before its tokens are computed, up to a
budget of embeddings a step; the chunk ends before the first medium that is too much. So a long clip is made over
several steps, and need not be held as a whole. A chunk also ends before a medium that it could only show a part of, if
its tokens see each other. None has more than the budget, so the first chunk of a step always gets what it needs. A
prompt whose media are in cached pages needs none of them. Every device holds the same, because it is told (StepPlan).

Whether a medium could be made is known with the result of its step. Until then it is remembered which texts show it:
what they hold from there on is wrong if it could not. Left out: to make more of a clip than the next chunk shows.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.errors import RequestError, counted
from engine.sched.columns import StepColumns
from engine.sched.request import Request, Shown


@dataclass(slots=True)
class Making:
    """A medium that so many `steps` in flight make, and the texts that show it meanwhile: whose they are, and how far
    they go, with its first token."""

    steps: int = 0
    texts: set[tuple[Request, int]] = field(default_factory=set)


class Encoder:
    """Makes up to `budget` embeddings a step, and holds up to `room` of them. A model that sees nothing has neither."""

    def __init__(self, budget: int = 0, room: int = 0) -> None:
        assert budget <= room, f"a step makes {budget} embeddings, and {room} are held"
        self.budget, self.room = budget, room
        self._held: OrderedDict[int, int] = OrderedDict()  # embeddings by a medium's number, the last used at the end
        self._making: dict[int, Making] = {}  # by a medium's number
        self._tokens = 0
        self.counts = {"slices_shown_total": 0, "slices_made_total": 0}  # as messages.Stats has them

    def check(self, request: Request, max_step_tokens: int) -> None:
        """Raises RequestError (400) for a medium that no step could make, or whose tokens no step could compute, and
        for any where the model sees nothing."""
        if request.shown and not self.budget:
            raise RequestError(
                "the model that is loaded reads text alone: its plugin does not say that it sees; send text",
                param="messages",
                code="unsupported_parameter",
            )
        for shown in request.shown:
            if shown.tokens > self.budget:
                raise RequestError(
                    f"an image, or a frame of a video, takes {counted(shown.tokens, 'token')}, and at most "
                    f"{self.budget} are made in a step; send it smaller, or start with a larger --encoder-tokens",
                    param="messages",
                    code="media_too_large",
                )
            if shown.whole and shown.count > max_step_tokens:
                raise RequestError(
                    f"an image takes {counted(shown.count, 'token')} that see each other, and a step computes at most "
                    f"{max_step_tokens}; start with a larger --max-step-tokens",
                    param="messages",
                    code="media_too_large",
                )

    def reach(self, step: StepColumns, request: Request, start: int, end: int, most: int) -> int:
        """How far a chunk of `request` goes that would be the positions `start` .. `end` - 1 and may go to `most`, so
        that no `whole` medium is cut; `step` makes what it needs. It is `start` where it has to wait for another
        step."""
        first = bisect_right(request.shown, start, key=lambda shown: shown.begin + shown.count)
        for shown in request.shown[first:]:
            if shown.begin >= end:
                break
            past = shown.begin + shown.count
            if shown.whole and end < past <= most:
                end, step.budget = past, max(step.budget, past - start)
            if (shown.whole and end < past) or not self._take(step, shown, request.slot):
                end = max(start, shown.begin)
                break
            self.counts["slices_shown_total"] += shown.begin >= start
            if (making := self._making.get(shown.number)) is not None:
                making.texts.add((request, shown.begin + 1))
        return end

    def missing(self, request: Request, start: int) -> int:
        """How many embeddings would have to be made for the prompt of `request` from position `start` on."""
        tokens = {
            shown.number: shown.tokens
            for shown in request.shown
            if shown.begin + shown.count > start and shown.number not in self._held
        }
        return sum(tokens.values())

    def _take(self, step: StepColumns, shown: Shown, slot: int) -> bool:
        """Have the embeddings of a medium in `step`, which the request in `slot` shows. False if they are too many."""
        number, tokens = shown.number, shown.tokens
        if step.media is None:
            step.media = set()
        if number in step.media:
            return True
        if step.shown + tokens > self.room:
            return False
        if number in self._held:
            self._held.move_to_end(number)
        else:
            if step.made + tokens > self.budget:
                return False
            while self._tokens + tokens > self.room:
                old = next(iter(self._held))  # none of this step's: those were used last, and there is room for them
                self.forget(old)
                step.forgets += ((slot, old),)
            self._held[number] = tokens
            self._tokens += tokens
            step.encodes += ((slot, number),)
            step.made += tokens
            self.counts["slices_made_total"] += 1
            self._making.setdefault(number, Making()).steps += 1
        step.media.add(number)
        step.shown += tokens
        return True

    def made(self, numbers: Iterable[int]) -> None:
        """A step that made these is over."""
        for number in numbers:
            self._making[number].steps -= 1
            if not self._making[number].steps:
                del self._making[number]

    def makes(self, request: Request) -> bool:
        """Whether steps in flight make what `request` shows, also under another number."""
        if not (self._making and request.shown):
            return False
        return any(number in request.numbers or _begins(request, each.texts) for number, each in self._making.items())

    def users(self, number: int, running: Iterable[Request]) -> list[str]:
        """Who of these shows that medium; also under another number, in pages that a step in flight makes."""
        texts = self._making.get(number, Making()).texts
        return [each.rid for each in running if number in each.numbers or _begins(each, texts)]

    def texts(self, number: int) -> set[tuple[bytes, bytes]]:
        """Those that show a medium which a step in flight makes: their salts, and their keys up to its first."""
        texts = self._making.get(number, Making()).texts
        return {(request.salt, request.key(0, length)) for request, length in texts}

    def forget(self, number: int) -> None:
        """The device does not hold that medium; or will not from the step at hand on."""
        self._tokens -= self._held.pop(number, 0)

    def clear(self) -> None:
        """The device is another one, which holds nothing."""
        self._held.clear()
        self._making.clear()
        self._tokens = 0


def _begins(request: Request, texts: Iterable[tuple[Request, int]]) -> bool:
    """Whether `request` begins with one of these texts, each of a request up to a length."""
    return any(
        request.salt == other.salt
        and request.key(length - 1, length) == other.key(length - 1, length)  # a value of the medium's own
        and request.key(0, length) == other.key(0, length)
        for other, length in texts
    )
