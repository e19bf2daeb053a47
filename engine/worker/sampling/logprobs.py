"""Log-probabilities of tokens, in the model's own distribution: of logits that nothing has been added to.

Computed on the device in the step that made the logits, for the rows that ask. How many likeliest tokens are found
does not depend on what other rows ask for, so equals come in the same order whatever runs beside a row. On a GPU one
pass over the logits finds all (engine/kernels/logits/scores.py). A prompt's logits are made piece by piece: its length
times the vocabulary is more than memory should have to hold.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.logits.reference import LogitOps
from engine.messages.step import Logprobs
from engine.params.sampling import MAX_LOGPROBS

PIECE = 1 << 24  # logits of a prompt that are in memory at a time: 64 MiB of float32


@dataclass(frozen=True, slots=True)
class Scores:
    """Of N tokens: their log-probabilities, their ranks and the K likeliest ids in their places."""

    logprobs: Tensor  # [N] float32
    ranks: Tensor  # [N] int32
    top_ids: Tensor  # [N, K] int32
    top_logprobs: Tensor  # [N, K] float32

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Scores":
        """The same, each tensor put elsewhere by `move`."""
        return Scores(move(self.logprobs), move(self.ranks), move(self.top_ids), move(self.top_logprobs))

    def message(self, row: int, first: int, end: int, wide: int) -> Logprobs:
        """What is on the host, of the tokens `first` .. `end` - 1, with `wide` likeliest ones."""
        return Logprobs(
            row,
            self.logprobs[first:end].numpy().astype("<f4").tobytes(),
            self.ranks[first:end].numpy().astype("<i4").tobytes(),
            self.top_ids[first:end, :wide].numpy().astype("<i4").tobytes(),
            self.top_logprobs[first:end, :wide].numpy().astype("<f4").tobytes(),
        )


def score(kernels: LogitOps, logits: Tensor, tokens: Tensor, rows: Tensor | None = None) -> Scores:
    """`logits` [S, V] of any float type; `tokens` [N] of the rows `rows` [N], both int64; by default of all in turn."""
    return Scores(*kernels.score(logits, tokens, rows, min(MAX_LOGPROBS, logits.shape[1])))


def score_prompt(
    kernels: LogitOps, hidden: Tensor, tokens: Tensor, logits: Callable[[Tensor], Tensor], vocab_size: int
) -> Scores:
    """`hidden` [N, H] of the positions before `tokens` [N]; `logits` makes [n, V] of [n, H]."""

    def pieces() -> Iterator[Scores]:
        count = max(1, PIECE // vocab_size)
        for part, said in zip(hidden.split(count), tokens.split(count), strict=True):
            yield score(kernels, logits(part), said)

    parts = list(pieces())
    return Scores(
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.ranks for part in parts]),
        torch.cat([part.top_ids for part in parts]),
        torch.cat([part.top_logprobs for part in parts]),
    )
