"""What clients add to logits before a token is drawn: penalties, biases, bans and masks.

Only the rows that ask are touched, and a step in which no row asks does nothing at all. What slots ask for is written
into the device's tables when they are admitted; a step then costs one upload and a few launches for all rows together.
What the penalties count is read from the device's table of tokens, so no slot keeps counts of its own:

    penalties ──> biases, stop ids before min_tokens, bad words ──> allowed ids
    multiply      are added: -inf bans                              all else is -inf

A row that bans everything that is allowed yields token 0. Left out: grammars.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.kernels.adjustments import (
    COLUMNS,
    EDIT_LINES,
    EDITS,
    PREFIX_BASE,
    REPETITION,
    AskingRows,
    SlotTables,
    edit,
    penalize,
)
from engine.kernels.bitmask import apply_bitmask, mask_words, pack_ids
from engine.layers.batch import upload
from engine.messages import Sampling, SlotAdmit

ALWAYS = 2**31 - 1  # `until` of an edit that does not end
SCRATCH_BYTES = 64 << 20  # in which a GPU counts tokens, of so many rows at a time
NOTHING = np.zeros((EDIT_LINES, 0), np.int32)


class Adjustments:
    """The adjustments of all slots of one device."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._penalizes, self._edits, self._allows = np.zeros((3, slots), bool)
        self._columns = np.zeros((COLUMNS, slots), np.int32)  # as in SlotTables
        self._prefixes: dict[int, np.ndarray] = {}  # of slots that have any, end to end
        self._longest_prefix = np.zeros(slots, np.int64)
        self._moved = False  # the prefixes on the device are not the last ones
        self._tables = SlotTables(
            upload(self._columns.copy(), device),
            torch.zeros(EDIT_LINES, slots, 0, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )
        self._masks: Tensor | None = None  # [slots, words] int32, from the first list of allowed ids on
        rows = min(slots, max(1, SCRATCH_BYTES // (4 * vocab_size))) if device.type == "cuda" else 0
        self._scratch = torch.zeros(rows, vocab_size, dtype=torch.int32, device=device)

    def admit(self, admits: Sequence[SlotAdmit]) -> None:
        """From now on the admitted slots ask for what their requests say."""
        changed = False
        for admit in admits:
            slot, sampling = admit.slot, admit.sampling
            penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
            edits, prefixes = self._edits_of(sampling)
            self._penalizes[slot] = penalties != (1.0, 0.0, 0.0)
            self._edits[slot] = edits.shape[1] > 0
            self._set_prefixes(slot, prefixes, int(edits[-1].max(initial=0)))
            self._set_allowed(slot, self._ids(sampling.allowed_ids))
            if self._penalizes[slot] or self._edits[slot]:
                changed = True
                self._columns[:PREFIX_BASE, slot] = admit.prompt_len, edits.shape[1]
                self._columns[REPETITION:, slot] = np.array(penalties, np.float32).view(np.int32)
                self._write_edits(slot, edits)
        if changed:
            self._upload_columns()

    def _edits_of(self, sampling: Sampling) -> tuple[np.ndarray, list[np.ndarray]]:
        """Edits as in SlotTables, [EDIT_LINES, n], and the prefixes that they point into."""
        parts, prefixes = [NOTHING], []

        def add(ids: np.ndarray, values: np.ndarray, until: int, start: int = 0, length: int = 0) -> None:
            bits = np.broadcast_to(values.astype(np.float32), ids.shape).copy().view(np.int32)
            rest = (np.full(len(ids), number) for number in (until, start, length))
            parts.append(np.stack((ids, bits, *rest)).astype(np.int32))

        banned = np.array(-np.inf)
        bias_ids = np.frombuffer(sampling.bias_ids, "<i4")
        known = bias_ids < self._vocab_size
        add(bias_ids[known], np.frombuffer(sampling.biases, "<f4")[known], ALWAYS)
        if sampling.min_tokens:
            add(self._ids(sampling.stop_ids), banned, sampling.min_tokens)
        start = 0
        for word in sampling.bad_words:
            *before, last = np.frombuffer(word, "<i4")
            if last < self._vocab_size:
                add(np.array([last]), banned, ALWAYS, start, len(before))
                prefixes.append(np.array(before, np.int32))
                start += len(before)
        return np.concatenate(parts, axis=1), prefixes

    def _ids(self, packed: bytes) -> np.ndarray:
        """Those of packed ids that the model has."""
        ids = np.frombuffer(packed, "<i4")
        return ids[ids < self._vocab_size]

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

    def _set_prefixes(self, slot: int, prefixes: list[np.ndarray], longest: int) -> None:
        self._longest_prefix[slot] = longest
        self._moved |= self._prefixes.pop(slot, None) is not None or longest > 0
        if longest:
            self._prefixes[slot] = np.concatenate(prefixes)

    def _set_allowed(self, slot: int, ids: np.ndarray) -> None:
        self._allows[slot] = len(ids) > 0
        if len(ids):
            if self._masks is None:
                shape = (len(self._allows), mask_words(self._vocab_size))
                self._masks = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._masks[slot] = upload(pack_ids(ids, self._vocab_size), self._device)

    def _upload_columns(self) -> None:
        if self._moved and self._prefixes:
            base = 0
            for slot, prefixes in self._prefixes.items():
                self._columns[PREFIX_BASE, slot] = base
                base += len(prefixes)
            self._tables.prefixes = upload(np.concatenate(list(self._prefixes.values())), self._device)
        self._moved = False
        self._tables.columns.copy_(upload(self._columns.copy(), self._device))

    def acts(self, slots: np.ndarray) -> bool:
        """Whether anything is asked for any of `slots`."""
        return bool((self._penalizes[slots] | self._edits[slots] | self._allows[slots]).any())

    def apply(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray, tokens: Tensor) -> None:
        """Changes `logits` [S, V] float32, in place. Row s is of `slots[s]`, whose tokens before `positions[s]` are in
        `tokens` [slots, P], the device's table."""
        kinds = [np.flatnonzero(asks[slots]) for asks in (self._penalizes, self._edits, self._allows)]
        if not any(map(len, kinds)):
            return
        rows = np.concatenate(kinds)
        numbers = upload(np.stack((rows, slots[rows], positions[rows])), self._device)
        penalized, edited, allowed = numbers.split([len(kind) for kind in kinds], dim=1)
        if len(kinds[0]):
            asking = AskingRows.of(penalized, int(positions[kinds[0]].max()))
            penalize(logits, asking, self._tables, tokens, self._scratch)
        if len(kinds[1]):
            asked = slots[kinds[1]]
            asking = AskingRows.of(edited, int(self._longest_prefix[asked].max()))
            edit(logits, asking, self._tables, tokens, int(self._columns[EDITS, asked].max()))
        if len(kinds[2]):
            assert self._masks is not None
            apply_bitmask(logits, self._masks, allowed[0], allowed[1])
