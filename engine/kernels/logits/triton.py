"""The operations of reference.py as Triton kernels, for GPUs; nothing here waits for the device."""

from torch import Tensor

from engine.kernels.logits import adjustments, bitmask, draw, filters, scores
from engine.kernels.logits.reference import AskingRows, LogitOps, SlotTables, check_mask


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

    def cuts(
        self, logits: Tensor, slots: Tensor, temperatures: Tensor, top_ps: Tensor, min_ps: Tensor, top_ks: Tensor
    ) -> tuple[Tensor, Tensor]:
        return filters.cuts(logits, slots, temperatures, top_ps, min_ps, top_ks)

    def draw(
        self,
        logits: Tensor,
        slots: Tensor,
        lasts: Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        tokens: Tensor,
        cuts: tuple[Tensor, Tensor] | None = None,
        masks: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        return draw.draw(logits, slots, lasts, temperatures, seeds, tokens, cuts, masks)

    def score(
        self, logits: Tensor, tokens: Tensor, rows: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return scores.score(logits, tokens, rows, count)
