"""What passes from one stage of a step to the next, and what is left of it at its end."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.layers.batch import Batch
from engine.messages.step import Logprobs
from engine.worker.sampling.grammars import Guided
from engine.worker.sampling.logprobs import Scores
from engine.worker.steps.copies import Among
from engine.worker.steps.drafts import Draws, Held
from engine.worker.steps.graphs import DecodeGraphs
from engine.worker.steps.recorded import RecordedSteps


@dataclass(frozen=True, slots=True)
class Block:
    """Log-probabilities computed together. A span is a row, where its tokens begin in them and end, and how many
    likeliest ones it asks for."""

    scores: Scores
    spans: list[tuple[int, int, int, int]]

    def messages(self) -> tuple[Logprobs, ...]:
        return tuple(self.scores.message(*span) for span in self.spans)

    def cut(self, skipped: np.ndarray, counts: np.ndarray) -> "Block":
        """Those of `counts` tokens of each row after the first `skipped`."""
        begins = [(row, begin + skipped[row], wide) for row, begin, _, wide in self.spans if counts[row]]
        return Block(self.scores, [(row, begin, begin + counts[row], wide) for row, begin, wide in begins])


@dataclass(frozen=True, slots=True)
class Forward:
    """What the model left of a step: hidden states [T, H], or [R, H] of `steps` that were captured or recorded."""

    hidden: Tensor
    offsets: np.ndarray  # [R + 1]: where each row's begin
    batch: Batch | None = None  # of a step that runs as it is
    steps: DecodeGraphs | RecordedSteps | None = None
    on_device: Tensor | None = None  # [2, R] int64: slots and positions of those steps


@dataclass(frozen=True, slots=True)
class Head:
    """What tokens are drawn from. `logits` [D, V] are None where the draw is part of the captured step."""

    draws: Draws
    on_device: Sequence[Tensor] | Tensor  # [2, D] int64: the slot of each draw, and the position it is drawn after
    logits: Tensor | None
    steps: DecodeGraphs | RecordedSteps | None = None
    guided: Guided | None = None
    known: Tensor | None = None  # [D] int64: tokens of each draw's slot before it; where rows have drafts
    drafted: Tensor | None = None  # [D] int64: what stands where the draws will
    own: bool = False  # the logits are those of this rank's tokens alone


@dataclass(frozen=True, slots=True)
class Result:
    """What a step yields: `tokens` [D] int64 as drawn, of which `held` says what holds of rows of drafts; and
    log-probabilities of rows and of prompts that ask; or float32 `vectors` [R, size]. `guided` are the rows that follow
    a grammar."""

    tokens: Tensor
    draws: Draws | None = None
    held: Held | None = None
    sampled: Block | None = None
    prompts: Block | None = None
    vectors: Tensor | None = None
    guided: Guided | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Result":
        """The same, each tensor put elsewhere by `move`."""
        sampled, prompts = (
            block and dataclasses.replace(block, scores=block.scores.moved(move))
            for block in (self.sampled, self.prompts)
        )
        kept = self.held and Held(move(self.held.skipped), move(self.held.counts))
        vectors = None if self.vectors is None else move(self.vectors)
        return Result(move(self.tokens), self.draws, kept, sampled, prompts, vectors, self.guided)


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way. The `result` on the host holds once `ready`."""

    step: int
    result: Result
    seconds: float = 0.0  # on a CPU
    began: torch.cuda.Event | None = None  # on a GPU
    ended: torch.cuda.Event | None = None
    previous: torch.cuda.Event | None = None  # the end of the step before, if this one was launched ahead of it
    among: Among | None = None  # what other copies of attention have of it

    def ready(self) -> bool:
        return self.ended is None or self.ended.query()


def to_pinned(tensor: Tensor) -> Tensor:
    """A copy on the host, which is there once the stream has come so far."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class _Mapped:
    """Bytes of pinned memory as the device sees them: at the same address."""

    def __init__(self, host: Tensor) -> None:
        self.host = host  # which lives as long as this is used
        self.__cuda_array_interface__ = {
            "shape": (host.nbytes,),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "version": 3,
        }


def written_to_pinned(tensor: Tensor) -> Tensor:
    """As `to_pinned`, but a kernel writes it. A copy waits for all that other streams copy to the host, and so does the
    next step behind it: beside a GiB of KV pages for up to 15 ms on an H200, where the step itself takes 6.

    Whoever drops the result before the stream has come so far lets others have its memory too early."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    if not tensor.numel():
        return host
    there = torch.as_tensor(_Mapped(host), device=tensor.device)
    if there.data_ptr() != host.data_ptr():  # it was pinned for another device
        return host.copy_(tensor, non_blocking=True)
    source = tensor.contiguous().flatten().view(torch.uint8)
    torch.maximum(source, source, out=there)
    return host
