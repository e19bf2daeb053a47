"""What the prompts of one step show, before it is on its way to the model."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from engine.layers.batch import WholeSpan


@dataclass(frozen=True, slots=True)
class Shown:
    """Of a step of T tokens: by how much rotary embedding `shifts` each [3, T] int64, where the model turns; the
    `places` [M] int64 of tokens that take `embeddings` [M, (1 + levels) * width], None where there are none, which are
    on the device; and spans whose tokens see each other."""

    shifts: np.ndarray | None
    places: np.ndarray
    embeddings: Tensor | None = None
    whole: tuple[WholeSpan, ...] = ()


NOTHING_SHOWN = Shown(None, np.empty(0, np.int64))
