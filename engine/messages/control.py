"""The worker's life, questions to it, and the heartbeat of the core."""

from typing import Literal

from engine.config import Config
from engine.messages.base import Message


class WorkerReady(Message, frozen=True):
    """worker → scheduler: what the device can hold, and how the start went; of several ranks, what all of them can.

    `pages` of `page_size` tokens; a step takes `max_step_tokens`; `phases` maps a start-up phase to its seconds.
    A model that makes vectors of `embedding_size` generates no text; of others it is 0. `modules` are those that this
    start imported, for a spare worker: the executor keeps them to itself.
    """

    pages: int
    page_size: int
    slots: int
    max_step_tokens: int
    max_model_len: int
    vocab_size: int
    kv_bytes_per_token: int
    device: str
    attention: str
    phases: dict[str, float]
    embedding_size: int = 0
    modules: tuple[str, ...] = ()


class WorkerLost(Message, frozen=True):
    """executor → scheduler: the device process is gone; `cause` says why, for people.

    The executor waits for a Reset before it starts another, so no plan of the old life reaches the new one.
    """

    cause: str


class WorkerSilent(Message, frozen=True):
    """executor → scheduler: no word from the device process for `seconds`, or of several from those that `cause`
    names, for people; 0 means that all answer again."""

    seconds: float
    cause: str = ""


class Reset(Message, frozen=True):
    """scheduler → executor: every plan before this one was for a worker that is gone."""


class Flush(Message, frozen=True):
    """http → scheduler: forget every cached prefix that no running request uses. The answer has the same `number`."""

    number: int


class Flushed(Message, frozen=True):
    """scheduler → http: the answer to a Flush: pages freed, and pages still in use."""

    number: int
    freed: int
    in_use: int


class Pause(Message, frozen=True):
    """http → scheduler: plan no new steps, or go on; requests stay open and new ones wait. Numbered as a Flush.

    `retract` sends those that run back to the queue, so that they hold no page while it is paused."""

    number: int
    paused: bool
    retract: bool = False


class Paused(Message, frozen=True):
    """scheduler → http: the answer to a Pause; if `paused`, nothing runs on the device any more."""

    number: int
    paused: bool


class Profile(Message, frozen=True):
    """http → scheduler → executor → worker: trace the steps launched from now on, or end that. Numbered as a Flush.

    With a `folder` a trace begins, which goes into a new file there after `steps` steps; without, it ends now.
    """

    number: int
    folder: str = ""
    steps: int = 0


class Profiled(Message, frozen=True):
    """worker → executor → scheduler → http: the answer to a Profile: where the trace is, or is to be.

    Or its `cause` says why there is none."""

    number: int
    path: str = ""
    cause: str = ""


CountAction = Literal["start", "stop", "look"]


class CountExperts(Message, frozen=True):
    """http → scheduler → executor → worker: count how often each expert is chosen, from nothing on; end that; or only
    look. Numbered as a Flush."""

    number: int
    action: CountAction


class ExpertCounts(Message, frozen=True):
    """worker → executor → scheduler → http: the answer to a CountExperts; or its `cause` says why there is none.

    `counts` (int64 [layers, experts]) are of those layers that have experts, whose numbers `layers` are.
    """

    number: int
    counting: bool = False
    layers: tuple[int, ...] = ()
    counts: bytes = b""
    cause: str = ""


class Boot(Message, frozen=True):
    """executor → worker: the first frame; the worker loads the model named in `config`.

    It is one of `world` ranks, which meet at `rendezvous` (an address of torch.distributed)."""

    config: Config
    rank: int = 0
    world: int = 1
    rendezvous: str = ""


class Proposed(Message, frozen=True):
    """worker → executor, where there are several: how many pages this rank has the memory for, its weights in place."""

    pages: int


class Agreed(Message, frozen=True):
    """executor → worker, once all ranks have proposed: how many pages each is to allocate, which is the fewest."""

    pages: int


class Preload(Message, frozen=True):
    """executor → worker, before its Boot: import what a worker imports, then `modules` in their order, and answer with
    a Pong. A `spare` does so at a low priority, as nobody waits for it yet."""

    config: Config
    modules: tuple[str, ...] = ()
    spare: bool = True


class Ping(Message, frozen=True):
    """executor → worker, when idle: are you there?"""


class Pong(Message, frozen=True):
    """worker → executor: yes."""


class Fatal(Message, frozen=True):
    """`actor` cannot go on; `cause` is a sentence that clients may read, `details` a traceback for the log."""

    actor: str
    cause: str
    details: str = ""


class Stats(Message, frozen=True):
    """scheduler → http: the heartbeat of the core, every second and when work ends.

    Counters (`*_total`, `steps`) only grow. `step_seconds` holds float32 device times of the steps since the last
    Stats; `idle_seconds_total` sums what the device waited for the host between them; `compile_seconds` (float32) are
    those of the grammars compiled since then. `worker` is the state of the device process; `paused` is as the last
    Pause said. `restarts_total` counts workers that took the place of one that died, the last of them after
    `restart_seconds`.
    """

    worker: Literal["starting", "ready", "restarting", "stalled", "failed"]
    cause: str = ""
    running: int = 0
    waiting: int = 0
    pages: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generated_tokens_total: int = 0
    retractions_total: int = 0
    steps: int = 0
    step_seconds: bytes = b""
    paused: bool = False
    idle_seconds_total: float = 0.0
    compile_seconds: bytes = b""
    restarts_total: int = 0
    restart_seconds: float = 0.0
