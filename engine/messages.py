"""Every struct that crosses a channel, and nothing else.

Structs are frozen, tagged and `array_like`, so a frame is a short msgpack array. Columns of numbers
travel as the bytes of little-endian int32 (`ids`) or float32 arrays: one copy, no per-number cost.

    http ──Generate/Abort──> tokenizer ──Open──> detokenizer ──Chunks──> http
                                │Admit/Abort        ^      │StopHit
                                v                   │Tokens v
                             scheduler ─────────────┘<──────┘
                                │ ^                 ──Stats/Flushed/Fatal──> http
                   StepPlan/Reset│ │StepDone, WorkerReady, WorkerLost, …
                                v │
                             executor <──frames──> worker
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from engine.config import Config


class Message(Struct, frozen=True, array_like=True, tag=True):
    """Base of what is sent on its own; the class name is the tag."""


class Part(Struct, frozen=True, array_like=True):
    """Base of what travels inside a message."""


# ── a request on its way in ──────────────────────────────────────────────────────────────────


class SamplingParams(Part, frozen=True, kw_only=True):
    """How one request is sampled and when it ends, as its client says it; bounds are in engine/sampling.py."""

    temperature: Annotated[float, Meta(description="0 is greedy, 1 the model's own distribution")] = 1.0
    top_p: Annotated[float, Meta(description="keep the likeliest tokens of this total probability; 1 is off")] = 1.0
    top_k: Annotated[int, Meta(description="keep this many of the likeliest tokens; 0 or -1 is off")] = 0
    min_p: Annotated[float, Meta(description="keep tokens at least this share as likely as the best; 0 is off")] = 0.0
    seed: Annotated[int | None, Meta(description="the same seed samples the same reply; default: a fresh one")] = None
    max_tokens: Annotated[int | None, Meta(description="longest reply; default: what the model's length leaves")] = None
    stop: Annotated[tuple[str, ...], Meta(description="a string that ends the reply and is not part of it")] = ()
    stop_token_ids: Annotated[tuple[int, ...], Meta(description="a token id that ends the reply")] = ()
    ignore_eos: Annotated[bool, Meta(description="run on past the model's own end tokens")] = False


class Generate(Message, frozen=True):
    """http → tokenizer: one request; exactly one of `text`, `ids` (int32) and `messages` is set.

    Where `sampling.max_tokens` is None, `default_max_tokens` bounds the reply if there is that much room.
    """

    rid: str
    sampling: SamplingParams
    text: str | None = None
    ids: bytes | None = None
    messages: list[dict[str, Any]] | None = None
    priority: int = 0
    default_max_tokens: int | None = None


class Open(Message, frozen=True):
    """tokenizer → detokenizer: tokens of `rid` will come; turn them into text until one of `stop`."""

    rid: str
    prompt_tokens: int
    stop: tuple[str, ...]


class Sampling(Part, frozen=True):
    """What the device needs to sample one row. `seed` is always set; `top_k` 0 is off."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int


class Admit(Message, frozen=True):
    """tokenizer → scheduler: a checked request. `ids` is int32; `max_new` at least 1."""

    rid: str
    ids: bytes
    sampling: Sampling
    stop_ids: tuple[int, ...]
    max_new: int
    priority: int = 0


class Abort(Message, frozen=True):
    """http → tokenizer → scheduler: end `rid` now, freeing its pages; unknown ids are ignored."""

    rid: str


class StopHit(Message, frozen=True):
    """detokenizer → scheduler: a stop string ended `rid` after `keep` tokens; nobody waits for more."""

    rid: str
    keep: int


# ── one step of the device ───────────────────────────────────────────────────────────────────


class SlotAdmit(Part, frozen=True):
    """A request takes device row `slot`: its tokens so far (int32) and how to sample it."""

    slot: int
    ids: bytes
    sampling: Sampling


class StepPlan(Message, frozen=True):
    """scheduler → every rank: all that one step needs, in the order it is applied.

    `admits`, then `pages` (int32 [n, 3]: slot, index in the slot's page list, page), then `copies`
    (int32 [n, 2]: source page, destination page), then the forward pass over `rows` (int32 [n, 4]:
    slot, start position, length, 1 if the row's last position is sampled else 0).
    Steps run on the device in the order sent, so a page freed by step n may be written by step n+1.
    """

    step: int
    rows: bytes
    admits: tuple[SlotAdmit, ...] = ()
    pages: bytes = b""
    copies: bytes = b""


class StepDone(Message, frozen=True):
    """rank 0 → scheduler: `counts` (int32) tokens for each sampled row in plan order, `tokens` flat.

    A count may exceed one (speculation). `seconds` is the step's time on the device.
    """

    step: int
    counts: bytes
    tokens: bytes
    seconds: float


class Finish(Part, frozen=True):
    """Row `row` of a `Tokens` has ended; `matched` is the stop token id, where one ended it."""

    row: int
    reason: Literal["stop", "length", "abort"]
    matched: int | None = None


class Tokens(Message, frozen=True):
    """scheduler → detokenizer: the new tokens of a step; row i is `rids[i]` with `counts[i]` tokens.

    `cached` names, for rows whose first token this is, how many prompt tokens the cache held.
    """

    step: int
    rids: list[str]
    counts: bytes
    tokens: bytes
    finishes: tuple[Finish, ...] = ()
    cached: tuple[tuple[int, int], ...] = ()


# ── a reply on its way out ───────────────────────────────────────────────────────────────────


class Chunk(Part, frozen=True):
    """New text and token ids of `rid`; the last chunk has a `finish` reason.

    `matched` is the stop string or stop token id that ended the reply. Token counts are of the
    request so far. `ids` includes the stop token, `text` never includes what stopped it.
    """

    rid: str
    text: str
    ids: list[int]
    finish: Literal["stop", "length", "abort"] | None = None
    matched: int | str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Chunks(Message, frozen=True):
    """detokenizer → http: what one step has to say to its clients."""

    chunks: list[Chunk]


class Failed(Message, frozen=True):
    """anyone → detokenizer → http: `rid` ends with an error of its own (fields as in RequestError)."""

    rid: str
    status: int
    code: str
    message: str
    param: str | None = None


# ── the worker's life, control and observation ───────────────────────────────────────────────


class WorkerReady(Message, frozen=True):
    """worker → scheduler: what the device can hold, and how the start went.

    `pages` of `page_size` tokens; `phases` maps a start-up phase to its seconds.
    """

    pages: int
    page_size: int
    slots: int
    max_model_len: int
    vocab_size: int
    kv_bytes_per_token: int
    device: str
    attention: str
    phases: dict[str, float]


class WorkerLost(Message, frozen=True):
    """executor → scheduler: the device process is gone; `cause` says why, for people.

    The executor waits for a Reset before it starts another, so no plan of the old life reaches the new one.
    """

    cause: str


class WorkerSilent(Message, frozen=True):
    """executor → scheduler: no word from the device process for `seconds`; 0 means it answers again."""

    seconds: float


class Reset(Message, frozen=True):
    """scheduler → executor: every plan before this one was for a worker that is gone."""


class Flush(Message, frozen=True):
    """http → scheduler: forget every cached prefix that no running request uses."""


class Flushed(Message, frozen=True):
    """scheduler → http: the answer to a Flush: pages freed, and pages still in use."""

    freed: int
    in_use: int


class Boot(Message, frozen=True):
    """executor → worker: the first frame; the worker loads the model named in `config`."""

    config: Config
    rank: int = 0
    world: int = 1


class Ping(Message, frozen=True):
    """executor → worker, when idle: are you there?"""


class Pong(Message, frozen=True):
    """worker → executor: yes."""


class Fatal(Message, frozen=True):
    """`actor` cannot go on; `cause` is a traceback or a sentence, for the log and for health."""

    actor: str
    cause: str


class Stats(Message, frozen=True):
    """scheduler → http: the heartbeat of the core, every second and when work ends.

    Counters (`*_total`, `steps`) only grow. `step_seconds` holds float32 device times of the steps since
    the last Stats. `worker` is the state of the device process.
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


ToTokenizer = Generate | Abort | WorkerReady
ToWorker = Boot | StepPlan | Ping
FromWorker = WorkerReady | StepDone | Pong | Fatal
FromFront = Admit | Abort | StopHit | Flush
FromExecutor = StepDone | WorkerReady | WorkerLost | WorkerSilent | Fatal
ToScheduler = FromFront | FromExecutor
ToExecutor = StepPlan | Reset
ToDetokenizer = Open | Tokens | Failed
ToFront = Tokens | Failed | Stats | Flushed | WorkerReady | Fatal
ToHttp = Chunks | Failed | Stats | Flushed | WorkerReady | Fatal
