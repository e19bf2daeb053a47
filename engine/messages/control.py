"""The worker's life, questions and their answers, and the heartbeat of the core."""

from typing import Literal

from engine.config import Config
from engine.messages.base import Message, Part


class WorkerReady(Message, frozen=True):
    """worker → scheduler: what the device can hold, and how the start went; of several ranks, what all of them can.

    `pages` of `page_size` tokens; a step takes `slots` rows and `max_step_tokens`. Where attention runs in `copies`,
    each has so many pages and tokens, and an equal share of the slots. `phases` maps a start-up phase to its seconds.
    A model that makes vectors of `embedding_size` generates no text; of others it is 0. `modules` are those that this
    start imported, for a spare worker: the executor keeps them to itself. A `recurrent` model keeps states of requests:
    no drafts serve it, and a cached prefix does where a copy of its state is in `state_pages` of the cache. Where that
    is 0 there are no pages for it, and so no cached prefixes. `attention_work` is what each token of context adds
    to the work that a token of a prompt takes, as a part of what that is without context. A `mixture` has experts, of
    which questions tell; `exchange` says how tokens reach those of other ranks, for people; "" if there are none. Below
    the device are `host_pages`, and if it `stores`, what keeps pages by their names. A model that sees makes
    `encoder_tokens` embeddings of media a step at most, and holds as many as `embeddings`; of others both are 0.
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
    recurrent: bool = False
    state_pages: int = 0
    attention_work: float = 0.0
    copies: int = 1
    mixture: bool = False
    exchange: str = ""
    host_pages: int = 0
    stores: bool = False
    encoder_tokens: int = 0
    embeddings: int = 0


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


class Ask(Message, frozen=True):
    """http → scheduler → executor → worker: a `question` of messages/questions.py, packed.

    The one Answer to it has the same `number`, also where the worker dies first."""

    number: int
    question: bytes


class Answer(Message, frozen=True):
    """worker → executor → scheduler → http: what was asked with this `number`; the scheduler answers for itself, too.

    `value` is packed, and of the type that the question says. Or `cause` says why there is none."""

    number: int
    value: bytes = b""
    cause: str = ""


class Flush(Message, frozen=True):
    """http → scheduler: forget every cached prefix that no running request uses. The Answer's value is a Flushed."""

    number: int


class Flushed(Part, frozen=True):
    """What a Flush did: pages freed, and pages still in use. Where a store below the device has not forgotten what it
    had, `uncleared` says why."""

    freed: int
    in_use: int
    uncleared: str = ""


class Pause(Message, frozen=True):
    """http → scheduler: plan no new steps, or go on; requests stay open and new ones wait.

    The Answer has no value; if `paused`, nothing runs on the device by then. `retract` sends requests that run back to
    the queue, so that they hold no page while it is paused."""

    number: int
    paused: bool
    retract: bool = False


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


class Beat(Message, frozen=True):
    """worker → executor, each second, where there are several: the last step begun, and the collective it is in, the
    `number`-th of its life, for `seconds`; none is "". Its device is at step `on_device` for `device_seconds`, or at
    none, which is -1."""

    step: int
    collective: str
    number: int
    seconds: float
    on_device: int = -1
    device_seconds: float = 0.0


class Fatal(Message, frozen=True):
    """`actor` cannot go on; `cause` is a sentence that clients may read, `details` a traceback for the log."""

    actor: str
    cause: str
    details: str = ""


class Retired(Message, frozen=True):
    """process → its pool: its next answer has grown it so that another process shall take its place."""


class CopyStats(Part, frozen=True):
    """Figures of one copy of attention, as in Stats; `tokens_total` are those that its steps have computed."""

    running: int
    pages: int
    pages_free: int
    pages_cached: int
    tokens_total: int


class TierStats(Part, frozen=True):
    """Figures of the tiers below the device, of all copies of attention together; pages are numbers of pages.

    Pages that went `down` to the host, were `kept` in a store, `fetched` from it, and came up to the device, of which
    some were `from_host` and others `from_store`; others that prompts began with were there (`from_device`). `refused`
    found no room below, and `failed` were computed again. A store had others that were `computed`, because that was
    sooner. To fetch and to bring up took `seconds_up`. Of the `asked_total` pages of prompts that came, a cache without
    end would have had the share `ceiling`. All that the tiers gave would have taken about `seconds_saved` to compute.
    `stores` is what the stores count, by their names for it; of pages that came down, they lack `to_keep`. One that is
    `uncleared` has not forgotten yet what a flush was to clear, and gives nothing until then."""

    host_pages: int
    host_used: int
    store_pages: int = 0
    store_bytes: int = 0
    down: int = 0
    kept: int = 0
    fetched: int = 0
    from_host: int = 0
    from_store: int = 0
    refused: int = 0
    failed: int = 0
    seconds_up: float = 0.0
    asked_total: int = 0
    ceiling: float = 0.0
    seconds_saved: float = 0.0
    stores: dict[str, int] = {}  # noqa: RUF012 - msgspec copies it
    uncleared: bool = False
    computed: int = 0
    from_device: int = 0
    to_keep: int = 0


class Stats(Message, frozen=True):
    """scheduler → http: the heartbeat of the core, every second and when work ends.

    Counters (`*_total`, `steps`) only grow. `step_seconds` holds float32 device times of the steps since the last
    Stats; `idle_seconds_total` sums what the device waited for the host between them; `make_seconds` (float32, by kind)
    are those of the needs that makers have answered since then. `worker` is the state of the device process; `paused`
    is as the last Pause said. `restarts_total` counts workers that took the place of one that died, the last of them
    after `restart_seconds`. There are `tiers` where an option asks for them. Where attention runs in `copies`,
    `most_tokens_total` adds up, over all steps, the tokens of the copy that had the most. `sessions` live and have
    `session_pages`; of sessions and programs so many lost their pages before their time (`pins_released_total`).
    Prompts showed slices of media (`slices_shown_total`, each time that they were computed), for which so many were
    encoded (`slices_made_total`).
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
    make_seconds: dict[str, bytes] = {}  # noqa: RUF012 - msgspec copies it
    restarts_total: int = 0
    restart_seconds: float = 0.0
    copies: tuple[CopyStats, ...] = ()
    most_tokens_total: int = 0
    sessions: int = 0
    session_pages: int = 0
    pins_released_total: int = 0
    slices_shown_total: int = 0
    slices_made_total: int = 0
    tiers: TierStats | None = None
