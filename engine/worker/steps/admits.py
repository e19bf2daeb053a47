"""What a runner's tables are told of requests: their ids when they take slots, how many they are, and their pages."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.layers.batch import upload
from engine.messages.step import SlotAdmit

SHORT_PROMPT = 1024  # tokens, up to which those of several requests are sent to the device together
FEW_PAGES = 4


def write_ids(admits: Sequence[SlotAdmit], tokens: Tensor, lengths: Tensor) -> Tensor:
    """Into `tokens` [slots, positions] int32 and `lengths` [slots] int64; returns the slots, int64 on the device.

    Ids of short prompts go in one copy: with one for each of many requests, the host would take longer than the
    device."""
    device = tokens.device
    numbers = np.array([(admit.slot, len(admit.ids) // 4) for admit in admits], np.int64).T.copy()
    admitted, counts = upload(numbers, device)
    lengths[admitted] = counts
    short: dict[int, np.ndarray] = {}
    for admit in admits:
        ids = np.frombuffer(admit.ids, "<i4")
        if len(ids) <= SHORT_PROMPT:
            short[admit.slot] = ids
        else:
            tokens[admit.slot, : len(ids)] = upload(ids.copy(), device)
    if short:
        slots = np.repeat(list(short), [len(ids) for ids in short.values()])
        positions = np.concatenate([np.arange(len(ids)) for ids in short.values()])
        slot, position, token = upload(np.stack((slots, positions, np.concatenate([*short.values()]))), device)
        tokens[slot, position] = token.to(torch.int32)
    return admitted


def write_pages(pages: np.ndarray, table: Tensor) -> None:
    """`pages` [n, 3] int32 are slot, index and page, which `table` [slots, P] int32 gets there.

    Few are numbers of their launches, one each: a row's next page then costs the host one launch in place of a copy and
    three."""
    if len(pages) <= FEW_PAGES:
        for slot, index, page in pages.tolist():
            table[slot, index].fill_(page)
    else:
        slots, indices, numbers = upload(pages.T.astype(np.int64, order="C"), table.device)
        table[slots, indices] = numbers.to(torch.int32)
