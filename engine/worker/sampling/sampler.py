"""How the rows of a step are sampled: temperature, top-k, top-p, min-p, then one draw by Gumbel noise.

A token is drawn as argmax(scores + noise), where the noise of a vocabulary entry is a function of the row's
seed, the position and the entry's id alone (engine/kernels/logits/reference.py). So a draw does not depend on the other
rows of the step, nor on how the request was scheduled. What work a step needs is decided from host copies of the
parameters: nothing here waits for the device. What changes the logits first is in adjustments.py, and which tokens a
grammar lets through in grammars.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.kernels.logits.reference import Filters, LogitOps
from engine.layers.batch import upload
from engine.messages.step import SlotAdmit
from engine.parallel.collectives import Divided
from engine.params.sampling import Sampling
from engine.worker.sampling.shares import ShareDraw


@dataclass(frozen=True, slots=True)
class Columns:
    """How each row is sampled, by slot or by row of a step, on the host. `top_k` 0 is off."""

    temperature: np.ndarray  # float32
    top_p: np.ndarray  # float32
    min_p: np.ndarray  # float32
    top_k: np.ndarray  # int64
    seed: np.ndarray  # int64: the low 64 bits of the client's
    logprobs: np.ndarray  # int64: likeliest tokens to report beside the drawn one; -1 is no log-probabilities at all
    prompt_logprobs: np.ndarray  # int64: the same for the prompt

    @classmethod
    def empty(cls, slots: int) -> "Columns":
        temperature, top_p, min_p = np.zeros((3, slots), np.float32)
        top_k, seed = np.zeros((2, slots), np.int64)
        logprobs, prompt_logprobs = np.full((2, slots), -1, np.int64)
        return cls(temperature, top_p, min_p, top_k, seed, logprobs, prompt_logprobs)

    def set(self, slot: int, sampling: Sampling) -> None:
        self.temperature[slot] = sampling.temperature
        self.top_p[slot] = sampling.top_p
        self.min_p[slot] = sampling.min_p
        self.top_k[slot] = max(sampling.top_k, 0)
        self.seed[slot] = (sampling.seed + (1 << 63)) % (1 << 64) - (1 << 63)
        self.logprobs[slot] = sampling.logprobs
        self.prompt_logprobs[slot] = sampling.prompt_logprobs

    @property
    def filters(self) -> bool:
        """Whether any row that draws asks for min-p, top-k or top-p."""
        asks = (self.min_p > 0) | (self.top_k > 0) | (self.top_p < 1)
        return bool((asks & (self.temperature > 0)).any())

    def rows(self, slots: np.ndarray) -> "Columns":
        """The columns of a step's rows, in their order."""
        return Columns(
            self.temperature[slots],
            self.top_p[slots],
            self.min_p[slots],
            self.top_k[slots],
            self.seed[slots],
            self.logprobs[slots],
            self.prompt_logprobs[slots],
        )


class Sampler:
    """How each slot is sampled, and the draws of a step, which go into the device's table of tokens.

    `tokens` [slots, positions] int32 and `lengths` [slots] int64 are the Runner's. What kernels need of each slot is
    kept on the device too, so that a step uploads nothing. Where ranks divide the `vocabulary`, tokens can be drawn
    from a rank's own logits.
    """

    def __init__(self, tokens: Tensor, lengths: Tensor, kernels: LogitOps, vocabulary: Divided | None = None) -> None:
        slots = len(tokens)
        self._share = None if vocabulary is None else ShareDraw(vocabulary, kernels)
        self.columns = Columns.empty(slots)
        self._tokens, self._lengths = tokens, lengths
        self._filters = np.zeros(slots, bool)  # whether a slot asks for any: it takes long to ask the columns each step
        self._kernels = kernels
        self._reals = torch.zeros(3, slots, dtype=torch.float32, device=tokens.device)  # temperature, top_p, min_p
        self._top_ks = torch.zeros(slots, dtype=torch.int32, device=tokens.device)
        self._seeds = torch.zeros(slots, dtype=torch.int64, device=tokens.device)

    def admit(self, admits: Sequence[SlotAdmit]) -> None:
        """From now on the admitted slots are sampled as their requests ask."""
        for admit in admits:
            self.columns.set(admit.slot, admit.sampling)
            self._filters[admit.slot] = self.columns.rows(np.array([admit.slot])).filters
        if admits:
            columns, device = self.columns, self._tokens.device
            self._reals.copy_(upload(np.stack((columns.temperature, columns.top_p, columns.min_p)), device))
            self._top_ks.copy_(upload(columns.top_k.astype(np.int32), device))
            self._seeds.copy_(upload(columns.seed.copy(), device))

    @property
    def captures(self) -> bool:
        """Whether `draw_plain` can be part of a CUDA graph."""
        return self._kernels.captures

    def plain(self, slots: np.ndarray) -> bool:
        """Whether none of `slots` asks for filters or log-probabilities."""
        return not (self._filters[slots] | (self.columns.logprobs[slots] >= 0)).any()

    def draws_own(self, masked: bool) -> bool:
        """Whether plain rows, under masks if they are `masked`, are drawn from a rank's own logits."""
        return self._share is not None and (self._share.masks or not masked)

    def draw_own(
        self, logits: Tensor, on_device: Sequence[Tensor] | Tensor, masks: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """As `draw_plain`, from this rank's own logits."""
        assert self._share is not None
        tables = self._reals[0], self._seeds, self._tokens, self._lengths
        return self._share.draw(logits, on_device, *tables, masks)

    def draw_plain(
        self,
        logits: Tensor,
        on_device: Sequence[Tensor] | Tensor,
        filters: Filters | None = None,
        masks: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `draw`, by what is on the device alone: for rows that are plain, or with what filters or masks leave of
        them, as `LogitOps.draw` takes it."""
        slots, lasts = on_device[0], on_device[1]
        return self._kernels.draw(
            logits, slots, lasts, self._reals[0], self._seeds, self._tokens, self._lengths, filters=filters, masks=masks
        )

    def draw(self, logits: Tensor, slots: np.ndarray, on_device: Sequence[Tensor] | Tensor) -> Tensor:
        """Draws one token a row, ids [S] int64, puts each after its row's last one, and counts it.

        `logits` [S, V]; `slots` [S] int64 is each row's slot; `on_device` [2, S] are the slots there, and the positions
        of the rows' last tokens.
        """
        asked = Filters(self._reals[1], self._reals[2], self._top_ks) if self._filters[slots].any() else None
        return self.draw_plain(logits, on_device, asked)
