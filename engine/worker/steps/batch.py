"""From a StepPlan's rows to a Batch: what is known on the host goes up in one copy, the rest is gathered there."""

import numpy as np
import torch
from torch import Tensor

from engine.layers.batch import Batch, upload


def build_batch(
    rows: np.ndarray, tokens: Tensor, page_table: Tensor, page_size: int, caches: tuple[tuple[Tensor, ...], ...]
) -> Batch:
    """`rows` int64 [R, 4] as in StepPlan; `tokens` [slots, positions] and `page_table` [slots, pages], int32.

    The ids are read from `tokens` on the device, where the step before may still be about to write them.
    """
    slots, starts, lengths, sample = rows.T
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    row_of_token = np.repeat(np.arange(len(rows)), lengths)
    positions = starts[row_of_token] + np.arange(offsets[-1]) - offsets[row_of_token]
    sampled = offsets[1:][sample != 0] - 1
    host = (slots[row_of_token], positions, slots, starts, offsets, sampled)
    parts = upload(np.concatenate(host), tokens.device).split([len(part) for part in host])
    token_slots, token_positions, row_slots, row_starts, row_offsets, sampled_tokens = parts
    page = page_table[token_slots, token_positions // page_size].to(torch.int64)
    return Batch(
        ids=tokens[token_slots, token_positions].to(torch.int64),
        positions=token_positions,
        places=page * page_size + token_positions % page_size,
        page_table=page_table,
        slots=row_slots,
        row_starts=row_starts,
        row_offsets=row_offsets,
        sampled=sampled_tokens,
        starts=starts,
        lengths=lengths,
        offsets=offsets,
        caches=caches,
    )
