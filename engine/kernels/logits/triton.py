"""The operations of reference.py as Triton kernels, for GPUs; nothing here waits for the device."""

from torch import Tensor

from engine.kernels.logits import adjustments, bitmask, draw, scores
from engine.kernels.logits.filters import cuts
from engine.kernels.logits.reference import AskingRows, Filters, LogitOps, SlotTables, check_mask


class TritonLogitOps(LogitOps):
    """The operations on CUDA tensors."""

    captures = True

    def penalize(self, logits: Tensor, asking: AskingRows, tables: SlotTables, tokens: Tensor, scratch: Tensor) -> None:
        adjustments.penalize(logits, asking, tables, tokens, scratch)

    def edit(self, logits: Tensor, asking: AskingRows, tables: SlotTables, tokens: Tensor, most: int) -> None:
        adjustments.edit(logits, asking, tables, tokens, most)

    def apply_bitmask(self, logits: Tensor, mask: Tensor, rows: Tensor, lines: Tensor | None = None) -> None:
        check_mask(logits, mask)
        if len(rows):
            bitmask.apply_bitmask(logits, mask, rows, lines)

    def draw(
        self,
        logits: Tensor,
        slots: Tensor,
        lasts: Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        filters: Filters | None = None,
        masks: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        cut = None if filters is None else cuts(logits, slots, temperatures, *filters)
        return draw.draw(logits, slots, lasts, temperatures, seeds, tokens, lengths, cut, masks)

    def score(
        self, logits: Tensor, tokens: Tensor, rows: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return scores.score(logits, tokens, rows, count)
