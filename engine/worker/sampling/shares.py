"""Drawing tokens where the ranks divide the vocabulary: each looks at its own logits, and the best of all is taken.

    rank 0   logits of its tokens ─ masks, temperature, noise by token id ─ best score, id ─┐
    rank 1   logits of its tokens ─ …                                                     ──┴─ the best, on all ranks

The scores are those that one rank would have, so the tokens are too. On GPUs that reach each other one kernel does the
last part (engine/kernels/collectives/draw.py); elsewhere a collective of one number a row. Left out: what needs all
logits of a row, which are gathered then: penalties, biases and bans, top-k, top-p and min-p, log-probabilities.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.logits.reference import WORD, LogitOps, gumbel, mask_words
from engine.parallel.collectives import Divided, largest

MOST_ID = 0x7FFFFFFF


class ShareDraw:
    """Draws over the ranks of `share`."""

    def __init__(self, share: Divided, kernels: LogitOps) -> None:
        self._share = share
        self._group = share.group
        self._kernels = kernels

    @property
    def masks(self) -> bool:
        """Whether this rank's part of a mask begins with a word of it."""
        return self._share.part.start % WORD == 0

    def draw(
        self,
        logits: Tensor,
        on_device: Sequence[Tensor] | Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        masks: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """As `LogitOps.draw`, from this rank's `logits` [S, n]; `masks` are of the whole vocabulary."""
        slots, lasts = on_device[0], on_device[1]
        if masks is not None:
            first = self._share.part.start // WORD
            masks = masks[0][:, first : first + mask_words(logits.shape[1])], masks[1]
        if logits.is_cuda and self._kernels.captures:
            from engine.kernels.collectives.draw import best_of_chunks

            found = best_of_chunks(logits, slots, lasts, temperatures, seeds, self._share.part.start, masks)
            peers = self._group.peers
            if peers is not None and (ids := peers.choose(found, slots, lasts, tokens, lengths)) is not None:
                return ids
            scores, chunk = found[0].max(dim=1)
            ids = found[1].gather(1, chunk[:, None])[:, 0].to(torch.int64)
        else:
            scores, ids = self._best(logits, slots, lasts, temperatures, seeds, masks)
        key = largest(key_of(scores, ids), self._group)
        ids = MOST_ID - (key & MOST_ID)
        tokens[slots, lasts + 1] = ids.to(torch.int32)
        lengths[slots] = lasts + 2
        return ids

    def _best(
        self,
        logits: Tensor,
        slots: Tensor,
        lasts: Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        masks: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """This rank's best scores [S] float32, and their ids [S] int64."""
        logits = logits.to(torch.float32, copy=masks is not None)
        if masks is not None:
            self._kernels.apply_bitmask(logits, masks[0], torch.arange(len(logits), device=logits.device), masks[1])
        share, temperature = self._share, temperatures[slots]
        scores = logits
        if (temperature > 0).any():  # on all ranks or on none
            top = largest(logits.amax(dim=-1), self._group)
            noisy = (logits - top[:, None]).div_(torch.where(temperature > 0, temperature, 1.0)[:, None])
            noisy += gumbel(seeds[slots], lasts + 1, share.size)[:, share.part]
            scores = torch.where(temperature[:, None] > 0, noisy, logits)
        ids = scores.argmax(dim=-1)
        return scores.gather(1, ids[:, None])[:, 0], ids + share.part.start


def key_of(scores: Tensor, ids: Tensor) -> Tensor:
    """int64 in the order of `scores` float32, and of equals in that of falling `ids`."""
    bits = (scores + 0.0).view(torch.int32)  # one zero, not two
    ordered = bits ^ (bits >> 31 & MOST_ID)
    return (ordered.to(torch.int64) << 32) | (MOST_ID - ids)
