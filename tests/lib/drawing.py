"""Draws and filters by their definitions, of rows whose parameters are on the host."""

import numpy as np
import torch
from torch import Tensor

from engine.kernels.logits import reference
from engine.kernels.logits.reference import Filters, LogitOps
from engine.worker.sampling.sampler import Columns


def parameters(rows: Columns, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Temperatures, top-p, min-p and top-k of `rows`."""
    numbers = (rows.temperature, rows.top_p, rows.min_p, rows.top_k)
    temperatures, top_ps, min_ps, top_ks = (torch.from_numpy(column).to(device) for column in numbers)
    return temperatures, top_ps, min_ps, top_ks


def filtered(logits: Tensor, rows: Columns) -> Tensor:
    return reference.filtered(logits, *parameters(rows, logits.device))


def sample(logits: Tensor, rows: Columns, positions: np.ndarray) -> Tensor:
    """One token a row of `logits` [S, V], at `positions` [S]: ids [S] int64."""
    operations, slots = LogitOps(), torch.arange(len(logits), device=logits.device)
    numbers = parameters(rows, logits.device)
    seeds, lasts = (torch.from_numpy(each).to(logits.device) for each in (rows.seed, positions - 1))
    tokens = torch.zeros(len(logits), int(positions.max()) + 1, dtype=torch.int32, device=logits.device)
    lengths = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    filters = Filters(*numbers[1:]) if rows.filters else None
    drawn = operations.draw(logits, slots, lasts, numbers[0], seeds, tokens, lengths, filters)
    assert torch.equal(tokens[slots, lasts + 1].long(), drawn)
    assert torch.equal(lengths, lasts + 2)
    return drawn
