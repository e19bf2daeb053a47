"""Sampling of a whole step on the device: temperature, top-k, top-p, min-p, then one draw by Gumbel noise.

A token is drawn as argmax(scores + noise), where the noise of a vocabulary entry is a function of the row's
seed, the position and the entry's id alone. So a draw does not depend on the other rows of the step, nor on
how the request was scheduled. What work a step needs is decided from host copies of the parameters: nothing
here waits for the device. What changes the logits first is in logits.py, and which tokens a grammar lets
through in grammar.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from engine.layers.batch import upload
from engine.messages.request import Sampling
from engine.messages.step import SlotAdmit

GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # SplitMix64's odd increment, as a signed number
HALF = 0xFFFFFFFF


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

    `tokens` [slots, positions] int32 and `lengths` [slots] int64 are the Runner's. On a GPU what kernels need of each
    slot is kept there too, so that a step uploads nothing; one draws in a pass over the logits, after others have
    found where filters cut them.
    """

    def __init__(self, tokens: Tensor, lengths: Tensor) -> None:
        slots = len(tokens)
        self.columns = Columns.empty(slots)
        self._tokens, self._lengths = tokens, lengths
        self._filters = np.zeros(slots, bool)  # whether a slot asks for any: it takes long to ask the columns each step
        self._kernel = tokens.is_cuda and find_spec("triton") is not None
        self._reals = torch.zeros(3, slots, dtype=torch.float32, device=tokens.device)  # temperature, top_p, min_p
        self._top_ks = torch.zeros(slots, dtype=torch.int32, device=tokens.device)
        self._seeds = torch.zeros(slots, dtype=torch.int64, device=tokens.device)

    def admit(self, admits: Sequence[SlotAdmit]) -> None:
        """From now on the admitted slots are sampled as their requests ask."""
        for admit in admits:
            self.columns.set(admit.slot, admit.sampling)
            self._filters[admit.slot] = self.columns.rows(np.array([admit.slot])).filters
        if admits and self._kernel:
            columns, device = self.columns, self._tokens.device
            self._reals.copy_(upload(np.stack((columns.temperature, columns.top_p, columns.min_p)), device))
            self._top_ks.copy_(upload(columns.top_k.astype(np.int32), device))
            self._seeds.copy_(upload(columns.seed.copy(), device))

    @property
    def captures(self) -> bool:
        """Whether `draw_plain` can be part of a CUDA graph."""
        return self._kernel

    def plain(self, slots: np.ndarray) -> bool:
        """Whether none of `slots` asks for filters or log-probabilities."""
        return not (self._filters[slots] | (self.columns.logprobs[slots] >= 0)).any()

    def draw_plain(
        self,
        logits: Tensor,
        on_device: Sequence[Tensor] | Tensor,
        cut: tuple[Tensor, Tensor] | None = None,
        masks: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `draw`, by what is on the device alone: for rows that are plain, or with what filters or masks leave of
        them, as engine.kernels.logits.draw.draw takes it."""
        from engine.kernels.logits.draw import draw

        return draw(
            logits, on_device[0], on_device[1], self._reals[0], self._seeds, self._tokens, self._lengths, cut, masks
        )

    def draw(self, logits: Tensor, slots: np.ndarray, on_device: Sequence[Tensor] | Tensor) -> Tensor:
        """Draws one token a row, ids [S] int64, puts each after its row's last one, and counts it to its slot's length.

        `logits` [S, V]; `slots` [S] int64 are the rows' slots, and `on_device` [2, S] the same there, and the position
        of each row's last token.
        """
        if not self._kernel:
            places = on_device[1] + 1
            tokens = sample(logits.to(torch.float32), self.columns.rows(slots), places)
            self._tokens[on_device[0], places] = tokens.to(torch.int32)
            self._lengths[on_device[0]] = places + 1
            return tokens
        if not self._filters[slots].any():
            return self.draw_plain(logits, on_device)
        from engine.kernels.logits.filters import cuts

        temperatures, top_ps, min_ps = self._reals
        cut = cuts(logits, on_device[0], temperatures, top_ps, min_ps, self._top_ks)
        return self.draw_plain(logits, on_device, cut)


def sample(logits: Tensor, rows: Columns, positions: Tensor | np.ndarray) -> Tensor:
    """Draws one token a row: `logits` [S, V] float32 to ids [S] int64.

    `positions` [S] int64 are those of the tokens drawn. Temperature 0 is argmax, the lowest id of equals; else the
    draw is Gumbel-max (arXiv:1411.0030) over what the filters leave.
    """
    greedy = logits.argmax(dim=-1)
    if not rows.temperature.any():
        return greedy
    positions = torch.as_tensor(positions, device=logits.device)
    scores = filtered(logits, rows)
    scores += gumbel(upload(rows.seed, logits.device), positions, logits.shape[1])
    drawn = upload(rows.temperature, logits.device) > 0
    return torch.where(drawn, scores.argmax(dim=-1), greedy)


def filtered(logits: Tensor, rows: Columns) -> Tensor:
    """Logits over temperature, [S, V] float32 with 0 the highest, and -inf for what the filters drop.

    They apply in the order temperature, top-k, top-p, min-p, each to what the one before left, as in transformers.
    Top-k keeps all that equal the k-th. Top-p keeps the fewest whose sum reaches p, of equals the lower ids.
    Min-p keeps all that are at least its share as likely as the likeliest, which always stays: it takes the same away
    wherever it stands, but before top-p, as in vLLM, it also makes the sum smaller that top-p has to reach.
    """
    reals = upload(np.stack((rows.temperature, rows.top_p, rows.min_p)), logits.device)
    temperature, top_p, min_p = reals[:, :, None]  # each [S, 1]
    scores = logits - logits.amax(dim=-1, keepdim=True)  # the highest is 0: no overflow at any temperature
    scores /= torch.where(temperature > 0, temperature, 1.0)
    largest = int(rows.top_k.max())
    if largest > 0:
        _top_k(scores, upload(rows.top_k[:, None], logits.device), min(largest, logits.shape[1]))
    if (rows.top_p < 1).any():
        _top_p(scores, top_p)
    if rows.min_p.any():
        scores.masked_fill_(scores < min_p.log(), -torch.inf)
    return scores


def _top_k(scores: Tensor, top_k: Tensor, largest: int) -> None:
    """Drops, in place, what is less than the row's k-th score. `top_k` [S, 1], of which `largest` is the most."""
    best = scores.topk(largest, dim=-1).values
    threshold = best.gather(1, (top_k - 1).clamp(0, largest - 1))
    scores.masked_fill_((scores < threshold) & (top_k > 0), -torch.inf)


def _top_p(scores: Tensor, top_p: Tensor) -> None:
    """Nucleus sampling (arXiv:1904.09751): drops, in place, what lies beyond mass p. `top_p` [S, 1], 1 is off."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    mass = ordered.exp_()  # not normalised
    total = mass.cumsum(dim=-1)
    dropped = (total - mass >= top_p * total[:, -1:]) & (top_p < 1)
    dropped[:, 0] = False
    scores.masked_fill_(torch.zeros_like(dropped).scatter_(1, order, dropped), -torch.inf)


def gumbel(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise, float32 [S, size], of int64 `seeds` [S] and `positions` [S].

    A row's key is a mix of its seed and position by SplitMix64's finalizer (Steele, Lea, Flood: Fast splittable
    pseudorandom number generators, OOPSLA 2014). Entry i is lowbias32 (C. Wellons, hash-prospector), a hash of 32 bits,
    of i times a constant, plus the key's lower half; the upper one is mixed in half-way. The least number
    is 2**-33: what is less likely than that is drawn more seldom still.
    """
    key = _mix(_mix(seeds) + positions * GAMMA)[:, None]
    bits = (torch.arange(size, device=seeds.device) * (GAMMA >> 32 & HALF) + key) & HALF
    bits = (bits ^ bits >> 16) * 0x7FEB352D & HALF
    bits = (bits ^ bits >> 15 ^ _shifted(key, 32)) * 0x846CA68B & HALF
    bits ^= bits >> 16
    # As floats they keep their precision near 0, where log1p turns them into the noise's upper tail.
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    exponential = uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()
    return exponential.log_().neg_()


def _mix(numbers: Tensor) -> Tensor:
    """SplitMix64's finalizer, on int64 that wraps round."""
    numbers = (numbers ^ _shifted(numbers, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    numbers = (numbers ^ _shifted(numbers, 27)) * (0x94D049BB133111EB - (1 << 64))
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, count: int) -> Tensor:
    """Logical shift to the right: torch's own copies the sign."""
    return (numbers >> count) & ((1 << (64 - count)) - 1)
