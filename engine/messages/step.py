"""One step of the device: what is planned and what has come of it."""

from engine.messages.assets import Bound
from engine.messages.base import Message, Part
from engine.messages.request import Sampling


class SlotAdmit(Part, frozen=True):
    """A request takes device row `slot`: its tokens so far (int32), of which `prompt_len` are its prompt, and how to
    sample it. If its prompt's log-probabilities are asked for, those of its first `scored` + 1 tokens are known.
    `bound` are the things on the device that it uses."""

    slot: int
    ids: bytes
    sampling: Sampling
    prompt_len: int = 0
    scored: int = 0
    bound: tuple[Bound, ...] = ()


class StepPlan(Message, frozen=True):
    """scheduler → every rank: all that one step needs, in the order it is applied.

    `admits`, then `pages` (int32 [n, 3]: slot, index in the slot's page list, page), then `copies`
    (int32 [n, 2]: source page, destination page), then the forward pass over `rows` (int32 [n, 4]:
    slot, start position, length, and what comes of it: 0 nothing, 1 its last position is sampled, 2 its
    positions, all there are, become one vector).
    Steps run on the device in the order sent, so a page freed by step n may be written by step n+1.
    """

    step: int
    rows: bytes
    admits: tuple[SlotAdmit, ...] = ()
    pages: bytes = b""
    copies: bytes = b""


class Logprobs(Part, frozen=True):
    """Log-probabilities of n successive tokens of one row, in the model's own distribution: before temperature,
    penalties, biases and filters. `ranks` says how likely each was, 1 the likeliest; then the k likeliest."""

    row: int
    logprobs: bytes  # float32 [n]
    ranks: bytes  # int32 [n]
    top_ids: bytes = b""  # int32 [n, k]
    top_logprobs: bytes = b""  # float32 [n, k]


class StepDone(Message, frozen=True):
    """rank 0 → scheduler: `counts` (int32) tokens for each sampled row in plan order, `tokens` flat.

    A count may exceed one (speculation). `seconds` is the step's time on the device, `idle` the time that the device
    waited between this step and the one before, where this one was sent before that was over. `logprobs` has an entry
    for each sampled row that asks, its `row` counted among the sampled ones. `prompt_logprobs` has one for each of all
    the plan's rows that computes prompt positions p not scored yet: it holds those of the tokens at p + 1. `vectors`
    (float32 [n, size]) are those of the rows that ask for one, in plan order. `stuck` names sampled rows that cannot go
    on, each with a sentence for its client; their count is 0.
    """

    step: int
    counts: bytes
    tokens: bytes
    seconds: float
    logprobs: tuple[Logprobs, ...] = ()
    prompt_logprobs: tuple[Logprobs, ...] = ()
    idle: float = 0.0
    vectors: bytes = b""
    stuck: tuple[tuple[int, str], ...] = ()
