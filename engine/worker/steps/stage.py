"""A rank's part of each step where the model is a pipeline: hidden states come in and go on, tokens come back later.

    plan k     rows of lane 0 ── hidden ──> … ──> drawn on the last stage ── tokens ──┐
    plan k+1   rows of lane 1                                                         │
    plan k+2   rows of lane 0: the first that read those tokens <── waited for here ──┘

All ranks apply all plans in order. A stage before the last notes what each step will draw, and waits for it only where
a later row reads it: thus steps of other lanes go on meanwhile. What was drawn for a slot that has another request by
then is dropped. So the tables of a stage say, of the rows that it computes, what those of the last stage say.
Left out: rows of drafts, which begin where the last stage knows alone.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.layers.batch import upload
from engine.layers.model import Model
from engine.messages.step import SlotAdmit, steps_in_flight
from engine.parallel.pipeline import Coming, Pipeline
from engine.worker.steps.drafts import Draws
from engine.worker.steps.rows import Rows


@dataclass(slots=True)
class Drawn:
    """The tokens that a step draws on the last stage: each goes to `slots` [D] after the position `lasts` [D]."""

    slots: np.ndarray
    lasts: np.ndarray
    kept: np.ndarray  # [D] bool: the slot still has the request that it was drawn for
    coming: Coming | None = None


class Stage:
    """Between a runner and the other stages. `tokens` [slots, positions] and `lengths` [slots] are the runner's."""

    def __init__(self, pipeline: Pipeline, model: Model, tokens: Tensor, lengths: Tensor) -> None:
        self.pipeline = pipeline
        self._width, self._dtype, self._device = model.width, model.dtype, tokens.device
        assert self._width, f"{type(model).__name__} says that it is staged, and not how wide its hidden states are"
        self._tokens, self._lengths = tokens, lengths
        self._awaited: deque[Drawn] = deque()  # in the order of steps
        self._most_awaited = steps_in_flight(pipeline.group.size)

    @property
    def last(self) -> bool:
        """Whether tokens are drawn here."""
        return self.pipeline.last

    def admit(self, admits: Sequence[SlotAdmit]) -> None:
        """From now on these slots have other requests: what is still drawn for the ones before is not for them."""
        if admits and self._awaited:
            slots = [admit.slot for admit in admits]
            for drawn in self._awaited:
                drawn.kept &= ~np.isin(drawn.slots, slots)

    def enter(self, rows: Rows) -> Tensor | None:
        """Has the tokens that `rows` read in place; the hidden states [T, H] of the stage before, if there is one."""
        assert not rows.drafts.any(), "a stage cannot know where rows of drafts begin"
        while any(np.isin(drawn.slots[drawn.kept], rows.slots).any() for drawn in self._awaited):
            self._settle_first()
        if self.pipeline.first:
            return None
        count = int(rows.lengths.sum())
        like = torch.empty(count, self._width, dtype=self._dtype, device=self._device)
        return self.pipeline.hidden(like).wait()

    def leave(self, rows: Rows, hidden: Tensor, *, lent: bool) -> None:
        """Passes on the hidden states [T, H] of a step, and expects its tokens; `lent` ones are written over by the
        next step."""
        assert hidden.dtype == self._dtype and hidden.shape[1] == self._width, (hidden.dtype, hidden.shape)
        self.pipeline.send_hidden(hidden.clone() if lent else hidden)
        draws = Draws.of(rows)
        if len(draws.slots):
            self._awaited.append(Drawn(draws.slots, draws.lasts, np.ones(len(draws.slots), bool)))
            if self._device.type == "cpu":
                self.listen()
            while len(self._awaited) > self._most_awaited:  # its step is over, and nobody has read what it drew
                self._settle_first()

    def listen(self) -> None:
        """Begins to receive all that is expected. On a CPU at once, beside the next step; on a GPU the receiving end
        would keep a part of it busy, so it begins where somebody waits, or where there is nothing else to do."""
        for drawn in self._awaited:
            self._listen_for(drawn)

    def _listen_for(self, drawn: Drawn) -> Coming:
        """Begins to receive what is expected; what was expected before is on its way already."""
        if drawn.coming is None:
            like = torch.empty(len(drawn.slots), dtype=torch.int64, device=self._device)
            drawn.coming = self.pipeline.tokens(like)
        return drawn.coming

    def tell(self, tokens: Tensor) -> None:
        """On the last stage: what a step has drawn, [D] int64, goes to the others."""
        if len(tokens):
            self.pipeline.send_tokens(tokens.clone())

    def settle(self) -> None:
        """Waits for all that is expected."""
        while self._awaited:
            self._settle_first()

    def _settle_first(self) -> None:
        drawn = self._awaited.popleft()
        tokens = self._listen_for(drawn).wait()
        which = np.flatnonzero(drawn.kept)
        if not len(which):
            return
        index, slots, after = upload(
            np.stack((which, drawn.slots[which], drawn.lasts[which] + 1)), self._device
        ).unbind(0)
        self._tokens[slots, after] = tokens[index].to(torch.int32)
        self._lengths[slots] = after + 1
