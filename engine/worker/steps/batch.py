"""From the rows of a step to a Batch: what is known on the host goes up in one copy, the rest is gathered there."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from engine.layers.batch import NO_STATES, Batch, Spread, upload
from engine.worker.steps.rows import Rows


def build_batch(
    rows: Rows,
    tokens: Tensor,
    page_table: Tensor,
    page_size: int,
    caches: tuple[tuple[Tensor, ...], ...],
    starts: Tensor | None = None,
    states: Mapping[str, tuple[Tensor, ...]] = NO_STATES,
) -> Batch:
    """`tokens` [slots, positions] and `page_table` [slots, pages], int32. `starts` [R] int64 on the device is where the
    rows begin, if the host does not know it.

    The ids are read from `tokens` on the device, where the step before may still be about to write them.
    """
    offsets = np.concatenate(([0], np.cumsum(rows.lengths)))
    row_of_token = np.repeat(np.arange(len(rows)), rows.lengths)
    positions = rows.starts[row_of_token] + np.arange(offsets[-1]) - offsets[row_of_token]
    host = [rows.slots[row_of_token], positions, rows.slots, rows.starts, offsets]
    if starts is not None:
        host.append(row_of_token)
    parts = upload(np.concatenate(host), tokens.device).split([len(part) for part in host])
    token_slots, token_positions, row_slots, row_starts, row_offsets = parts[:5]
    if starts is not None:
        token_positions = token_positions + (starts - row_starts)[parts[5]]
        row_starts = starts
    page = page_table[token_slots, token_positions // page_size]
    return Batch(
        ids=tokens[token_slots, token_positions].to(token_slots.dtype),
        positions=token_positions,
        places=page.to(token_slots.dtype) * page_size + token_positions % page_size,
        page_table=page_table,
        slots=row_slots,
        row_starts=row_starts,
        row_offsets=row_offsets,
        starts=rows.starts,
        lengths=rows.lengths,
        offsets=offsets,
        caches=caches,
        states=states,
        spread=None if rows.among is None else Spread.of(rows.among.tokens, tokens.device),
    )
