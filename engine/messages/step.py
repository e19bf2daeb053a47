"""One step of the device: what is planned and what has come of it.

A step is relative to the device: a row of drafts begins where its slot stands when the step runs, which the scheduler
need not know yet. Left out: how tensors of one step pass between ranks (engine/parallel).
"""

from engine.messages.assets import Bound
from engine.messages.base import Message, Part
from engine.params.sampling import Sampling

STEPS_IN_FLIGHT = 3
"""The most steps that a rank has launched and its device not yet run. Every buffer that steps take turns in has as many
places. Without a pipeline they are the steps that are planned and not yet committed."""


def steps_in_flight(stages: int = 1) -> int:
    """The most steps that are planned and not yet committed: one more for each stage of a pipeline."""
    return STEPS_IN_FLIGHT + stages - 1


NOTHING, TOKEN, DRAFTS, VECTOR = range(4)
"""What a row yields, as said at StepPlan."""


class SlotAdmit(Part, frozen=True):
    """A request takes device row `slot`: its tokens so far (int32), of which `prompt_len` are its prompt, and how to
    sample it. If its prompt's log-probabilities are asked for, those of its first `scored` + 1 tokens are known.
    `bound` are the things on the device that it uses. It ends at `limit` tokens, which only rows that yield drafts look
    at. `positions` (int32 [3, prompt_len]) are where rotary embedding places the prompt, where that is not its index;
    what comes after goes on behind the largest. Its state, if the model has any, begins as the `state` pages (int32)
    have it, and as zeros where there are none."""

    slot: int
    ids: bytes
    sampling: Sampling
    prompt_len: int = 0
    scored: int = 0
    bound: tuple[Bound, ...] = ()
    limit: int = 0
    positions: bytes = b""
    state: bytes = b""


class KeptState(Part, frozen=True):
    """The state of `slot` is copied to these `pages` (int32): as many as the rank that needs most of them takes."""

    slot: int
    pages: bytes


class StepPlan(Message, frozen=True):
    """scheduler → every rank: all that one step needs, in the order it is applied.

    `keeps`, so of states as the steps before have left them, then `admits`, which may begin with these, then `pages`
    (int32 [n, 3]: slot, index in the slot's page list, page), then the forward pass over R rows,
    whose columns are int32 [R]. Row r computes `lengths[r]` positions of slot `slots[r]` from `starts[r]` on, and
    `yields[r]` says what comes of them:

        NOTHING  they are a part of a prompt
        TOKEN    they are the last tokens of the slot; one token is drawn after them
        DRAFTS   they are the last token and the drafts after it; those that are drawn again, and the token drawn after
                 them, are yielded: at most `lengths[r]`, at least one, and none only if the slot holds `limit` tokens
        VECTOR   they are all tokens of the slot, and become one vector

    A row of DRAFTS is relative to the device. Its start is what the scheduler is sure of, the least that it may be; the
    device reads the real one from `lengths[slot]`, the tokens that the slot holds by then. The slot has pages for the
    most that the row may reach. Every other start is exact: a row of a TOKEN follows none of DRAFTS that is in flight.
    So whatever plans on the host from exact starts (FlashInfer, captured steps, log-probabilities of prompts) serves
    all rows but those of DRAFTS. Prefixes that rows share may be looked for with the least start.

    Where attention runs in copies, rows are in the order of these, and each copy has as many slots: they are numbered
    over all copies, and pages within each.

    `forgets` names media whose embeddings the device drops, `encodes` those that it makes then, before the forward
    pass: int32 [n, 2], the slot that shows a medium, or needs the room, and the medium's number. So of copies of
    attention each has its own.

    `lane` names the pipeline's micro-batch. Steps run on the device in the order sent, so a page freed by step n may be
    written by step n+1.
    """

    step: int
    slots: bytes = b""
    starts: bytes = b""
    lengths: bytes = b""
    yields: bytes = b""
    admits: tuple[SlotAdmit, ...] = ()
    pages: bytes = b""
    lane: int = 0
    encodes: bytes = b""
    forgets: bytes = b""
    keeps: tuple[KeptState, ...] = ()


class Logprobs(Part, frozen=True):
    """Log-probabilities of n successive tokens of one row, in the model's own distribution: before temperature,
    penalties, biases and filters. `ranks` says how likely each was, 1 the likeliest; then the k likeliest."""

    row: int
    logprobs: bytes  # float32 [n]
    ranks: bytes  # int32 [n]
    top_ids: bytes = b""  # int32 [n, k]
    top_logprobs: bytes = b""  # float32 [n, k]


class StepDone(Message, frozen=True):
    """worker → scheduler: `counts` (int32) tokens for each row of a TOKEN or DRAFTS in plan order, `tokens` flat.

    One rank says so, or of each copy of attention one, of its own rows.

    `seconds` is the step's time on the device, `idle` the time that the device waited between this step and the one
    before, where this one was sent before that was over. `logprobs` has an entry for each of those rows that asks, its
    `row` counted among them. `prompt_logprobs` has one for each of all the plan's rows that computes prompt positions p
    not scored yet: it holds those of the tokens at p + 1. `vectors` (float32 [n, size]) are those of the rows that ask
    for one, in plan order. `stuck` names rows that cannot go on, counted as in `logprobs`, each with a sentence for its
    client; their count is 0. `failed` are the copy of attention (0 where there is one), the number of a medium that it
    could not encode, and the reason: what the step has computed of it is wrong.
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
    failed: tuple[tuple[int, int, str], ...] = ()
