"""What clients add to logits before a token is drawn: penalties, biases, bans and masks.

Only the rows that ask are touched, and a step in which no row asks does nothing at all. What the penalties count is
read from the device's table of tokens, so no slot keeps counts of its own, and nothing waits for the device:

    penalties ──> biases, stop ids before min_tokens, bad words ──> allowed ids
    multiply      are added: -inf bans                              all else is -inf

A row that bans everything that is allowed yields token 0. Left out: grammars.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.messages import SlotAdmit
from engine.worker.batch import upload


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What one slot asks for. Ids are those that the model has, int64 on the device."""

    prompt_len: int
    penalties: tuple[float, float, float]  # repetition, frequency, presence
    bias_ids: Tensor
    biases: Tensor
    min_tokens: int
    stop_ids: Tensor
    bad_words: tuple[tuple[Tensor, Tensor], ...]  # (what precedes [n, L], the ids that must not follow [n]), by L
    allowed_ids: Tensor

    @property
    def penalizes(self) -> bool:
        return self.penalties != (1.0, 0.0, 0.0)

    @property
    def acts(self) -> bool:
        """Whether it changes anything."""
        added = len(self.bias_ids) or self.min_tokens or self.bad_words
        return bool(self.penalizes or added or len(self.allowed_ids))


class Adjustments:
    """The adjustments of all slots of one device."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._slots: list[Adjustment | None] = [None] * slots
        self._acting = np.zeros(slots, bool)

    def set(self, admit: SlotAdmit) -> None:
        """From now on `admit.slot` asks for what `admit.sampling` says."""
        sampling = admit.sampling
        bias_ids = np.frombuffer(sampling.bias_ids, "<i4").astype(np.int64)
        known = bias_ids < self._vocab_size
        adjustment = Adjustment(
            prompt_len=admit.prompt_len,
            penalties=(sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty),
            bias_ids=upload(bias_ids[known], self._device),
            biases=upload(np.frombuffer(sampling.biases, "<f4")[known], self._device),
            min_tokens=sampling.min_tokens if sampling.stop_ids else 0,
            stop_ids=self._ids(sampling.stop_ids),
            bad_words=self._bad_words(sampling.bad_words),
            allowed_ids=self._ids(sampling.allowed_ids),
        )
        self._acting[admit.slot] = adjustment.acts
        self._slots[admit.slot] = adjustment if adjustment.acts else None

    def _ids(self, packed: bytes) -> Tensor:
        ids = np.frombuffer(packed, "<i4").astype(np.int64)
        return upload(ids[ids < self._vocab_size], self._device)

    def _bad_words(self, words: tuple[bytes, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
        by_length: dict[int, list[np.ndarray]] = {}
        for word in words:
            ids = np.frombuffer(word, "<i4").astype(np.int64)
            if ids[-1] < self._vocab_size:
                by_length.setdefault(len(ids), []).append(ids)
        grids = (np.stack(same) for same in by_length.values())
        return tuple(
            (upload(grid[:, :-1].copy(), self._device), upload(grid[:, -1].copy(), self._device)) for grid in grids
        )

    def acts(self, slots: np.ndarray) -> bool:
        """Whether anything is asked for any of `slots`."""
        return bool(self._acting[slots].any())

    def apply(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray, tokens: Tensor) -> None:
        """Changes `logits` [S, V], in place. Row s is of `slots[s]`, whose tokens before `positions[s]` are in
        `tokens` [slots, P], the device's table."""
        asking = [
            (int(row), int(slots[row]), int(positions[row]), adjustment)
            for row in np.flatnonzero(self._acting[slots])
            if (adjustment := self._slots[slots[row]]) is not None
        ]
        if not asking:
            return
        if penalized := [entry for entry in asking if entry[3].penalizes]:
            _penalize(logits, penalized, tokens)
        _add(logits, asking, tokens)
        for row, _, _, adjustment in asking:
            if len(ids := adjustment.allowed_ids):
                kept = torch.full_like(logits[row], -torch.inf)
                kept[ids] = logits[row, ids]
                logits[row] = kept


Asking = list[tuple[int, int, int, Adjustment]]  # row, slot, position, what is asked


def _penalize(logits: Tensor, asking: Asking, tokens: Tensor) -> None:
    """The repetition penalty (Keskar et al. 2019, arXiv:1909.05858) looks at prompt and reply; the frequency and
    the presence penalty, OpenAI's, at the reply alone."""
    wholes = np.array([(row, slot, position, ask.prompt_len) for row, slot, position, ask in asking], np.int64)
    rows, slots, ends, starts = upload(wholes.T.copy(), logits.device)
    penalties = np.array([adjustment.penalties for *_, adjustment in asking], np.float32)
    repetition, frequency, presence = upload(penalties.T.copy(), logits.device)[:, :, None]
    said = tokens[slots, : int(wholes[:, 2].max())].to(torch.int64)  # what lies beyond a row's end weighs nothing
    place = torch.arange(said.shape[1], device=logits.device)
    known = (place < ends[:, None]).to(logits.dtype)
    replied = known * (place >= starts[:, None])
    block = logits[rows]
    seen = torch.zeros_like(block).scatter_add_(1, said, known) > 0
    counts = torch.zeros_like(block).scatter_add_(1, said, replied)
    block = torch.where(seen, torch.where(block > 0, block / repetition, block * repetition), block)
    logits[rows] = block - frequency * counts - presence * (counts > 0)


def _add(logits: Tensor, asking: Asking, tokens: Tensor) -> None:
    """Biases, and -inf for what is banned. Sums do not mind that an id may come twice."""
    rows: list[int] = []
    ids: list[Tensor] = []
    values: list[Tensor] = []

    def add(row: int, at: Tensor, value: Tensor) -> None:
        if len(at):
            rows.extend([row] * len(at))
            ids.append(at)
            values.append(value)

    for row, slot, position, adjustment in asking:
        add(row, adjustment.bias_ids, adjustment.biases)
        if position - adjustment.prompt_len < adjustment.min_tokens:
            stop_ids = adjustment.stop_ids
            add(row, stop_ids, logits.new_full(stop_ids.shape, -torch.inf))
        for before, last in adjustment.bad_words:
            length = before.shape[1]
            if length <= position:
                matched = (before == tokens[slot, position - length : position]).all(dim=1)
                add(row, last, torch.where(matched, -torch.inf, 0.0))
    if rows:
        where = upload(np.array(rows, np.int64), logits.device)
        logits.index_put_((where, torch.cat(ids)), torch.cat(values), accumulate=True)
