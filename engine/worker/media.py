"""The media of requests on this rank: pixels that have come, embeddings that are held, and what slots show of them.

A medium here is one that is encoded as a whole: a picture, or a slice of a clip (messages/media.py).

    Load ── pixels, on the host ── a plan's `encodes` ──> embeddings, on the device ── a step's rows ──> Batch.media
                                        `forgets` drops them; they may be made again

Which are made and dropped, the scheduler says (sched/encoder.py), so all ranks hold the same. Those of one plan are
encoded together. A rank that embeds no tokens has positions and spans alone. Captured steps of one token a row read how
far the positions of a slot are shifted from a table on the device; those with prompts are told what they show
(steps/shown.py). Of copies of attention each holds what its own requests show, and all know whether a row of any copy
shows something. Left out: encoding on a stream of its own; with a pipeline, that the last stage tells of what the first
one could not encode.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.errors import counted
from engine.layers.batch import Batch, Media, WholeSpan, upload
from engine.layers.model import Model
from engine.messages.assets import Load, Loaded
from engine.messages.media import MEDIA, MediaUse, Pixels, media_use, unpacked
from engine.messages.step import SlotAdmit, StepPlan
from engine.worker.steps.copies import Copy
from engine.worker.steps.rows import Rows
from engine.worker.steps.shown import NOTHING_SHOWN, Shown

log = logging.getLogger("engine.worker")


class SlotMedia:
    """What the prompt in a slot shows: each medium's number and use, and where rotary embedding places the tokens."""

    def __init__(self, admit: SlotAdmit) -> None:
        self.uses: list[tuple[int, MediaUse]] = [
            (each.number, media_use(each)) for each in admit.bound if each.kind == MEDIA
        ]
        # from each position to where it is placed, [3, prompt]
        placed = np.frombuffer(admit.positions, "<i4").reshape(3, -1).astype(np.int64)
        self.shifts = placed - np.arange(placed.shape[1])
        self.shift = int(placed.max()) + 1 - placed.shape[1] if placed.size else 0  # behind the prompt
        shifted = np.flatnonzero((self.shifts != self.shift).any(0))
        spans = [begin + count for _, use in self.uses for begin, count in use.spans]
        self.until = max([*spans, int(shifted[-1]) + 1] if len(shifted) else spans, default=0)

    def shifts_of(self, start: int, length: int) -> np.ndarray:
        """[3, length]"""
        known = self.shifts[:, start : start + length]
        return np.pad(known, ((0, 0), (0, length - known.shape[1])), constant_values=self.shift)


def alone(embeddings: Tensor) -> Tensor:
    """`embeddings` in memory of their own: what is encoded together may be parts of one tensor, which is freed with the
    last of them."""
    return embeddings if embeddings.untyped_storage().nbytes() == embeddings.nbytes else embeddings.clone()


class MediaTable:
    """The Loader of the kind MEDIA, and the encoder's side of a step."""

    def __init__(
        self, model: Model, slots: int, device: torch.device, *, embeds: bool, copy: Copy | None = None
    ) -> None:
        """`embeds`: this rank embeds tokens, and so encodes. It has `slots`, those of its `copy` of attention."""
        self._model, self._device, self._embeds, self._copy = model, device, embeds, copy
        self._pixels: dict[int, Pixels] = {}
        self._held: dict[int, Tensor] = {}
        self._slots: dict[int, SlotMedia] = {}
        # positions from which on a slot's tokens are like text's, in all copies of attention
        self._until = np.zeros((1 if copy is None else copy.copies) * slots + 1, np.int64)
        self.size = (1 + model.levels) * model.width if embeds else 0  # numbers of an embedding here, with all levels
        # by how much the positions of each slot's tokens are shifted, behind what its prompt shows
        self.shifts = torch.zeros(slots + 1, dtype=torch.int64, device=device) if model.turns else None
        self._shifted: set[int] = set()  # slots whose shift is not 0
        self.failed: list[tuple[int, int, str]] = []

    # ── media come and go ────────────────────────────────────────────────────────────────────

    def load(self, message: Load, tell: Callable[[Loaded], None]) -> None:
        cause = ""
        if self._embeds:
            try:
                pixels = unpacked(message.payload)
                if len(pixels.data) != np.prod(pixels.shape):
                    raise ValueError(f"{counted(len(pixels.data), 'byte')} for numbers of shape {pixels.shape}")
                self._pixels[message.number] = pixels
            except ValueError as error:  # as msgspec's are
                cause = f"the pixels of an image or video cannot be used: {error}"
        tell(Loaded(message.kind, message.number, cause))

    def drop(self, number: int) -> None:
        """Nobody shows that medium, or will under this number."""
        self._pixels.pop(number, None)
        self._held.pop(number, None)

    # ── a step ───────────────────────────────────────────────────────────────────────────────

    def apply(self, plan: StepPlan) -> None:
        """Takes in whom the plan admits, and encodes what it says. Of copies of attention, it is this one's part of a
        plan that all were `told`."""
        if plan.admits:
            self._admit(plan.admits)
        for number in np.frombuffer(plan.forgets, "<i4")[1::2].tolist():
            self._held.pop(number, None)
        if plan.encodes and self._embeds:
            self._encode(np.frombuffer(plan.encodes, "<i4")[1::2].tolist())

    def told(self, plan: StepPlan) -> bool:
        """Whether a row of a plan, of any copy of attention, computes a part of what a prompt shows."""
        for admit in plan.admits:
            self._until[admit.slot] = SlotMedia(admit).until
        slots, starts = (np.frombuffer(each, "<i4") for each in (plan.slots, plan.starts))
        return bool((starts < self._until[slots]).any())

    def _admit(self, admits: Sequence[SlotAdmit]) -> None:
        shifts: dict[int, int] = {}
        for admit in admits:
            slot = admit.slot
            self._slots.pop(slot, None)
            if slot in self._shifted:
                self._shifted.remove(slot)
                shifts[slot] = 0
            shown = SlotMedia(admit)
            if self._copy is None:
                self._until[slot] = shown.until
            if admit.positions or shown.uses:
                self._slots[slot] = shown
                if shown.shift:
                    self._shifted.add(slot)
                    shifts[slot] = shown.shift
        if shifts and self.shifts is not None:
            slots, numbers = upload(np.array([[*shifts], [*shifts.values()]], np.int64), self._device)
            self.shifts[slots] = numbers

    def _encode(self, numbers: list[int]) -> None:
        try:
            made = [alone(each) for each in self._model.encode([self._pixels[number] for number in numbers])]
            self._held |= dict(zip(numbers, made, strict=True))
        except Exception as error:  # of a medium, which is to end who shows it and nobody else
            log.exception("media %s cannot be encoded together", numbers)
            if len(numbers) > 1:
                for number in numbers:
                    self._encode([number])
            else:
                copy = 0 if self._copy is None else self._copy.number
                self.failed.append((copy, numbers[0], f"{type(error).__name__}: {error}"))

    def shows(self, rows: Rows) -> bool:
        """Whether a row, of any copy of attention, computes a part of what a prompt shows."""
        if rows.among is not None:
            return rows.among.shows
        return bool(self._slots) and bool((rows.starts < self._until[rows.slots]).any())

    def shown(self, rows: Rows) -> Shown:
        """What the step of `rows` shows, and how each of its tokens is turned."""
        places: list[np.ndarray] = []
        parts: list[Tensor] = []
        whole: list[WholeSpan] = []
        shifts = None if self.shifts is None else np.zeros((3, int(rows.lengths.sum())), np.int64)
        offset = 0  # of a row's first token in the step
        for slot, start, length in zip(rows.slots.tolist(), rows.starts.tolist(), rows.lengths.tolist(), strict=True):
            if (shown := self._slots.get(slot)) is not None:
                if shifts is not None:
                    shifts[:, offset : offset + length] = shown.shifts_of(start, length)
                # a row behind all that it shows looks at none of it: a long clip has hundreds of slices
                for number, use in shown.uses if start < shown.until else ():
                    at = 0  # in the medium's embeddings
                    for begin, count in use.spans:
                        at %= use.tokens
                        first, last = max(begin, start), min(begin + count, start + length)
                        if first < last:
                            place = offset + first - start
                            places.append(np.arange(last - first) + place)
                            parts.append(self._embeddings(number, use)[at + first - begin : at + last - begin])
                            if use.whole:
                                whole.append(WholeSpan(place, last - first, first, slot))
                        at += count
            offset += length
        if not places or not self._embeds:
            return Shown(shifts, NOTHING_SHOWN.places, whole=tuple(whole))
        return Shown(shifts, np.concatenate(places), torch.cat(parts), tuple(whole))

    def seen(self, batch: Batch, rows: Rows) -> Batch:
        """`batch`, which is of `rows`, with what it shows."""
        if not self.shows(rows):
            return batch if self.shifts is None else replace(batch, turns=self._plain_turns(batch))
        shown = self.shown(rows)
        turns = None if shown.shifts is None else batch.positions + upload(shown.shifts, self._device)
        media = None
        if shown.embeddings is not None:
            embeddings, *levels = shown.embeddings.split(self._model.width, dim=1)
            media = Media(upload(shown.places, self._device), embeddings, tuple(levels))
        return replace(batch, turns=turns, media=media, whole=shown.whole)

    def _plain_turns(self, batch: Batch) -> Tensor:
        assert self.shifts is not None
        return batch.positions + self.shifts[batch.slots[batch.token_rows()]]

    def _embeddings(self, number: int, use: MediaUse) -> Tensor:
        """Zeros where they could not be made: the step is told to have failed."""
        held = self._held.get(number)
        if held is not None:
            return held
        return torch.zeros(use.tokens, self.size, dtype=self._model.dtype, device=self._device)

    def take_failed(self) -> tuple[tuple[int, int, str], ...]:
        """What has failed since this was asked for last."""
        failed, self.failed = tuple(self.failed), []
        return failed
