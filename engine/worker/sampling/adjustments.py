"""What clients add to logits before a token is drawn: penalties, biases, bans and masks.

Only the rows that ask are touched, and a step in which no row asks does nothing at all. What slots ask for is written
into the device's tables when they are admitted; a step then costs one upload and a few launches for all rows together.
What the penalties count is read from the device's table of tokens, so no slot keeps counts of its own:

    penalties ──> biases, stop ids before min_tokens, bad words ──> allowed ids
    multiply      are added: -inf bans                              all else is -inf

A row that bans everything that is allowed yields token 0. Left out: grammars.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.kernels.logits.reference import (
    COLUMNS,
    EDIT_LINES,
    EDITS,
    LENGTH,
    PREFIX_BASE,
    PROMPT_LEN,
    REPETITION,
    AskingRows,
    LogitOps,
    SlotTables,
    mask_words,
    pack_ids,
)
from engine.layers.batch import upload
from engine.messages.step import SlotAdmit
from engine.params.sampling import Sampling

ALWAYS = 2**31 - 1  # `until` of an edit that does not end
SCRATCH_BYTES = 64 << 20  # in which a GPU counts tokens, of so many rows at a time
NO_EDITS = np.zeros((EDIT_LINES, 0), np.int32)
NO_IDS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Wishes:
    """All that one request asks of its logits, in the form of SlotTables."""

    columns: np.ndarray  # [COLUMNS] int32, of which PREFIX_BASE is 0; all are 0 where none is read
    edits: np.ndarray  # [EDIT_LINES, n] int32
    prefixes: np.ndarray  # int32: what stands before the last tokens of bad words, end to end
    allowed: np.ndarray  # ids; none is all
    penalizes: bool

    @classmethod
    def of(cls, admit: SlotAdmit, vocab_size: int) -> "Wishes":
        """Those of `admit`, of a model with so many tokens: ids beyond are passed over."""
        sampling = admit.sampling
        penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        edits, prefixes = _edits(sampling, vocab_size)
        penalizes = penalties != (1.0, 0.0, 0.0)
        columns = np.zeros(COLUMNS, np.int32)
        if penalizes or edits.shape[1]:
            columns[[PROMPT_LEN, EDITS]] = admit.prompt_len, edits.shape[1]
            columns[REPETITION:] = np.array(penalties, np.float32).view(np.int32)
        return cls(columns, edits, prefixes, _ids(sampling.allowed_ids, vocab_size), penalizes)

    @property
    def longest_prefix(self) -> int:
        return int(self.edits[LENGTH].max(initial=0))


def _edits(sampling: Sampling, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Edits as in SlotTables, [EDIT_LINES, n], and the prefixes that they point into."""
    parts, prefixes = [NO_EDITS], [NO_IDS]

    def add(ids: np.ndarray, values: np.ndarray, until: int, start: int = 0, length: int = 0) -> None:
        bits = np.broadcast_to(values.astype(np.float32), ids.shape).copy().view(np.int32)
        rest = (np.full(len(ids), number) for number in (until, start, length))
        parts.append(np.stack((ids, bits, *rest)).astype(np.int32))

    banned = np.array(-np.inf)
    bias_ids = np.frombuffer(sampling.bias_ids, "<i4")
    known = bias_ids < vocab_size
    add(bias_ids[known], np.frombuffer(sampling.biases, "<f4")[known], ALWAYS)
    if sampling.min_tokens:
        add(_ids(sampling.stop_ids, vocab_size), banned, sampling.min_tokens)
    start = 0
    for word in sampling.bad_words:
        *before, last = np.frombuffer(word, "<i4")
        if last < vocab_size:
            add(np.array([last]), banned, ALWAYS, start, len(before))
            prefixes.append(np.array(before, np.int32))
            start += len(before)
    return np.concatenate(parts, axis=1), np.concatenate(prefixes)


def _ids(packed: bytes, vocab_size: int) -> np.ndarray:
    """Those of packed ids that the model has."""
    ids = np.frombuffer(packed, "<i4")
    return ids[ids < vocab_size]


class Adjustments:
    """The adjustments of all slots of one device.

    Whoever is admitted replaces all that was known of its slot, whatever it asks for itself. The prefixes of all slots
    lie in one table, so that a slot's base moves when those before it change.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device, kernels: LogitOps) -> None:
        self._kernels = kernels
        self._vocab_size = vocab_size
        self._device = device
        self._penalizes, self._edits, self._allows = np.zeros((3, slots), bool)
        self._columns = np.zeros((COLUMNS, slots), np.int32)  # as in SlotTables
        self._prefixes = [NO_IDS] * slots
        self._longest_prefix = np.zeros(slots, np.int64)
        self._tables = SlotTables(
            upload(self._columns.copy(), device),
            torch.zeros(EDIT_LINES, slots, 0, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )
        self._masks: Tensor | None = None  # [slots, words] int32, from the first list of allowed ids on
        rows = min(slots, max(1, SCRATCH_BYTES // (4 * vocab_size))) if device.type == "cuda" else 0
        self._scratch = torch.zeros(rows, vocab_size, dtype=torch.int32, device=device)

    def admit(self, admits: Sequence[SlotAdmit]) -> None:
        """From now on the admitted slots ask for what their requests say, and for nothing else."""
        before, moved = self._columns.copy(), False
        for admit in admits:
            slot, wishes = admit.slot, Wishes.of(admit, self._vocab_size)
            moved |= len(wishes.prefixes) > 0
            self._penalizes[slot] = wishes.penalizes
            self._edits[slot] = wishes.edits.shape[1] > 0
            self._allows[slot] = len(wishes.allowed) > 0
            self._columns[:, slot] = wishes.columns
            self._prefixes[slot] = wishes.prefixes
            self._longest_prefix[slot] = wishes.longest_prefix
            self._write_edits(slot, wishes.edits)
            self._write_allowed(slot, wishes.allowed)
        if moved:
            lengths = np.array([len(prefixes) for prefixes in self._prefixes])
            self._columns[PREFIX_BASE] = np.cumsum(lengths) - lengths
            self._tables.prefixes = upload(np.concatenate((*self._prefixes, np.zeros(1, np.int32))), self._device)
        if (self._columns != before).any():
            self._tables.columns.copy_(upload(self._columns.copy(), self._device))

    def _write_edits(self, slot: int, edits: np.ndarray) -> None:
        count, width = edits.shape[1], self._tables.edits.shape[2]
        if count > width:
            slots = self._tables.edits.shape[1]
            wide = max(-(-count // 16) * 16, 2 * width)  # in sixteens, so that kernels need not be compiled anew
            grown = torch.zeros(EDIT_LINES, slots, wide, dtype=torch.int32, device=self._device)
            grown[:, :, :width] = self._tables.edits
            self._tables.edits = grown
        if count:
            self._tables.edits[:, slot, :count] = upload(edits, self._device)

    def _write_allowed(self, slot: int, ids: np.ndarray) -> None:
        if len(ids):
            if self._masks is None:
                shape = (len(self._allows), mask_words(self._vocab_size))
                self._masks = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._masks[slot] = upload(pack_ids(ids, self._vocab_size), self._device)

    def acts(self, slots: np.ndarray) -> bool:
        """Whether anything is asked for any of `slots`."""
        return bool((self._penalizes[slots] | self._edits[slots] | self._allows[slots]).any())

    def apply(
        self, logits: Tensor, slots: np.ndarray, positions: np.ndarray, tokens: Tensor, exact: Tensor | None = None
    ) -> None:
        """Changes `logits` [S, V] float32, in place. Row s is of `slots[s]`, whose tokens before `positions[s]` are in
        `tokens` [slots, P], the device's table. Where the host does not know the positions, `exact` [S] int64 are those
        on the device, and `positions` the most they may be."""
        kinds = [np.flatnonzero(asks[slots]) for asks in (self._penalizes, self._edits, self._allows)]
        if not any(map(len, kinds)):
            return
        rows = np.concatenate(kinds)
        numbers = upload(np.stack((rows, slots[rows], positions[rows])), self._device)
        if exact is not None:
            numbers[2] = exact[numbers[0]]
        penalized, edited, allowed = numbers.split([len(kind) for kind in kinds], dim=1)
        if len(kinds[0]):
            asking = AskingRows.of(penalized, int(positions[kinds[0]].max()))
            self._kernels.penalize(logits, asking, self._tables, tokens, self._scratch)
        if len(kinds[1]):
            asked = slots[kinds[1]]
            asking = AskingRows.of(edited, int(self._longest_prefix[asked].max()))
            self._kernels.edit(logits, asking, self._tables, tokens, int(self._columns[EDITS, asked].max()))
        if len(kinds[2]):
            assert self._masks is not None
            self._kernels.apply_bitmask(logits, self._masks, allowed[0], allowed[1])
