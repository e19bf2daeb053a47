"""Questions to the worker, and what it answers: known to whoever asks over HTTP and to `worker/questions.py` alone.

A question travels packed inside an `Ask`, and its value inside an `Answer`. So the front, the scheduler, the executor
and the fake device pass on every question without knowing it:

    class CountPages(Question[int], frozen=True):   # 1. here: what is asked, and the type of the value
        tree: bool = False

    CountPages: self._count_pages                   # 2. in worker/questions.py: a line of the table, and its method
    pages = await front.ask(CountPages(tree=True))  # 3. in the route that asks: an int, or a RequestError
"""

from typing import Any, Generic, Literal, TypeVar, get_args

import msgspec
from msgspec import Struct

Value = TypeVar("Value")
CountAction = Literal["start", "stop", "look"]


class Question(Struct, Generic[Value], frozen=True, array_like=True, tag=True):
    """Base of every question to the worker. `Value` is the type of its answer."""

    def packed(self) -> bytes:
        """The question as `Ask.question` carries it."""
        return msgspec.msgpack.encode(self)

    def read(self, value: bytes) -> Value:
        """The answer in `Answer.value`."""
        (kind,) = get_args(type(self).__orig_bases__[0])  # type: ignore[attr-defined]
        found: Value = msgspec.msgpack.decode(value, type=kind)
        return found


class Profile(Question[str], frozen=True):
    """Trace the steps launched from now on, or end that. The value is the path of the trace.

    With a `folder` a trace begins, which goes into a new file there after `steps` steps; without, it ends now.
    """

    folder: str = ""
    steps: int = 0


class ExpertCounts(Struct, frozen=True, array_like=True):
    """`counts` (int64 [layers, experts]) are of those layers that have experts, whose numbers `layers` are."""

    counting: bool
    layers: tuple[int, ...]
    counts: bytes


class CountExperts(Question[ExpertCounts], frozen=True):
    """Count how often each expert is chosen, from zero on; end that; or only look."""

    action: CountAction


class ExpertWindow(Struct, frozen=True, array_like=True):
    """Some successive steps, the last of which was number `step`: how many `choices` they made; the largest load of a
    rank over the mean one, in the mean over layers (`balance`); and how far choices have moved from those of the window
    before (`drift`): the share of them that would have to go to another expert to be as those were, from 0 to 1."""

    step: int
    choices: int
    balance: float
    drift: float


class ExpertMap(Struct, frozen=True, array_like=True):
    """Where the experts of `layers` lie on `ranks` groups of devices, and how busy they are. `placement` (int32
    [layers, ranks, slots]) is the expert in each slot, `counts` (int64 [layers, experts]) choices since the start, and
    `loads` (float64 [layers, ranks]) how many of those a group would compute as experts lie now. `windows` are the
    last ones, oldest first. `moved` layers have been rearranged so far, and `waiting` ones still will be."""

    layers: tuple[int, ...]
    ranks: int
    placement: bytes
    counts: bytes
    loads: bytes
    windows: tuple[ExpertWindow, ...] = ()
    moved: int = 0
    waiting: int = 0


class LookAtExperts(Question[ExpertMap], frozen=True):
    """Where experts lie and how busy they are: by now, which waits for the steps under way; or as the last window
    found it."""

    now: bool = True


class RebalanceExperts(Question[int], frozen=True):
    """Arrange experts for what was chosen since this was last asked, or since the start. The value is how many layers
    are looked at, with the steps that come."""


class Echo(Question[Any], frozen=True):
    """Give `value` back: for tests of the way to the worker."""

    value: Any = None
